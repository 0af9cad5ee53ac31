r"""Smallest and largest eigenpair of every block of a block-diagonal symmetric operator.

Knows no networks: a solver sees a product ``matvec`` that maps, for every group at once, the rows
of an ``(N, D)`` tensor to ``S_n @ v_n``, and returns one :class:`Eigenpairs` per group. All neurons
of all groups advance together, so the cost is counted in products, whatever the number of neurons.

Shapes: ``N`` neurons of a group, ``D`` incoming weights of one neuron.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Matvec = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
Dense = Callable[[str], Tensor]
Device = torch.device | str
Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Eigenpairs:
    """Extreme eigenpairs of the splitting matrices of one group of neurons.

    Index 0 of the second axis is the smallest eigenvalue, index 1 the largest. Eigenvectors have
    unit norm, and their entry of largest magnitude is positive. A neuron that did not converge is
    reported in ``converged``, never dropped.
    """

    values: Tensor  # (N, 2)
    vectors: Tensor  # (N, 2, D)
    residuals: Tensor  # (N, 2) norms of S v - lambda v
    converged: Tensor  # (N, 2) bool


class EigenSolver(ABC):
    """A way to find both extreme eigenpairs of every neuron's splitting matrix."""

    @abstractmethod
    def solve(
        self,
        matvec: Matvec,
        shapes: Shapes,
        *,
        dtype: torch.dtype,
        device: Device,
        seed: int = 0,
        dense: Dense | None = None,
    ) -> dict[str, Eigenpairs]:
        """Smallest and largest eigenpair of every neuron of every group.

        Args:
            matvec: Maps ``{group: (N, D)}`` to ``{group: (N, D)}``, row ``n`` to ``S_n @ v_n``.
                Every call holds all groups; a group that needs no further product is passed zeros.
            shapes: ``(N, D)`` of every group.
            dtype: ``torch.float32`` or ``torch.float64``, of the vectors given to ``matvec``.
            device: Where the vectors given to ``matvec`` live.
            seed: Of the start vectors. They depend on the seed and the name and shape of the
                group only, not on the device or on the other groups.
            dense: Maps a group to its ``(N, D, D)`` splitting matrices; a solver may use it.

        Returns:
            One :class:`Eigenpairs` per group, on ``device`` and of ``dtype``.

        Raises:
            ValueError: If a product is not finite or has the wrong shape, a shape is empty, or the
                precision is too low.
        """


@dataclass(frozen=True)
class Lanczos(EigenSolver):
    r"""Both ends of the spectrum from one Krylov space, with the residual norms as certificate.

    Runs ``min(num_products, D)`` steps of :math:`S Q = Q H + r e^\top` with full
    reorthogonalisation (twice), for all neurons of all groups at once; the extreme Ritz pairs of
    the tridiagonal projection are the answer. The residuals come from :math:`H` and the vectors
    left out of the basis, at no extra product; they are bounds that hold up to rounding, also if
    ``matvec`` is not quite symmetric. A small residual certifies that an eigenvalue is near, not
    that none lies further out: what the random start vector hardly touches may be missed.

    Where the Krylov space of a neuron is exhausted (zero matrix, low rank, repeated eigenvalues) it
    goes on with a random vector orthogonal to the basis.

    Cost: ``min(num_products, max D)`` products, and memory for ``num_products`` vectors of every
    neuron.

    Args:
        num_products: Largest dimension of the Krylov space.
        tol: A pair has converged if its residual is at most ``tol`` times the larger of
            :math:`|\lambda_{\min}|` and :math:`|\lambda_{\max}|`.

    Raises:
        ValueError: If ``num_products`` is below 1 or ``tol`` is negative.

    References:
        Lanczos (1950); Paige (1976) on why the basis must be reorthogonalised.

    Example:
        >>> import torch
        >>> S = torch.diag(torch.tensor([-2.0, 0.0, 1.0], dtype=torch.float64))
        >>> pairs = Lanczos(16).solve(
        ...     lambda V: {"fc": V["fc"] @ S}, {"fc": (1, 3)}, dtype=torch.float64, device="cpu"
        ... )["fc"]
        >>> [round(value, 6) for value in pairs.values[0].tolist()]
        [-2.0, 1.0]
    """

    num_products: int = 16
    tol: float = 1e-2

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check_options("Lanczos", num_products=self.num_products, tol=self.tol)

    def solve(
        self,
        matvec: Matvec,
        shapes: Shapes,
        *,
        dtype: torch.dtype,
        device: Device,
        seed: int = 0,
        dense: Dense | None = None,
    ) -> dict[str, Eigenpairs]:
        """Extreme Ritz pairs; ``dense`` is not used. See :meth:`EigenSolver.solve`."""
        _check_problem("Lanczos", shapes, dtype)
        spaces = {
            name: _KrylovSpace(name, shape, self.num_products, dtype=dtype, device=device, seed=seed)
            for name, shape in shapes.items()
        }
        for _ in range(max((space.num_steps for space in spaces.values()), default=0)):
            products = _product(matvec, {name: space.last() for name, space in spaces.items()})
            for name, space in spaces.items():
                space.extend(products[name])
        return {name: space.extremes(self.tol) for name, space in spaces.items()}


