"""Many one-dimensional RBF networks at once: loss, gradient descent, splitting matrices and ways to grow.

A network is f(x) = Σ w_k σ(θ_k·[x, 1]) with σ(z) = exp(−z²/2). Shapes: B networks (each with its own data), K
neurons, Q points. Everything is in closed form, so that thousands of networks train in one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_split.growers import Scheme


@dataclass(frozen=True)
class Data:
    """What the networks are fitted to: means over the points are Σ mass · (…)."""

    x: Tensor  # (B, Q)
    y: Tensor  # (B, Q)
    mass: Tensor  # (B, Q), sums to 1

    def at(self, index: Tensor | slice) -> Data:
        """That of some of the networks."""
        return Data(*(t[index] for t in (self.x, self.y, self.mass)))

    def repeat(self, times: int) -> Data:
        return Data(*(t.repeat(times, 1) for t in (self.x, self.y, self.mass)))


@dataclass(frozen=True)
class Networks:
    """B networks of up to K neurons; a dead neuron only fills the table."""

    theta: Tensor  # (B, K, 2): incoming weight and bias
    w: Tensor  # (B, K): outgoing weight, 0 for the dead
    alive: Tensor  # (B, K), bool
    free: Tensor  # (B, K), bool: trained; gradient boosting holds its earlier neurons

    @classmethod
    def of(cls, theta: Tensor, w: Tensor) -> Networks:
        alive = torch.ones_like(w, dtype=torch.bool)
        return cls(theta, w, alive, alive.clone())

    @property
    def width(self) -> Tensor:
        return self.alive.sum(1)  # (B,)

    def at(self, index: Tensor | slice) -> Networks:
        """Some of the networks."""
        return Networks(*(t[index] for t in (self.theta, self.w, self.alive, self.free)))

    def with_neuron(self, theta: Tensor, w: Tensor) -> Networks:
        """One more neuron: theta (B, 2), w (B,)."""
        more = torch.ones(len(w), 1, dtype=torch.bool)
        return Networks(
            torch.cat([self.theta, theta[:, None]], 1),
            torch.cat([self.w, w[:, None]], 1),
            torch.cat([self.alive, more], 1),
            torch.cat([self.free, more], 1),
        )


def concatenate(networks: Sequence[Networks]) -> Networks:
    """One batch of several, all of the same K."""
    return Networks(*(torch.cat([getattr(n, f) for n in networks]) for f in ("theta", "w", "alive", "free")))


def choose(networks: Sequence[Networks], index: Tensor) -> Networks:
    """From each place of the batch, the one of the alternatives that index (B,) names."""
    here = torch.arange(len(index))
    fields = ("theta", "w", "alive", "free")
    return Networks(*(torch.stack([getattr(n, f) for n in networks])[index, here] for f in fields))


def features(theta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """z and σ(z), both (B, K, Q)."""
    z = theta[..., :1] * x[:, None] + theta[..., 1:]
    return z, (-z * z / 2).exp()


def predict(networks: Networks, x: Tensor) -> Tensor:
    return torch.einsum("bk,bkq->bq", networks.w, features(networks.theta, x)[1])


def loss(networks: Networks, data: Data) -> Tensor:
    """Mean square errors, (B,)."""
    return ((predict(networks, data.x) - data.y) ** 2 * data.mass).sum(1)


def splitting_matrices(networks: Networks, data: Data) -> Tensor:
    """S_k = E[2 (f − y) w_k σ''(z_k) [x, 1][x, 1]ᵀ] of all neurons, (B, K, 2, 2); S2D, definition 2.1."""
    z, h = features(networks.theta, data.x)
    error = 2 * data.mass * (torch.einsum("bk,bkq->bq", networks.w, h) - data.y)
    c = error[:, None] * networks.w[..., None] * (z * z - 1) * h  # σ''(z) = (z² − 1) σ(z)
    inputs = torch.stack([data.x, torch.ones_like(data.x)], 1)
    return torch.einsum("bkq,biq,bjq->bkij", c, inputs, inputs)


class Descent(NamedTuple):
    """What gradient descent came to, and by which way."""

    networks: Networks
    history: Tensor  # (B, records): the losses before each ``every`` steps
    lowest: Tensor  # (B,): the lowest loss of all iterations, before the first and after the last included


def descend(
    networks: Networks, data: Data, steps: int, rate: float, every: int = 0, settle: bool = False
) -> Descent:
    """Gradient descent on all free weights.

    With ``settle`` a step that would raise a network's loss is not made, and its next is half as long; rates
    that were halved grow back to ``rate`` by a tenth a step.
    """
    slopes = _Slopes(networks, data)
    theta, w = networks.theta, networks.w
    losses, *turns = slopes(theta, w)
    lowest = losses
    rates = torch.full_like(losses, rate)
    records = []
    for step in range(steps):
        if every and step % every == 0:
            records.append(losses)
        ahead = theta - rates[:, None, None] * turns[0], w - rates[:, None] * turns[1]
        found, *after = slopes(*ahead)
        if settle:
            stay = ~(found <= losses)
            rates = torch.where(stay, rates / 2, (rates * 1.1).clamp(max=rate))
            ahead = torch.where(stay[:, None, None], theta, ahead[0]), torch.where(stay[:, None], w, ahead[1])
            after = [
                torch.where(stay.view(-1, *[1] * (t.ndim - 1)), t, a)
                for t, a in zip(turns, after, strict=True)
            ]
            found = torch.where(stay, losses, found)
        (theta, w), losses, turns = ahead, found, after
        lowest = torch.fmin(lowest, losses)  # also past a loss that is not a number
    history = torch.stack(records, 1) if records else torch.empty(len(w), 0)
    return Descent(replace(networks, theta=theta, w=w), history, lowest)


class _Slopes:
    """Losses (B,) and their gradients by theta and w of the free weights; keeps its large tables."""

    def __init__(self, networks: Networks, data: Data) -> None:
        shape = *networks.w.shape, data.x.shape[1]
        self._free = (networks.free & networks.alive).to(networks.w)
        self._x, self._y, self._mass = data.x[:, None], data.y[:, None], data.mass[:, None]
        self._inputs = torch.stack([data.x, torch.ones_like(data.x)], 2)
        self._z, self._h = (torch.empty(shape, dtype=networks.w.dtype) for _ in range(2))

    def __call__(self, theta: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, h = self._z, self._h
        torch.addcmul(theta[..., 1:], theta[..., :1], self._x, out=z)
        torch.mul(z, z, out=h).mul_(-0.5).exp_()
        error = torch.bmm(w[:, None], h).sub_(self._y)  # (B, 1, Q)
        weighed = error * self._mass
        losses = (error * weighed).sum((1, 2))
        weighed *= 2
        by_w = torch.bmm(h, weighed.mT)[..., 0] * self._free
        turn = torch.bmm(z.mul_(h), self._inputs * weighed.mT)  # of theta, but for −w: σ'(z) = −z σ(z)
        return losses, turn.mul_(-(w * self._free)[..., None]), by_w


def split(
    networks: Networks, data: Data, offered: Sequence[Scheme], step: float, most: int, tolerance: float = 0.0
) -> tuple[Networks, Tensor]:
    """Split in every network the neuron of the lowest scheme value along its extreme eigenvectors.

    A network whose values are all above ``-tolerance`` is splitting-stable and stays as it is; none grows
    over ``most`` neurons. Returns the networks and the lowest values, (B,).
    """
    values, vectors = torch.linalg.eigh(splitting_matrices(networks, data))
    ends = torch.stack([vectors[..., 0], vectors[..., -1]], -2)  # (B, K, 2, 2): v₋ and v₊ as rows
    coefficients = torch.tensor([s.coefficients for s in offered], dtype=values.dtype)
    value = values[..., [0, -1]] @ coefficients.T  # (B, K, schemes)
    added = torch.tensor([len(s.weights) - 1 for s in offered])
    allowed = networks.alive[..., None] & (networks.width[:, None, None] + added <= most)
    lowest, place = value.masked_fill(~allowed, torch.inf).flatten(1).min(1)
    neuron, scheme = place // len(offered), place % len(offered)
    here, m = torch.arange(len(place)), max(len(s.weights) for s in offered)
    weights = torch.zeros(len(offered), m, dtype=values.dtype)
    along = torch.zeros(len(offered), m, 2, dtype=values.dtype)
    for i, s in enumerate(offered):
        weights[i, : len(s.weights)] = torch.tensor(s.weights, dtype=values.dtype)
        along[i, : len(s.weights)] = torch.tensor(s.along, dtype=values.dtype)
    does = lowest < -tolerance
    shares = weights[scheme] * does[:, None]  # (B, m)
    shares[~does, 0] = 1.0
    moves = step * does[:, None, None] * (along[scheme] @ ends[here, neuron])
    return _offspring(networks, neuron, shares, moves), lowest


def split_at(networks: Networks, neuron: Tensor, directions: Tensor, step: float) -> Networks:
    """Two offspring of weight ½ of one neuron of each network, along ``directions`` (B, 2)."""
    moves = step * torch.stack([directions, -directions], 1)
    return _offspring(networks, neuron, torch.full_like(moves[..., 0], 0.5), moves)


def _offspring(networks: Networks, neuron: Tensor, shares: Tensor, moves: Tensor) -> Networks:
    """Replace a neuron (B,) by m with outgoing weights shares (B, m) · w at θ + moves (B, m, 2)."""
    here = torch.arange(len(neuron))
    theta = networks.theta[here, neuron, None] + moves
    w = networks.w[here, neuron, None] * shares
    alive = shares != 0
    first = [t.clone() for t in (networks.theta, networks.w)]
    first[0][here, neuron], first[1][here, neuron] = theta[:, 0], w[:, 0]
    grown = Networks(
        torch.cat([first[0], theta[:, 1:]], 1),
        torch.cat([first[1], w[:, 1:]], 1),
        torch.cat([networks.alive, alive[:, 1:]], 1),
        torch.cat([networks.free, alive[:, 1:]], 1),
    )
    order = (~grown.alive).long().argsort(dim=1, stable=True)[:, : int(grown.width.max())]  # the living first
    pick = order[..., None].expand(-1, -1, 2)
    rest = (grown.w.gather(1, order), grown.alive.gather(1, order), grown.free.gather(1, order))
    return Networks(grown.theta.gather(1, pick), *rest)


def new_neurons(networks: Networks, data: Data, theta: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Best outgoing weight within ±bound of new neurons theta (B, n, 2), and how far it lowers the loss."""
    error = data.mass * (data.y - predict(networks, data.x))
    h = features(theta, data.x)[1]
    slope = torch.einsum("bnq,bq->bn", h, error)
    curvature = torch.einsum("bnq,bq->bn", h * h, data.mass)
    w = (slope / curvature).clamp(-bound, bound)
    return w, 2 * slope * w - curvature * w * w
