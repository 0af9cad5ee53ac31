"""Many 2-K-2 networks of ReLU units at once: training in closed form, and the geometry of folding.

Shapes: B networks, K units, N points in the plane. A network is logits = W relu(A x + a) + c.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_split.growers.folding import Instance, fold_point, typical_instances


@dataclass(frozen=True)
class Networks:
    A: Tensor  # (B, K, 2)
    a: Tensor  # (B, K)
    W: Tensor  # (B, 2, K)
    c: Tensor  # (B, 2)

    @classmethod
    def draw(cls, count: int, units: int, generator: torch.Generator) -> Networks:
        """As ``nn.Linear`` starts them."""

        def uniform(fan_in: int, *shape: int) -> Tensor:
            return (torch.rand(count, *shape, generator=generator) * 2 - 1) / math.sqrt(fan_in)

        return cls(uniform(2, units, 2), uniform(2, units), uniform(units, 2, units), uniform(units, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pre-activations, activations (both (B, K, N)) and logits (B, 2, N) at x (N, 2)."""
        z = self.A @ x.T + self.a[..., None]
        h = z.clamp_min(0)
        return z, h, self.W @ h + self.c[..., None]

    def with_unit(self, direction: Tensor, fold: Tensor) -> Networks:
        """A silent unit more (outgoing weight 0), as long as the others; its fold passes through ``fold``."""
        incoming = direction * self.A.norm(dim=2).mean(1, keepdim=True)
        return Networks(
            torch.cat([self.A, incoming[:, None]], 1),
            torch.cat([self.a, -(incoming * fold).sum(1, keepdim=True)], 1),
            torch.cat([self.W, torch.zeros(len(self.a), 2, 1)], 2),
            self.c,
        )

    def at(self, index: int) -> Networks:
        """One of them, as a batch of one."""
        return Networks(*(t[index : index + 1] for t in vars(self).values()))

    def module(self, index: int) -> nn.Sequential:
        """One of them as a PyTorch module."""
        model = nn.Sequential(nn.Linear(2, self.a.shape[1]), nn.ReLU(), nn.Linear(self.a.shape[1], 2))
        tensors = (self.A, self.a, self.W, self.c)
        for parameter, values in zip(model.parameters(), tensors, strict=True):
            parameter.data.copy_(values[index])
        return model


def train(networks: Networks, x: Tensor, y: Tensor, steps: int, rate: float) -> Networks:
    """Adam on the cross-entropy of all points."""
    wanted = F.one_hot(y, 2).T.float()
    values = [t.clone() for t in (networks.A, networks.a, networks.W, networks.c)]
    first = [torch.zeros_like(t) for t in values]
    second = [torch.zeros_like(t) for t in values]
    for step in range(1, steps + 1):
        z, h, logits = Networks(*values).forward(x)
        error = (torch.softmax(logits, 1) - wanted) / len(x)
        back = (values[2].mT @ error) * (z > 0)
        for i, slope in enumerate((back @ x, back.sum(2), error @ h.mT, error.sum(2))):
            first[i].lerp_(slope, 0.1)
            second[i].mul_(0.999).addcmul_(slope, slope, value=0.001)
            scale = (second[i] / (1 - 0.999**step)).sqrt_().add_(1e-8)
            values[i].addcdiv_(first[i], scale, value=-rate / (1 - 0.9**step))
    return Networks(*values)


def accuracy(networks: Networks, x: Tensor, y: Tensor) -> Tensor:
    return (networks.forward(x)[2].argmax(1) == y).double().mean(1)


def typical_folds(networks: Networks, x: Tensor, y: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """The typical mis-predicted instance of every network and its fold point, both (B, 2)."""
    z, _, logits = networks.forward(x)
    margin = logits[:, 1] - logits[:, 0]  # (B, N); 0 on the decision boundary
    outgoing = networks.W[:, 1] - networks.W[:, 0]
    normals = torch.einsum("bk,bkn,bki->bni", outgoing, (z > 0).float(), networks.A)
    losses = F.cross_entropy(logits.movedim(1, 2).flatten(0, 1), y.repeat(len(z)), reduction="none").view(
        len(z), -1
    )
    instances, folds = [], []
    for b in range(len(z)):
        seen = [Instance(x[n].double(), float(losses[b, n]), float(margin[b, n]), normals[b, n].double())
                for n in range(len(x)) if bool(normals[b, n].any())]  # fmt: skip
        if seen:
            typical = typical_instances(seen, clusters, seed=0)[0]
            instances.append(typical.point)
            folds.append(fold_point(typical))
        else:  # a network that is constant has no boundary; its unit will fold at the middle of the points
            instances.append(x[losses[b].argmax()].double())
            folds.append(x.double().mean(0))
    return torch.stack(instances).float(), torch.stack(folds).float()


def best_directions(
    networks: Networks, x: Tensor, y: Tensor, instance: Tensor, fold: Tensor
) -> tuple[Tensor, Tensor]:
    """Directions (B, 2) of a new unit with this fold point that the slides' maximisations choose, of 72.

    The first has the largest gradient of the outgoing weights (GradMax applied to the incoming ones). The
    second has, among those with at least half as large a gradient, the best alignment: the cosine between
    what a gradient step changes in the pre-activations of the instance, and what going from the fold point to
    the instance does.
    """
    angles = torch.arange(72) * (2 * math.pi / 72)
    w = torch.stack([angles.cos(), angles.sin()], 1)  # (M, 2)
    z, _, logits = networks.forward(x)
    error = (torch.softmax(logits, 1) - F.one_hot(y, 2).T) / len(x)
    reached = (x @ w.T)[None] - (fold @ w.T)[:, None]  # (B, N, M)
    slope = error @ reached.clamp_min(0)  # (B, 2, M), of the outgoing weights
    size = slope.norm(dim=1)
    # The incoming weights' own gradient, once the outgoing weights have made their first step down the slope:
    outgoing = -slope / size[:, None].clamp_min(1e-12)
    change = torch.einsum("bnm,ni->bmi", torch.einsum("bcm,bcn->bnm", outgoing, error) * (reached > 0), x)
    new = (
        -(change * instance[:, None]).sum(2),
        networks.A.norm(dim=2).mean(1, keepdim=True) * ((instance - fold) @ w.T),
    )
    turn = ((networks.W.mT @ error) * (z > 0)) @ x  # (B, K, 2), of the old units
    old = -(turn * instance[:, None]).sum(2), (networks.A * (instance - fold)[:, None]).sum(2)
    dot = (old[0] * old[1]).sum(1, keepdim=True) + new[0] * new[1]
    lengths = [((o * o).sum(1, keepdim=True) + n * n).sqrt() for o, n in zip(old, new, strict=True)]
    cosine = dot / (lengths[0] * lengths[1]).clamp_min(1e-12)
    strong = size >= size.amax(1, keepdim=True) / 2
    return w[size.argmax(1)], w[cosine.masked_fill(~strong, -2).argmax(1)]


def gradient_sizes(network: Networks, x: Tensor, y: Tensor, fold: Tensor, directions: Tensor) -> Tensor:
    """Norm (M,) of the outgoing weights' gradient of new units of one network that fold at a point (2,)."""
    error = (torch.softmax(network.forward(x)[2], 1)[0] - F.one_hot(y, 2).T) / len(x)
    return (error @ ((x - fold) @ directions.T).clamp_min(0)).norm(dim=0)
