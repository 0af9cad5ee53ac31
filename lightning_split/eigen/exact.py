"""Dense matrices, decomposed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_split.eigen.base import (
    Dense,
    Device,
    Eigenpairs,
    EigenSolver,
    Matvec,
    Shapes,
    as_pairs,
    check_problem,
    check_product,
    checked_product,
)
from lightning_split.krylov import extreme_pairs


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
        check_problem("Exact", shapes, dtype)
        if dense is None:
            dense = _densify(matvec, shapes, dtype, device).__getitem__
        answers = {}
        like = torch.empty(0, dtype=dtype, device=device)
        for name, (num_neurons, dim) in shapes.items():
            matrices = dense(name)
            check_product(name, matrices, (num_neurons, dim, dim))
            answers[name] = as_pairs(*extreme_pairs(matrices, like), tol=1e-2)
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
        for name, product in checked_product(matvec, units).items():
            matrices[name][..., column : column + 1] = product.unsqueeze(-1)
    return matrices
