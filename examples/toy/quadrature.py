"""A few weighted points with the means of many."""

from __future__ import annotations

import torch
from torch import Tensor


def gauss_rule(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Nodes and masses with the means of the points x (N,) for every polynomial of degree below 2·count.

    Gauss quadrature of the points' own distribution, by Lanczos with full reorthogonalisation (Golub and
    Welsch 1969). For networks that are smooth on the scale of the nodes it replaces the points.
    """
    scale = x.abs().max()
    basis = torch.full((1, len(x)), len(x) ** -0.5, dtype=x.dtype)
    tridiagonal = torch.zeros(count, count, dtype=x.dtype)
    for k in range(count):
        u = x / scale * basis[-1]
        tridiagonal[k, k] = u @ basis[-1]
        for _ in range(2):
            u = u - basis.T @ (basis @ u)
        if k + 1 < count:
            tridiagonal[k, k + 1] = tridiagonal[k + 1, k] = u.norm()
            basis = torch.cat([basis, (u / u.norm())[None]])
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    return nodes * scale, vectors[0] ** 2
