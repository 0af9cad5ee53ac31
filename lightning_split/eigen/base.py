"""What a solver is, and what all of them check."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_split.krylov import in_pieces, pieces, unit

__all__ = [
    "Dense",
    "Device",
    "EigenSolver",
    "Eigenpairs",
    "Matvec",
    "Shapes",
    "as_pairs",
    "check_options",
    "check_problem",
    "check_product",
    "checked_product",
]

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


def as_pairs(values: Tensor, vectors: Tensor, residuals: Tensor, tol: float) -> Eigenpairs:
    """Record with unit vectors of definite sign, and what has converged."""
    vectors = in_pieces(_directed, vectors)
    scale = values.abs().amax(-1, keepdim=True)
    tiny = torch.finfo(values.dtype).tiny
    return Eigenpairs(values, vectors, residuals, residuals <= tol * scale + tiny)


def _directed(vectors: Tensor) -> Tensor:
    vectors = unit(vectors)
    largest = vectors.gather(-1, vectors.abs().argmax(-1, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors)


def checked_product(matvec: Matvec, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One checked product of all groups, without its graph."""
    products = matvec(vectors)
    checked = {}
    for name, vector in vectors.items():
        if name not in products:
            raise ValueError(f"matvec returned no product for group '{name}'; return every group.")
        product = products[name].detach().to(device=vector.device, dtype=vector.dtype)
        check_product(name, product, tuple(vector.shape))
        if product.untyped_storage().data_ptr() == vector.untyped_storage().data_ptr():
            product = product.clone()
        product = product.contiguous()
        checked[name] = product
    return checked


def check_product(name: str, product: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a product of another shape, or one that is not finite, naming the group."""
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


def check_problem(solver: str, shapes: Shapes, dtype: torch.dtype) -> None:
    """Refuse low precision, and groups without neurons or weights."""
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


def check_options(solver: str, *, tol: float, **counts: int) -> None:
    """Refuse counts below one and a negative tolerance."""
    for option, count in counts.items():
        if count < 1:
            raise ValueError(f"{solver} needs {option} >= 1, got {count!r}.")
    if not tol >= 0.0:
        raise ValueError(f"{solver} needs tol >= 0, got {tol!r}.")
