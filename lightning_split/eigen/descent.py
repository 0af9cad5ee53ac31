"""The recipe of the papers: gradient descent on the Rayleigh quotient."""

from __future__ import annotations

import math
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
    check_options,
    check_problem,
    checked_product,
)
from lightning_split.krylov import nonzero, norm, random_vectors, unit


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
        check_options("RayleighDescent", num_steps=self.num_steps, tol=self.tol)
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
        check_problem("RayleighDescent", shapes, dtype)
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
            answers[name] = as_pairs(values, vectors, residuals, self.tol)
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
            products = checked_product(matvec, v)
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
