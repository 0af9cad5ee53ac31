"""Growing by folding: a new ReLU unit where the network decides a typical instance wrongly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_split.architecture import ChannelGroup
from lightning_split.context import GrowthContext
from lightning_split.curvature import check_loss
from lightning_split.growers.base import Draft, NotApplicableError, PredictingGrower
from lightning_split.growers.ghosts import Ghosts, Vectors, averaged
from lightning_split.growers.newneurons import Newcomers, NewcomersDraft, downhill
from lightning_split.layers import Port, port_kind, rule_for
from lightning_split.marking import Watcher, watched
from lightning_split.measuring import batch_size, undisturbed
from lightning_split.splits import weights_of
from lightning_split.stepsize import StepSize

__all__ = ["Folding", "Instance", "fold_point", "steepest_turn", "typical_instances"]

_TURN_STARTS = 2  # random directions, beside the given ones and their opposites
_TURNS = 4  # steps of ascent from each
_CLOSE = 0.05  # relative rounding of a layer in 16 bits, and more


@dataclass(frozen=True)
class Folding(PredictingGrower):
    """Add ReLU units that fold the decision boundary nearest a typical mis-predicted instance.

    For multilayer perceptrons with ReLU units. What a layer reads is clustered by k-means, each instance
    weighted by its loss; the instance in the middle of each cluster is typical, and the cluster of highest
    mean loss comes first. Around an instance the network is linear, and so is its decision boundary: between
    the class that it predicts and the one that the loss asks for, or where a single output is 0. The fold of
    the new unit is a plane through the closest point of that boundary. Its outgoing weights make a first step
    of length ε down the gradient, as in :class:`NewNeurons`.

    Args:
        clusters: How many typical instances; each is the reason for one new unit per layer.
        samples: At most so many instances of the estimation batches are looked at, one pass each.
        boundary: ``False`` puts the fold through the instance itself, which is for regression.
        direction: How the fold turns about its point. ``"gradient"``: the way in which the outgoing weights
            have the largest gradient (GradMax's criterion); found by ascent from several directions, which
            costs about 40 training steps per batch. ``"instance"``: along the decision boundary, and active
            on the side of the instance; costs nothing more. Measured in docs/toys.md.

    Raises:
        ValueError: If an argument is below 1, or the direction is unknown.

    References:
        Kang (2024), Growing networks by folding on typical instances (slides).
    """

    clusters: int = 8
    samples: int = 256
    boundary: bool = True
    direction: Literal["gradient", "instance"] = "gradient"

    def __post_init__(self) -> None:
        for name in ("clusters", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"Folding needs {name} of at least 1, got {getattr(self, name)}.")
        if self.direction not in ("gradient", "instance"):
            raise ValueError(f"Folding turns to 'gradient' or to 'instance', got {self.direction!r}.")

    def check(self, context: GrowthContext) -> None:
        """Refuse networks without a layer that folds; see :meth:`Grower.check`."""
        _foldable(context)

    def draft(self, context: GrowthContext, step: StepSize) -> Draft:
        """Up to one new unit per typical instance and layer; see :meth:`PredictingGrower.draft`."""
        groups, notes = _foldable(context)
        watching = {group.producers[0]: group.name for group in groups}
        seen = [_instance(context, watching, one) for one in _single(context, self.samples)]
        incoming, points = {}, {}
        for group in groups:
            # Where all units are silent the network is constant: no boundary, nothing to fold.
            found = [one[group.name] for one in seen if group.name in one]
            instances = [instance for instance in found if bool(instance.normal.any())]
            if not instances:
                continue
            typical = typical_instances(instances, min(self.clusters, group.width), context.seed)
            folds = [fold_point(one) if self.boundary else one.point for one in typical]
            rows = [_unit(context, group, *both) for both in zip(typical, folds, strict=True)]
            incoming[group.name] = torch.stack(rows).cpu()
            points[group.name] = torch.stack(folds).to(incoming[group.name])
        # each process has looked at its own instances
        incoming, points = context.ranks.agree((incoming, points))
        if incoming:
            if self.direction == "gradient":
                incoming = steepest_turn(context, incoming, points)
            units = downhill(context, incoming, step)
        else:
            units = Newcomers({}, {}, {}, {})
            notes = (*notes, "Folding found no instance with a decision boundary.")
        return NewcomersDraft(context, units, "fold", notes=notes)


@dataclass(frozen=True)
class Instance:
    """One sample as a layer reads it, and the linear piece of the network around it."""

    point: Tensor  # (F,)
    loss: float
    value: float  # of the function that is 0 on the decision boundary
    normal: Tensor  # (F,) its gradient


def fold_point(instance: Instance) -> Tensor:
    """The point of the instance's decision boundary that is closest to it, ``(F,)``."""
    n = instance.normal
    return instance.point - instance.value * n / (n @ n)


def typical_instances(instances: list[Instance], count: int, seed: int) -> list[Instance]:
    """The instance closest to the centre of each cluster, clusters of high mean loss first.

    Raises:
        ImportError: If scikit-learn is missing.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError(
            "Folding clusters instances with scikit-learn, which is not installed: pip install scikit-learn."
        ) from error
    points = torch.stack([one.point for one in instances]).double().cpu()
    losses = torch.tensor([one.loss for one in instances], dtype=torch.float64)
    weights = (losses - losses.min().clamp_max(0)).clamp_min(1e-12 * float(losses.abs().max()) + 1e-30)
    distinct = len(torch.unique(points, dim=0))
    means = KMeans(min(count, distinct), n_init=10, random_state=seed % 2**32)
    label = torch.from_numpy(means.fit_predict(points.numpy(), sample_weight=weights.numpy())).long()
    centres = torch.from_numpy(means.cluster_centers_)
    found = []
    for k in range(len(centres)):
        members = (label == k).nonzero().flatten()
        if len(members):
            nearest = members[(points[members] - centres[k]).norm(dim=1).argmin()]
            found.append((float(losses[members].mean()), int(nearest)))
    return [instances[i] for _, i in sorted(found, reverse=True)]


def _unit(context: GrowthContext, group: ChannelGroup, instance: Instance, fold: Tensor) -> Tensor:
    """Incoming weights and bias of the unit: as long as those of its neighbours, zero at the fold."""
    theta = weights_of(context.model, group, "incoming")
    normal = instance.normal / instance.normal.norm()
    if instance.value < 0:
        normal = -normal  # the instance is on the active side
    scale = theta[:, :-1].norm(dim=1).mean()
    scale = scale if bool(scale > 0) else torch.ones_like(scale)
    return scale * torch.cat([normal, -(normal @ fold)[None]]).to(theta)


def steepest_turn(context: GrowthContext, incoming: Vectors, points: Vectors) -> Vectors:
    r"""Turn units about points of their folds to where their outgoing weights have the largest gradient.

    With unit normals n, the gradient is :math:`g(n) = \langle e, \mathrm{relu}(n^\top(x - p))\rangle` over
    the samples, e the gradient of the loss in what the next layer makes. ``n <- normalised(dg/dn · g)``
    climbs its norm as the power method does, piece by piece; it starts from the given directions, their
    opposites and two random ones, and the best unit seen is kept.

    Args:
        context: The network and its batches.
        incoming: ``{group: (M, F + 1)}``, weights and bias of the units, the same on all processes.
        points: ``{group: (M, F)}``, where the units stay zero.

    Returns:
        Units of the same lengths.
    """
    generator = torch.Generator().manual_seed(context.seed)
    lengths = {name: unit[:, :-1].norm(dim=1, keepdim=True) for name, unit in incoming.items()}

    def through(normals: Vectors) -> Vectors:
        found = {}
        for name, free in normals.items():
            normal = lengths[name] * F.normalize(free, dim=1)
            found[name] = torch.cat([normal, -(normal * points[name]).sum(1, keepdim=True)], 1)
        return found

    starts = [{n: sign * unit[:, :-1] for n, unit in incoming.items()} for sign in (1, -1)]
    starts += [
        {n: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for n, p in points.items()}
        for _ in range(_TURN_STARTS)
    ]
    best = dict(incoming)
    record = {name: unit.new_full((len(unit),), -1.0) for name, unit in incoming.items()}
    for normals in starts:
        for turn in range(_TURNS + 1):
            units = through(normals)
            ghosts = Ghosts(context, units)
            with ghosts.present():
                ascent = averaged(context, list(ghosts.outgoing_gradients(context.batches)))
                slopes = {}
                if turn < _TURNS:
                    slopes = ghosts.mixed(context.batches, "outgoing", ascent, smooth=False)
            for name, unit in units.items():
                size = ascent[name].norm(dim=1).to(record[name])
                better = size > record[name]
                best[name] = torch.where(better[:, None], unit, best[name])
                record[name] = torch.where(better, size, record[name])
                if slopes:
                    slope = slopes[name].to(unit)
                    moved = slope[:, :-1] - slope[:, -1:] * points[name]  # the bias follows the normal
                    normals[name] = torch.where(moved.norm(dim=1, keepdim=True) > 0, moved, normals[name])
    return best


# what the network does with an instance --------------------------------------------------------------


@dataclass
class _Seen(Watcher):
    """What some layers read, cut loose from what was before if asked to, and what was made last."""

    layers: set[str]
    cut: bool
    reads: dict[str, Tensor] = field(default_factory=dict)
    made_by: dict[str, Tensor] = field(default_factory=dict)
    output: Tensor | None = None

    def read(self, path: str, port: Port, x: Tensor, axis: int) -> Tensor:
        if path not in self.layers:
            return x
        if self.cut:
            x = x + torch.zeros_like(x, requires_grad=True)
        self.reads[path] = x
        return x

    def made(self, path: str, port: Port, x: Tensor, axis: int) -> Tensor:
        if port_kind(port) == "out":
            self.output = x
            if path in self.layers:
                self.made_by[path] = x.detach().clone()  # the next activation may work in place
        return x


def _single(context: GrowthContext, count: int) -> Iterator[Any]:
    """Single samples, spread evenly over the batches."""
    sizes = [batch_size(batch) for batch in context.batches]
    places = [(number, i) for number, size in enumerate(sizes) for i in range(size)]
    stride = -(-len(places) // count)
    for number, i in places[::stride]:
        size = sizes[number]

        def one(t: Tensor, i: int = i, size: int = size) -> Tensor:
            return t[i : i + 1] if t.ndim and t.shape[0] == size else t

        yield tree_map_only(Tensor, one, context.batches[number])


def _instance(context: GrowthContext, watching: dict[str, str], sample: Any) -> dict[str, Instance]:
    """The sample as each layer reads it."""
    seen = _Seen(set(watching), cut=True)
    with undisturbed(context.model, train=False, seed=context.seed), watched(context.model, seen):
        try:
            loss = context.loss_fn(context.model, sample)
        except Exception as error:
            # Whatever the user's function raised is the reason.
            raise ValueError(
                f"Folding looks at single samples, and loss_fn failed on a batch of one: {error} "
                "Let the batch hold all that belongs to its samples."
            ) from error
        check_loss(loss, 0)
        assert seen.output is not None
        output = seen.output
        slope = _gradients(loss, [output])[0]
        logits = output.reshape(-1)
        if len(logits) == 1:
            margin = logits[0]
        else:
            predicted = int(logits.argmax())
            asked = predicted if slope is None else int(slope.reshape(-1).argmin())
            if asked == predicted:
                asked = int(logits.topk(2).indices[1])
            margin = logits[asked] - logits[predicted]
        reads = list(seen.reads.items())
        normals = _gradients(margin, [x for _, x in reads])
        return {
            watching[path]: Instance(
                x.detach().reshape(-1),
                float(loss.detach()),
                float(margin.detach()),
                torch.zeros_like(x).reshape(-1) if normal is None else normal.reshape(-1),
            )
            for (path, x), normal in zip(reads, normals, strict=True)
        }


def _gradients(value: Tensor, tensors: list[Tensor]) -> Sequence[Tensor | None]:
    return torch.autograd.grad(value, tensors, retain_graph=True, allow_unused=True)


def _foldable(context: GrowthContext) -> tuple[list[ChannelGroup], tuple[str, ...]]:
    """The groups that fold, and sentences about the others.

    Raises:
        NotApplicableError: If there is none.
    """
    why = context.ranks.agree({group.name: _why_not(context, group) for group in context.arch.groups})
    notes = tuple(f"Folding left '{name}' alone: {reason}." for name, reason in why.items() if reason)
    groups = [group for group in context.arch.groups if not why[group.name]]
    if not groups:
        raise NotApplicableError(" ".join(notes))
    return groups, notes


def _why_not(context: GrowthContext, group: ChannelGroup) -> str | None:
    """Why folding does not apply to a group, or ``None`` if it does."""
    linear = len(group.theta) == 2 and len(group.producers) == 1 and group.theta[1].size == 1
    if not linear or rule_for(context.model.get_submodule(group.producers[0])) is None:
        return "its neurons are not those of one linear layer with a bias"
    if group.through:
        return f"'{group.through[0].module}' stands between its neurons and the next layer"
    producer, consumers = group.producers[0], set(group.consumers)
    seen = _Seen({producer, *consumers}, cut=False)
    with undisturbed(context.model, train=False, seed=context.seed), watched(context.model, seen):
        context.loss_fn(context.model, context.batches[0])
    inputs, made = seen.reads.get(producer), seen.made_by.get(producer)
    if inputs is None or made is None or inputs.ndim != 2 or group.theta[0].size != inputs.shape[1]:
        return "it is not a linear layer that reads a table of samples and features (folding is for MLPs)"
    theta = weights_of(context.model, group, "incoming").to(inputs.device, torch.float32)
    expected = inputs.float() @ theta[:, :-1].T + theta[:, -1]
    if made.shape == expected.shape and (made - expected).norm() > _CLOSE * expected.norm():
        return "the code does not add its bias"
    read = seen.reads.get(group.consumers[0])
    if read is None or read.shape != made.shape or not _folds(made.detach(), read.detach()):
        return "its units are no ReLU units, so they have no fold"
    return None


def _folds(before: Tensor, after: Tensor) -> bool:
    """Whether an activation is linear on both sides of 0, with different slopes."""
    slopes = []
    for side in (before > 0, before < 0):
        x, y = before[side], after[side]
        if not len(x):
            return True  # nothing is to be seen on that side
        slope = (x @ y) / (x @ x)
        if not torch.allclose(y, slope * x, rtol=1e-3, atol=1e-6 * float(x.abs().max())):
            return False
        slopes.append(float(slope))
    return slopes[0] != slopes[1]
