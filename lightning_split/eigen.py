r"""Smallest and largest eigenpair of every block of a block-diagonal symmetric operator.

Knows no networks: a solver sees a product ``matvec`` that maps, for every group at once, the rows
of an ``(N, D)`` tensor to ``S_n @ v_n``, and returns one :class:`Eigenpairs` per group. All neurons
of all groups advance together, so the cost is counted in products, whatever the number of neurons.

Shapes: ``N`` neurons of a group, ``D`` incoming weights of one neuron.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_split.krylov import (
    Columns,
    KrylovSpace,
    extreme_pairs,
    in_pieces,
    nonzero,
    norm,
    pieces,
    random_vectors,
    unit,
)

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
                Every call holds all groups; a group that needs no further product is passed zeros. The
                results are the solver's, which writes to them.
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

    Runs ``num_products`` steps of :math:`S Q = Q H + r e^\top` with full reorthogonalisation
    (twice), for all neurons of all groups at once; the extreme Ritz pairs of the projection
    :math:`H` are the answer. When the basis has ``basis_size`` vectors, the run goes on from the
    extreme Ritz vectors and the next vector (thick restart). The residuals come from :math:`H` and
    the vectors left out of the basis, at no extra product; they are bounds that hold up to
    rounding, also if ``matvec`` is not quite symmetric. A small residual certifies that an
    eigenvalue is near, not that none lies further out: what the random start vector hardly touches
    may be missed.

    Where the Krylov space of a neuron is exhausted (zero matrix, low rank, repeated eigenvalues) it
    goes on with a random vector orthogonal to the basis. Matrices with ``D <= num_products``, or
    ``D <= exact_dim``, are formed column by column and decomposed, which is exact.

    Cost: ``min(num_products, max D)`` products, or as many as the largest matrix that is formed has
    columns; and memory for ``basis_size`` vectors of every
    neuron.

    Args:
        num_products: Number of products; without restart the dimension of the Krylov space.
        basis_size: Largest number of basis vectors, at least 4. Five in place of sixteen change
            the values by less than half a percent of the largest (tests/test_eigen.py).
        tol: A pair has converged if its residual is at most ``tol`` times the larger of
            :math:`|\lambda_{\min}|` and :math:`|\lambda_{\max}|`.
        exact_dim: Neurons with at most so many incoming weights are solved exactly, whatever it takes.

    Raises:
        ValueError: If ``num_products`` is below 1, or ``tol`` or ``exact_dim`` is negative.

    References:
        Lanczos (1950); Paige (1976) on why the basis must be reorthogonalised; Wu and Simon (2000)
        on thick restart.

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
    basis_size: int = 5
    exact_dim: int = 0

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.exact_dim < 0:
            raise ValueError(f"Lanczos needs exact_dim >= 0, got {self.exact_dim!r}.")
        _check_options("Lanczos", num_products=self.num_products, tol=self.tol)
        if self.basis_size < 4:
            raise ValueError(f"Lanczos needs basis_size >= 4, got {self.basis_size!r}.")

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
        spaces: dict[str, KrylovSpace | Columns] = {}
        count = 0
        for name, shape in shapes.items():
            formed = shape[1] <= max(self.num_products, self.exact_dim)
            count = max(count, shape[1] if formed else self.num_products)
            if formed:
                spaces[name] = Columns(shape, dtype=dtype, device=device)
            else:
                spaces[name] = KrylovSpace(
                    name,
                    shape,
                    self.num_products,
                    self.basis_size,
                    dtype=dtype,
                    device=device,
                    seed=seed,
                )
        for _ in range(count):
            products = _product(matvec, {name: space.last() for name, space in spaces.items()})
            for name, space in spaces.items():
                space.extend(products.pop(name))
        return {name: _pairs(*spaces.pop(name).extremes(), self.tol) for name in shapes}


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
                name: random_vectors(shape, seed, name, end, dtype=dtype, device=device, uniform=True)
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
        v = {name: unit(self.init * start) for name, start in starts.items()}
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
                    scale[name] = nonzero(norm(Sv)).unsqueeze(-1)
                gradient = 2.0 * sign * (Sv - rayleigh * v[name]) / scale[name]
                square[name].mul_(self.alpha).addcmul_(gradient, gradient, value=1 - self.alpha)
                velocity[name].mul_(self.momentum).add_(gradient / (square[name].sqrt() + 1e-8))
                v[name] = unit(v[name] - lr * velocity[name])
        answers = {}
        for name, value in quotient.items():
            length = nonzero(norm(mean_v[name])).unsqueeze(-1)
            vector = mean_v[name] / length
            residual = norm(mean_Sv[name] / length - value.unsqueeze(-1) * vector)
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
            matrices = dense(name)
            _check_product(name, matrices, (num_neurons, dim, dim))
            answers[name] = _pairs(*extreme_pairs(matrices, like), tol=1e-2)
        return answers


def _densify(matvec: Matvec, shapes: Shapes, dtype: torch.dtype, device: Device) -> dict[str, Tensor]:
    """All splitting matrices, column by column."""
    matrices = {
        name: torch.zeros(num_neurons, dim, dim, dtype=dtype, device=device)
        for name, (num_neurons, dim) in shapes.items()
    }
    for column in range(max((dim for _, dim in shapes.values()), default=0)):
        units = {name: torch.zeros_like(matrix[..., 0]) for name, matrix in matrices.items()}
        for vectors in units.values():
            vectors[:, column : column + 1] = 1.0  # nothing where the group has fewer columns
        for name, product in _product(matvec, units).items():
            matrices[name][..., column : column + 1] = product.unsqueeze(-1)
    return matrices


def _pairs(values: Tensor, vectors: Tensor, residuals: Tensor, tol: float) -> Eigenpairs:
    """Record with unit vectors of definite sign, and what has converged."""
    vectors = in_pieces(_directed, vectors)
    scale = values.abs().amax(-1, keepdim=True)
    tiny = torch.finfo(values.dtype).tiny
    return Eigenpairs(values, vectors, residuals, residuals <= tol * scale + tiny)


def _directed(vectors: Tensor) -> Tensor:
    vectors = unit(vectors)
    largest = vectors.gather(-1, vectors.abs().argmax(-1, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors)


def _product(matvec: Matvec, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One checked product of all groups, without its graph."""
    products = matvec(vectors)
    checked = {}
    for name, vector in vectors.items():
        if name not in products:
            raise ValueError(f"matvec returned no product for group '{name}'; return every group.")
        product = products[name].detach().to(device=vector.device, dtype=vector.dtype)
        _check_product(name, product, tuple(vector.shape))
        if product.untyped_storage().data_ptr() == vector.untyped_storage().data_ptr():
            product = product.clone()
        product = product.contiguous()
        checked[name] = product
    return checked


def _check_product(name: str, product: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(product.shape) != shape:
        raise ValueError(f"The product of group '{name}' has shape {tuple(product.shape)}, expected {shape}.")
    some = (
        product[rows].isfinite().flatten(1).all(1)
        for rows in pieces((len(product), product[0].numel()), product.device)
    )
    finite = torch.cat(list(some))
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
