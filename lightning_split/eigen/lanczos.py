"""Krylov spaces for all neurons at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_split.eigen.base import (
    Dense,
    Device,
    Eigenpairs,
    EigenSolver,
    Matvec,
    Shapes,
    as_pairs,
    check_options,
    check_problem,
    checked_product,
)
from lightning_split.krylov import Columns, KrylovSpace


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
        check_options("Lanczos", num_products=self.num_products, tol=self.tol)
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
        check_problem("Lanczos", shapes, dtype)
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
            products = checked_product(matvec, {name: space.last() for name, space in spaces.items()})
            for name, space in spaces.items():
                space.extend(products.pop(name))
        return {name: as_pairs(*spaces.pop(name).extremes(), self.tol) for name in shapes}