class _KrylovSpace:
    """Orthonormal bases of the Krylov spaces of one group, and the projections onto them.

    Everything is elementwise products and sums rather than matrix products, which under TF32 or
    autocast would silently lose the orthogonality.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        num_products: int,
        *,
        dtype: torch.dtype,
        device: Device,
        seed: int,
    ) -> None:
        self.name, self.shape, self.seed = name, shape, seed
        self.num_steps = min(num_products, shape[1])
        self.basis = [_unit(_random(shape, seed, name, 0, dtype=dtype, device=device))]
        self.columns: list[Tensor] = []  # step j: (N, num_steps), column j of H = Q^T S Q
        self.dropped: list[Tensor] = []  # step j: (N,), norm of the part of S q_j outside the basis
        self.scale = self.basis[0].new_zeros(shape[0])  # lower bound of ||S||

    def last(self) -> Tensor:
        """The vectors to multiply next, zero if there is nothing left to do."""
        if len(self.columns) == self.num_steps:
            return torch.zeros_like(self.basis[0])
        return self.basis[-1]

    def extend(self, product: Tensor) -> None:
        """One step of the recurrence, given the product with the last basis vectors."""
        step = len(self.columns)
        if step == self.num_steps:
            return
        column = product.new_zeros(self.shape[0], self.num_steps)
        self.scale = torch.maximum(self.scale, _norm(product))
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            product = self._orthogonalise(product, column)
        beta = _norm(product)
        self.columns.append(column)
        if step + 1 == self.num_steps:
            self.dropped.append(beta)
            return
        # 10 eps sqrt(D) ||S|| is the rounding error of one product and its projections: below it
        # the remainder has no direction of its own.
        eps = torch.finfo(product.dtype).eps
        exhausted = beta <= 10.0 * eps * math.sqrt(self.shape[1]) * self.scale
        following = product / _nonzero(beta).unsqueeze(-1)
        if bool(exhausted.any()):
            fresh = _random(self.shape, self.seed, self.name, step + 1, dtype=beta.dtype, device=beta.device)
            for _ in range(3):  # may start almost inside the basis, so once more
                fresh = _unit(self._orthogonalise(fresh))
            following = torch.where(exhausted.unsqueeze(-1), fresh, following)
        kept = torch.where(exhausted, torch.zeros_like(beta), beta)
        column[:, step + 1] = kept
        self.dropped.append(beta - kept)
        self.basis.append(following)

    def _orthogonalise(self, vectors: Tensor, column: Tensor | None = None) -> Tensor:
        """The part of the vectors outside the basis; what was inside is added to ``column``."""
        for i, q in enumerate(self.basis):
            inside = (q * vectors).sum(-1)
            vectors = torch.addcmul(vectors, q, inside.unsqueeze(-1), value=-1.0)
            if column is not None:
                column[:, i] += inside
        return vectors

    def extremes(self, tol: float) -> Eigenpairs:
        """Extreme Ritz pairs of the space, with residuals from the projection."""
        # On the CPU: the matrices are tiny, float64 is there on every machine that has one, and
        # the factorisation of one neuron cannot depend on the others.
        H = torch.stack(self.columns, -1).to("cpu", torch.float64)
        values, y = torch.linalg.eigh(H)  # reads the lower triangle: the tridiagonal part
        values, y = values[:, [0, -1]], y[:, :, [0, -1]]  # (N, 2), (N, steps, 2)
        dropped = torch.stack(self.dropped, -1).to("cpu", torch.float64)
        inside = torch.linalg.vector_norm(H @ y - y * values.unsqueeze(1), dim=1)
        outside = (dropped.unsqueeze(-1) * y.abs()).sum(1)
        residuals = torch.hypot(inside, outside)

        like = self.basis[0]
        y = y.to(like)
        vectors = like.new_zeros(self.shape[0], 2, self.shape[1])
        for j, q in enumerate(self.basis):
            vectors = torch.addcmul(vectors, y[:, j].unsqueeze(-1), q.unsqueeze(1))
        return _pairs(values.to(like), vectors, residuals.to(like), tol)


@dataclass(frozen=True)
class RayleighDescent(EigenSolver):
    r"""Gradient descent on the Rayleigh quotient: the recipe of fast, energy-aware splitting.

    RMSprop on :math:`v^\top S v / v^\top v` with ``v`` renormalised after every step. Eigenvalue
    and eigenvector are the averages of the Rayleigh quotients and of the (sign-aligned) iterates
    over the last steps, as in the official code over its last epoch. Run on :math:`S` for the
    smallest and on :math:`-S` for the largest eigenpair. The residual is that of the averages, from
    the averaged products. :class:`Lanczos` reaches the same with far fewer products; this is for
    comparison with the paper.

    Cost: ``2 * num_steps`` products, memory for a few vectors of every neuron.

    Args:
        num_steps: Products for each end of the spectrum.
        lr: Step size of RMSprop.
        momentum: Of RMSprop.
        alpha: Decay of the mean square of RMSprop.
        num_decays: How often the step size is multiplied by ``decay``, at equal distances.
        decay: See ``num_decays``.
        average: Share of the steps, counted from the end, that is averaged.
        init: Start vectors are uniform on ``(-init, init)``.
        tol: As in :class:`Lanczos`.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Wang et al. (2019), arXiv:1910.03103, and its official code.
    """

    num_steps: int = 500
    lr: float = 1e-3
    momentum: float = 0.9
    alpha: float = 0.9
    num_decays: int = 4
    decay: float = 0.2
    average: float = 0.1
    init: float = 0.1
    tol: float = 1e-2

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check_options("RayleighDescent", num_steps=self.num_steps, tol=self.tol)
        for option in ("lr", "momentum", "alpha", "decay", "average", "init"):
            value = getattr(self, option)
            if not 0.0 <= value <= 1.0 or (value == 0.0 and option in ("average", "init")):
                raise ValueError(f"RayleighDescent needs {option} between 0 and 1, got {value!r}.")
        if self.num_decays < 0:
            raise ValueError(f"RayleighDescent needs num_decays >= 0, got {self.num_decays!r}.")

    def solve(
        self,
        matvec: Matvec,
        shapes: Shapes,
        *,
        dtype: torch.dtype,
        device: Device,
        seed: int = 0,
        dense: Dense | None = None,
    ) -> dict[str, Eigenpairs]:
        """Two runs of gradient descent; ``dense`` is not used. See :meth:`EigenSolver.solve`."""
        _check_problem("RayleighDescent", shapes, dtype)
        ends = []
        for end, sign in enumerate((1.0, -1.0)):
            starts = {
                name: _random(shape, seed, name, end, dtype=dtype, device=device, uniform=True)
                for name, shape in shapes.items()
            }
            ends.append(self._descend(matvec, starts, sign))
        answers = {}
        for name in shapes:
            values, vectors, residuals = (
                torch.stack(both, dim=1) for both in zip(*(end[name] for end in ends), strict=True)
            )
            answers[name] = _pairs(values, vectors, residuals, self.tol)
        return answers

    def _descend(
        self, matvec: Matvec, starts: dict[str, Tensor], sign: float
    ) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Value (N,), vector (N, D) and residual (N,) of every group, at one end."""
        v = {name: _unit(self.init * start) for name, start in starts.items()}
        num_averaged = max(1, math.ceil(self.average * self.num_steps))
        square, velocity, scale, mean_v, mean_Sv = (
            {name: torch.zeros_like(start) for name, start in starts.items()} for _ in range(5)
        )
        quotient = {name: start.new_zeros(start.shape[0]) for name, start in starts.items()}
        for step in range(self.num_steps):
            lr = self.lr * self.decay ** (step * (self.num_decays + 1) // self.num_steps)
            products = _product(matvec, v)
            for name, Sv in products.items():
                rayleigh = (v[name] * Sv).sum(-1, keepdim=True)
                if step >= self.num_steps - num_averaged:
                    aligned = torch.where((mean_v[name] * v[name]).sum(-1, keepdim=True) < 0, -1, 1)
                    mean_v[name] += aligned * v[name] / num_averaged
                    mean_Sv[name] += aligned * Sv / num_averaged
                    quotient[name] += rayleigh.squeeze(-1) / num_averaged
                if step == 0:
                    # The 1e-8 below is meant for gradients of order one: measured in units of the
                    # first product, a splitting matrix of any scale takes the same path.
                    scale[name] = _nonzero(_norm(Sv)).unsqueeze(-1)
                gradient = 2.0 * sign * (Sv - rayleigh * v[name]) / scale[name]
                square[name].mul_(self.alpha).addcmul_(gradient, gradient, value=1 - self.alpha)
                velocity[name].mul_(self.momentum).add_(gradient / (square[name].sqrt() + 1e-8))
                v[name] = _unit(v[name] - lr * velocity[name])
        answers = {}
        for name, value in quotient.items():
            length = _nonzero(_norm(mean_v[name])).unsqueeze(-1)
            vector = mean_v[name] / length
            residual = _norm(mean_Sv[name] / length - value.unsqueeze(-1) * vector)
            answers[name] = (value, vector, residual)
        return answers


@dataclass(frozen=True)
class Exact(EigenSolver):
    """Dense eigen-decomposition of every splitting matrix: the reference for the other solvers.

    Takes the matrices from ``dense`` if given, else builds them from ``max D`` products with unit
    vectors, for all neurons at once; the symmetric part is decomposed, on the CPU in float64.

    Cost: ``max D`` products without ``dense``, none with it; ``N * D**2`` numbers per group and
    ``N * D**3`` operations.

    References:
        Liu, Wu, Wang (2019), arXiv:1910.02366: the exact method of splitting steepest descent.
    """

    def solve(
        self,
        matvec: Matvec,
        shapes: Shapes,
        *,
        dtype: torch.dtype,
        device: Device,
        seed: int = 0,
        dense: Dense | None = None,
    ) -> dict[str, Eigenpairs]:
        """Eigen-decomposition of the dense matrices; see :meth:`EigenSolver.solve`."""
        _check_problem("Exact", shapes, dtype)
        if dense is None:
            dense = _densify(matvec, shapes, dtype, device).__getitem__
        answers = {}
        like = torch.empty(0, dtype=dtype, device=device)
        for name, (num_neurons, dim) in shapes.items():
            matrices = dense(name).detach().to("cpu", torch.float64)
            _check_product(name, matrices, (num_neurons, dim, dim))
            matrices = (matrices + matrices.mT) / 2
            values, vectors = torch.linalg.eigh(matrices)
            values, vectors = values[:, [0, -1]], vectors[:, :, [0, -1]].mT  # (N, 2), (N, 2, D)
            residuals = _norm(vectors @ matrices - values.unsqueeze(-1) * vectors)
            answers[name] = _pairs(values.to(like), vectors.to(like), residuals.to(like), tol=1e-2)
        return answers


def _densify(matvec: Matvec, shapes: Shapes, dtype: torch.dtype, device: Device) -> dict[str, Tensor]:
    """All splitting matrices, column by column."""
    matrices = {
        name: torch.zeros(num_neurons, dim, dim, dtype=dtype, device=device)
        for name, (num_neurons, dim) in shapes.items()
    }
    for column in range(max((dim for _, dim in shapes.values()), default=0)):
        units = {name: torch.zeros_like(matrix[..., 0]) for name, matrix in matrices.items()}
        for unit in units.values():
            unit[:, column : column + 1] = 1.0  # nothing where the group has fewer columns
        for name, product in _product(matvec, units).items():
            matrices[name][..., column : column + 1] = product.unsqueeze(-1)
    return matrices


def _pairs(values: Tensor, vectors: Tensor, residuals: Tensor, tol: float) -> Eigenpairs:
    """Record with unit vectors of definite sign, and what has converged."""
    vectors = _unit(vectors)
    largest = vectors.gather(-1, vectors.abs().argmax(-1, keepdim=True))
    vectors = torch.where(largest < 0, -vectors, vectors)
    scale = values.abs().amax(-1, keepdim=True)
    tiny = torch.finfo(values.dtype).tiny
    return Eigenpairs(values, vectors, residuals, residuals <= tol * scale + tiny)


def _norm(vectors: Tensor) -> Tensor:
    """Norm along the last axis, safe from under- and overflow of the squares."""
    largest = vectors.abs().amax(-1)
    relative = vectors / _nonzero(largest).unsqueeze(-1)
    return largest * (relative * relative).sum(-1).sqrt()


def _unit(vectors: Tensor) -> Tensor:
    """Vectors divided by their norm; a zero vector stays zero."""
    return vectors / _nonzero(_norm(vectors)).unsqueeze(-1)


def _nonzero(scale: Tensor) -> Tensor:
    """The scale, with 1 in place of 0, to divide by."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _random(
    shape: tuple[int, int],
    seed: int,
    name: str,
    stream: int,
    *,
    dtype: torch.dtype,
    device: Device,
    uniform: bool = False,
) -> Tensor:
    """Normal numbers, or uniform ones on (-1, 1), fixed by seed, name, stream and shape alone."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)
    numbers = torch.empty(shape, dtype=torch.float64)
    if uniform:
        numbers.uniform_(-1.0, 1.0, generator=generator)
    else:
        numbers.normal_(generator=generator)
    return numbers.to(device=device, dtype=dtype)


def _product(matvec: Matvec, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One checked product of all groups, without its graph."""
    products = matvec(vectors)
    checked = {}
    for name, vector in vectors.items():
        if name not in products:
            raise ValueError(f"matvec returned no product for group '{name}'; return every group.")
        product = products[name].detach().to(device=vector.device, dtype=vector.dtype)
        _check_product(name, product, tuple(vector.shape))
        checked[name] = product
    return checked


def _check_product(name: str, product: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(product.shape) != shape:
        raise ValueError(f"The product of group '{name}' has shape {tuple(product.shape)}, expected {shape}.")
    finite = product.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        raise ValueError(
            f"The product with the splitting matrices of group '{name}' is not finite for "
            f"{int((~finite).sum())} of {shape[0]} neurons; check the loss for NaN or infinity, "
            "or measure in a higher precision."
        )


def _check_problem(solver: str, shapes: Shapes, dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{solver} needs dtype torch.float32 or torch.float64, got {dtype}; convert inside matvec."
        )
    for name, (num_neurons, dim) in shapes.items():
        if num_neurons < 1 or dim < 1:
            raise ValueError(
                f"Group '{name}' has shape {(num_neurons, dim)}; leave out groups without neurons "
                "or without incoming weights."
            )


def _check_options(solver: str, *, tol: float, **counts: int) -> None:
    for option, count in counts.items():
        if count < 1:
            raise ValueError(f"{solver} needs {option} >= 1, got {count!r}.")
    if not tol >= 0.0:
        raise ValueError(f"{solver} needs tol >= 0, got {tol!r}.")
