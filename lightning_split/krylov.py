r"""Krylov spaces of many symmetric matrices at once, restarted so that few basis vectors suffice.

Thick restart: when the basis is full, it is replaced by Ritz vectors from both ends of the spectrum and the
vector that would have come next. The projection is kept whole, so that nothing depends on its being
tridiagonal.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = [
    "Columns",
    "KrylovSpace",
    "extreme_pairs",
    "in_pieces",
    "nonzero",
    "norm",
    "pieces",
    "random_vectors",
    "unit",
]

Device = torch.device | str
Extremes = tuple[Tensor, Tensor, Tensor]  # values (N, 2), vectors (N, 2, D), residuals (N, 2)

# Numbers that are worked on at a time. The rest of the memory is that of the basis.
_PIECE = 2**17  # what the caches of a CPU hold
_GPU_PIECE = 2**22  # enough to keep a GPU busy


class KrylovSpace:
    """Orthonormal bases of the Krylov spaces of one group, and the projections onto them.

    Everything is elementwise products and sums rather than matrix products, which under TF32 or
    autocast would silently lose the orthogonality. A few neurons are worked on at a time, so that no memory
    is needed beside the basis and the next vector.

    Args:
        name: Of the group; with the seed and the shape it decides the start vectors.
        shape: ``(N, D)``.
        num_products: Products in all; at most ``D`` are asked for.
        basis_size: Largest number of basis vectors.
        dtype: Of the vectors.
        device: Of the vectors.
        seed: Of the start vectors.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        num_products: int,
        basis_size: int,
        *,
        dtype: torch.dtype,
        device: Device,
        seed: int,
    ) -> None:
        self.name, self.shape, self.seed = name, shape, seed
        self.basis_size = min(basis_size, num_products, shape[1])
        self.num_steps = num_products if self.basis_size < shape[1] else shape[1]
        self.steps, self.restarted = 0, False
        start = random_vectors(shape, seed, name, 0, dtype=dtype, device=device)
        self.basis = [in_pieces(unit, start)]
        self.columns: list[Tensor] = []  # per multiplied basis vector: (N, basis_size), column of Q^T S Q
        self.dropped: list[Tensor] = []  # (N,), norm of the part of S q outside the basis
        self.scale = start.new_zeros(shape[0])  # lower bound of ||S||

    def last(self) -> Tensor:
        """The vectors to multiply next, zero if there is nothing left to do."""
        if self.steps == self.num_steps:
            return torch.zeros_like(self.basis[0])
        return self.basis[-1]

    def extend(self, product: Tensor) -> None:
        """One step of the recurrence, given the product with the last basis vectors, which is used up."""
        if self.steps == self.num_steps:
            return
        self.steps += 1
        column = product.new_zeros(self.shape[0], self.basis_size)
        kept, dropped = (product.new_zeros(self.shape[0]) for _ in range(2))  # of the remainder's norm
        more = self.steps < self.num_steps
        for rows in pieces(self.shape, product.device):
            remainder = product[rows]
            self.scale[rows] = torch.maximum(self.scale[rows], norm(remainder))
            for _ in range(2):  # twice is enough (Kahan, Parlett)
                remainder = self._orthogonalise(remainder, rows, column)
            dropped[rows] = norm(remainder)
            if more:
                product[rows], kept[rows] = self._next(remainder, dropped[rows], rows)
        self.columns.append(column)
        self.dropped.append(dropped - kept)
        if not more:
            return
        if len(self.columns) == self.basis_size:
            self._restart(product, kept)
        else:
            column[:, len(self.columns)] = kept
            self.basis.append(product)

    def extremes(self) -> Extremes:
        """Extreme Ritz pairs of the space, with residuals from the projection; the space is used up."""
        values, y, residuals = self._ritz()
        like = self.basis[0]
        self._rotate(y)
        vectors = torch.stack(self.basis, dim=1)
        self.basis = []
        return values.to(like), vectors, residuals.to(like)

    def _next(self, remainder: Tensor, beta: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """The next vectors of some neurons, and how much of the product lay along them."""
        # 10 eps sqrt(D) ||S|| is the rounding error of one product and its projections: below it
        # the remainder has no direction of its own.
        eps = torch.finfo(remainder.dtype).eps
        exhausted = beta <= 10.0 * eps * math.sqrt(self.shape[1]) * self.scale[rows]
        following = remainder / nonzero(beta).unsqueeze(-1)
        if bool(exhausted.any()):
            fresh = random_vectors(
                self.shape,
                self.seed,
                self.name,
                self.steps,
                rows=rows,
                dtype=remainder.dtype,
                device=remainder.device,
            )
            for _ in range(3):  # may start almost inside the basis, so once more
                fresh = unit(self._orthogonalise(fresh, rows))
            following = torch.where(exhausted.unsqueeze(-1), fresh, following)
        return following, torch.where(exhausted, torch.zeros_like(beta), beta)

    def _orthogonalise(self, vectors: Tensor, rows: slice, column: Tensor | None = None) -> Tensor:
        """The part of the vectors outside the basis; what was inside is added to ``column``."""
        for i, q in enumerate(self.basis):
            inside = (q[rows] * vectors).sum(-1)
            vectors = torch.addcmul(vectors, q[rows], inside.unsqueeze(-1), value=-1.0)
            if column is not None:
                column[rows, i] += inside
        return vectors

    def _ritz(self) -> Extremes:
        """Extreme eigenpairs of the projection: values, coefficients ``(N, steps, 2)`` and residuals."""
        # On the CPU: the matrices are tiny, float64 is there on every machine that has one, and
        # the factorisation of one neuron cannot depend on the others.
        H = torch.stack(self.columns, -1).to("cpu", torch.float64)[:, : len(self.columns)]
        values, y = torch.linalg.eigh(H)  # reads the lower triangle: what the recurrence says
        values, y = values[:, [0, -1]], y[:, :, [0, -1]]  # (N, 2), (N, steps, 2)
        dropped = torch.stack(self.dropped, -1).to("cpu", torch.float64)
        inside = torch.linalg.vector_norm(H @ y - y * values.unsqueeze(1), dim=1)
        outside = (dropped.unsqueeze(-1) * y.abs()).sum(1)
        # What a restart has left out of the projection may lie along the basis of today.
        return values, y, inside + outside if self.restarted else torch.hypot(inside, outside)

    def _rotate(self, y: Tensor) -> None:
        """Put the two vectors with these coefficients ``(N, steps, 2)`` in the place of the basis."""
        basis = self.basis[: y.shape[1]]
        if len(basis) == 1:
            basis = [basis[0], basis[0].clone()]  # one product: both ends are the same
        y = y.to(basis[0])
        for rows in pieces(self.shape, y.device):
            vectors = basis[0].new_zeros(len(y[rows]), 2, self.shape[1])
            for j, q in enumerate(basis[: y.shape[1]]):
                vectors.addcmul_(y[rows, j].unsqueeze(-1), q[rows].unsqueeze(1))
            for end in (0, 1):
                basis[end][rows] = vectors[:, end]
        self.basis = basis[:2]

    def _restart(self, following: Tensor, kept: Tensor) -> None:
        """Replace the basis by the extreme Ritz vectors and the vector that comes next.

        What the products of Ritz vectors have along the next vector is the last coefficient times the norm
        ``kept``; what is left out of the projection stays on their account.
        """
        values, y, residuals = self._ritz()
        self._rotate(y)
        like = following
        coupling = y[:, -1].to(like) * kept.unsqueeze(-1)  # (N, 2)
        self.restarted = True
        self.basis.append(following)
        self.columns = []
        for end in (0, 1):
            column = like.new_zeros(self.shape[0], self.basis_size)
            column[:, end] = values[:, end].to(like)
            column[:, 2] = coupling[:, end]
            self.columns.append(column)
        self.dropped = list(residuals.to(like).unbind(1))


class Columns:
    """The matrices of one group themselves, column by column: exact, and cheaper where ``D`` is small.

    Has the methods of :class:`KrylovSpace`.
    """

    def __init__(self, shape: tuple[int, int], *, dtype: torch.dtype, device: Device) -> None:
        self.shape = shape
        self.columns: list[Tensor] = []
        self._zero = torch.zeros(shape, dtype=dtype, device=device)

    def last(self) -> Tensor:
        """The next unit vector, zero if there is nothing left to do."""
        vectors = self._zero.clone()
        vectors[:, len(self.columns) : len(self.columns) + 1] = 1.0
        return vectors

    def extend(self, product: Tensor) -> None:
        """Keep a column."""
        if len(self.columns) < self.shape[1]:
            self.columns.append(product)

    def extremes(self) -> Extremes:
        """Extreme eigenpairs of the symmetric part."""
        return extreme_pairs(torch.stack(self.columns, -1), self._zero)


def extreme_pairs(matrices: Tensor, like: Tensor) -> Extremes:
    """Extreme eigenpairs of the symmetric parts of ``(N, D, D)``, with the residuals of the whole."""
    matrices = matrices.detach().to("cpu", torch.float64)
    values, vectors = torch.linalg.eigh((matrices + matrices.mT) / 2)
    values, vectors = values[:, [0, -1]], vectors[:, :, [0, -1]].mT  # (N, 2), (N, 2, D)
    residuals = norm(vectors @ matrices.mT - values.unsqueeze(-1) * vectors)
    return values.to(like), vectors.to(like), residuals.to(like)


def norm(vectors: Tensor) -> Tensor:
    """Norm along the last axis, safe from under- and overflow of the squares."""
    largest = vectors.abs().amax(-1)
    relative = vectors / nonzero(largest).unsqueeze(-1)
    return largest * (relative * relative).sum(-1).sqrt()


def unit(vectors: Tensor) -> Tensor:
    """Vectors divided by their norm; a zero vector stays zero."""
    return vectors / nonzero(norm(vectors)).unsqueeze(-1)


def nonzero(scale: Tensor) -> Tensor:
    """The scale, with 1 in place of 0, to divide by."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def pieces(shape: tuple[int, int], device: Device = "cpu") -> Iterator[slice]:
    """Rows of an ``(N, D)`` tensor in pieces of a size that suits the device, in order."""
    size = _PIECE if torch.device(device).type == "cpu" else _GPU_PIECE
    step = max(1, size // max(1, shape[1]))
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def in_pieces(function: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
    """Replace the vectors, row by row, by a function of theirs; in place."""
    for rows in pieces((vectors.shape[0], vectors[0].numel()), vectors.device):
        vectors[rows] = function(vectors[rows])
    return vectors


def random_vectors(
    shape: tuple[int, int],
    seed: int,
    name: str,
    stream: int,
    *,
    dtype: torch.dtype,
    device: Device,
    uniform: bool = False,
    rows: slice | None = None,
) -> Tensor:
    """Normal numbers, or uniform ones on (-1, 1), fixed by seed, name, stream and shape alone.

    Args:
        shape: ``(N, D)``.
        seed: Of the random numbers.
        name: Of the group.
        stream: Other numbers for another purpose.
        dtype: Of the result.
        device: Of the result.
        uniform: Whether to draw uniform numbers.
        rows: Only these; default all.
    """
    first, last = (0, shape[0]) if rows is None else (rows.start, rows.stop)
    result = torch.empty((last - first, shape[1]), dtype=dtype, device=device)
    for piece in pieces(shape):  # of the CPU, whatever the device
        low, high = max(first, piece.start), min(last, piece.stop)
        if low >= high:
            continue
        key = f"{seed}/{stream}/{name}" + (f"/{piece.start}" if piece.start else "")
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)
        numbers = torch.empty((piece.stop - piece.start, shape[1]), dtype=torch.float64)
        if uniform:
            numbers.uniform_(-1.0, 1.0, generator=generator)
        else:
            numbers.normal_(generator=generator)
        some = numbers[low - piece.start : high - piece.start]
        result[low - first : high - first] = some.to(device=device, dtype=dtype)
    return result
