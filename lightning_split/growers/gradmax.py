"""GradMax: new neurons whose gradient is as large as it can be."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_split.context import GrowthContext
from lightning_split.growers.base import Draft, NotApplicableError, PredictingGrower
from lightning_split.growers.ghosts import Ghosts, Vectors, averaged, fresh_through
from lightning_split.growers.newneurons import Newcomers, NewcomersDraft
from lightning_split.layers import normalises
from lightning_split.splits import Part, weights_of
from lightning_split.stepsize import StepSize

__all__ = ["GradMax", "SingularPairs", "leading_pairs"]

_FORMED = 600  # rows or columns up to which a matrix may be formed; the decomposition costs their cube
Product = Callable[[Part, Vectors], Vectors]


@dataclass(frozen=True)
class GradMax(PredictingGrower):
    r"""Add new neurons whose incoming weights have the largest possible gradient.

    A neuron with incoming weights 0 sends nothing, whatever its outgoing weights u are. The gradient in its
    incoming weights is :math:`M^\top u` with :math:`M = \partial^2 L/\partial u\,\partial\theta`, so of all u
    of length ε the leading left singular vectors of M make it largest. For two linear layers M is the
    gradient of the weight matrix of a layer that would bypass the neurons between them. The new neurons make
    their first step at once: of length ε, down that gradient. The loss falls by about ε² times the singular
    value.

    Where BatchNorm or its like would undo the length of the incoming weights, they are as long as those of
    the other neurons. The activation must map 0 to 0.

    Args:
        iterations: Of the subspace iteration that finds the singular vectors, two products each. Small
            matrices are formed instead.
        first_step: ``False`` leaves the incoming weights at zero, as in the paper: the network computes what
            it computed at every ε. In torch the derivative of ReLU at 0 is 0, so that there such a neuron
            would never learn.

    Raises:
        ValueError: If ``iterations`` is below 1.

    References:
        Evci et al. (2022), GradMax: Growing neural networks using gradient information.
    """

    iterations: int = 2
    first_step: bool = True

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"GradMax needs at least one iteration, got {self.iterations}.")

    def check(self, context: GrowthContext) -> None:
        """Refuse networks where no activation maps 0 to 0; see :meth:`Grower.check`."""
        why = _sending(context)
        if len(why) == len(context.arch.groups):
            raise NotApplicableError(" ".join(_notes(why)))

    def draft(self, context: GrowthContext, step: StepSize) -> Draft:
        """As many new neurons as a group has, or as M has directions; see :meth:`PredictingGrower.draft`."""
        model = context.model
        groups = {group.name: group for group in context.arch.groups if group.outgoing}
        zero = {n: torch.zeros_like(weights_of(model, g, "incoming")) for n, g in groups.items()}
        through = {n: fresh_through(model, g, g.width, shared=True) for n, g in groups.items()}
        ghosts = Ghosts(context, zero, through)
        why = _sending(context)
        with ghosts.present():
            shapes = {n: (sum(b.size for b in g.outgoing), g.dim) for n, g in groups.items()}
            # Decompositions need single precision at least.
            like = {n: z.float() if z.dtype.itemsize < 4 else z for n, z in zero.items()}
            pairs = leading_pairs(
                lambda part, vectors: {
                    n: v.to(like[n]) for n, v in ghosts.mixed(context.batches, part, vectors).items()
                },
                shapes,
                like,
                self.iterations,
                context.seed,
            )
            if not self.first_step:
                left = {n: _padded(p.left, groups[n].width) for n, p in pairs.items()}
                moving = ghosts.mixed(context.batches, "outgoing", left, smooth=False)
                why |= {
                    name: "new neurons with zero incoming weights would never learn (the derivative of ReLU "
                    "at 0 is 0); use GradMax(first_step=True)"
                    for name, g in moving.items()
                    if not bool(g.any()) and bool(pairs[name].values.any())
                }
        pairs = {name: p for name, p in pairs.items() if name not in why}
        notes = _notes(why)
        if not pairs:
            raise NotApplicableError(" ".join(notes))
        found, growing = _first_steps(context, step, pairs)
        built = None
        if not self.first_step:
            still = {n: torch.zeros_like(theta) for n, theta in found.incoming.items()}
            kept = {n: through[n][: len(theta)] for n, theta in still.items()}
            built, growing = replace(found, incoming=still, through=kept), {n: still[n] for n in growing}
        return NewcomersDraft(context, found, "gradmax", built=built, growing=growing, notes=notes)


def _sending(context: GrowthContext) -> dict[str, str]:
    """Groups to which GradMax does not apply, with the reason."""
    groups = [group for group in context.arch.groups if group.outgoing]
    zero = {g.name: torch.zeros_like(weights_of(context.model, g, "incoming")[:1]) for g in groups}
    ghosts = Ghosts(context, zero)
    with ghosts.present():
        gradient = averaged(context, list(ghosts.outgoing_gradients(context.batches[:1])))
    sent = (
        "its neurons send something even with zero incoming weights (GradMax needs an activation that maps "
        "0 to 0)"
    )
    why = {group.name: "no layer multiplies its neurons by weights" for group in context.arch.groups}
    return {
        name: sent if name in gradient else reason
        for name, reason in why.items()
        if name not in gradient or bool(gradient[name].any())
    }


def _notes(why: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(f"GradMax left '{name}' alone: {reason}." for name, reason in why.items())


@dataclass(frozen=True)
class SingularPairs:
    """The largest singular values of a matrix, in falling order, with their vectors in rows."""

    values: Tensor  # (k,)
    left: Tensor  # (k, rows of the matrix)
    right: Tensor  # (k, its columns)


def leading_pairs(
    product: Product,
    shapes: Mapping[str, tuple[int, int]],
    like: Mapping[str, Tensor],
    iterations: int,
    seed: int,
) -> dict[str, SingularPairs]:
    """Leading singular pairs of the matrix M of every group, by products for all groups together.

    Args:
        product: ``product("incoming", V)`` gives ``M v`` for each row v of ``V[group]``, and
            ``product("outgoing", U)`` gives ``Mᵀ u``.
        shapes: ``(rows, columns)`` of each M.
        like: ``{group: (N, ...)}``: N vectors at once, and their dtype and device.
        iterations: Of the subspace iteration. A matrix for which that takes no more products is formed.
        seed: Of the first vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    tasks = {n: _task(shapes[n], like[n], iterations, generator) for n in shapes}
    asked = {name: next(task) for name, task in tasks.items()}
    found: dict[str, SingularPairs] = {}
    parts: tuple[tuple[Part, int], ...] = (("outgoing", 0), ("incoming", 1))
    while asked:
        for part, place in parts:
            mine = {name: vectors for name, (wanted, vectors) in asked.items() if wanted == part}
            if not mine:
                continue
            idle = {n: x.new_zeros(len(x), shapes[n][place]) for n, x in like.items()}
            result = product(part, idle | mine)
            for name in mine:
                answer = _continued(tasks[name], result[name])
                if isinstance(answer, SingularPairs):
                    found[name] = answer
                    del asked[name]
                else:
                    asked[name] = answer
    return {name: found[name] for name in shapes}


_Task = Generator[tuple[Part, Tensor], Tensor, SingularPairs]


def _continued(task: _Task, answer: Tensor) -> tuple[Part, Tensor] | SingularPairs:
    """What a task asks for next, or what it found."""
    try:
        return task.send(answer)
    except StopIteration as done:
        found: SingularPairs = done.value
        return found


def _task(shape: tuple[int, int], like: Tensor, iterations: int, generator: torch.Generator) -> _Task:
    """Asks for products with N vectors at a time, and returns the leading pairs."""
    rows, columns = shape
    n, k = len(like), min(len(like), rows, columns)
    fewer = min(rows, columns)
    if fewer <= _FORMED and -(-fewer // n) <= 2 * iterations + 1:
        part: Part = "outgoing" if rows <= columns else "incoming"
        slices = []
        for start in range(0, fewer, n):
            units = torch.eye(fewer, dtype=like.dtype, device=like.device)[start : start + n]
            slices.append((yield part, _padded(units, n))[: len(units)])
        matrix = torch.cat(slices) if part == "outgoing" else torch.cat(slices).T
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return SingularPairs(values[:k], left.T[:k], right[:k])
    start_vectors = torch.randn(k, columns, generator=generator, dtype=torch.float64)
    right = _orthonormal(start_vectors.to(like))
    for _ in range(iterations):
        left = _orthonormal((yield "incoming", _padded(right, n))[:k])
        right = _orthonormal((yield "outgoing", _padded(left, n))[:k])
    images = (yield "incoming", _padded(right, n))[:k]
    turn, values, left = torch.linalg.svd(images, full_matrices=False)
    return SingularPairs(values, left, turn.T @ right)


def _orthonormal(rows: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(rows.T).Q
    return basis.T


def _padded(rows: Tensor, n: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(n - len(rows), rows.shape[1])])


def _first_steps(
    context: GrowthContext, step: StepSize, pairs: Mapping[str, SingularPairs]
) -> tuple[Newcomers, Vectors]:
    """Incoming and outgoing weights after the first step, of the sign that gains more.

    Returns:
        The neurons, and that part of their incoming weights that goes with the step size.
    """
    model = context.model
    incoming, outgoing, growing = {}, {}, set()
    for name, found in pairs.items():
        group, k = context.arch.group(name), len(found.values)
        theta, u = (weights_of(model, group, part) for part in ("incoming", "outgoing"))
        if any(normalises(model.get_submodule(path)) for path in group.channelwise):
            length = theta.norm(dim=1).mean().expand(k)
        else:
            length = step.lengths(theta)[:k].to(theta)
            growing.add(name)
        incoming[name] = -length[:, None] * found.right
        outgoing[name] = step.lengths(u)[:k].to(u)[:, None] * found.left
    one, two = (_judged(context, incoming, outgoing, sign) for sign in (1, -1))
    parts: dict[str, Vectors] = {"incoming": {}, "through": {}, "outgoing": {}, "gain": {}}
    for name in pairs:
        other = two.gain[name] > one.gain[name]
        for part, found_part in parts.items():
            a, b = getattr(one, part)[name], getattr(two, part)[name]
            found_part[name] = torch.where(other.view(-1, *[1] * (a.ndim - 1)), b, a)
    both = Newcomers(**parts)
    return both, {name: both.incoming[name] for name in growing}


def _judged(context: GrowthContext, incoming: Vectors, outgoing: Vectors, sign: int) -> Newcomers:
    """By how much the loss falls, to first order in the outgoing weights."""
    incoming = {name: sign * theta for name, theta in incoming.items()}
    outgoing = {name: sign * u for name, u in outgoing.items()}
    fresh = {
        n: fresh_through(context.model, context.arch.group(n), len(theta), shared=True)
        for n, theta in incoming.items()
    }
    ghosts = Ghosts(context, incoming, fresh)
    with ghosts.present():
        ghosts.calibrate(context.batches)
        through = ghosts.through()
        gradient = averaged(context, list(ghosts.outgoing_gradients(context.batches)))
    gain = {name: -(g * outgoing[name]).sum(1) for name, g in gradient.items()}
    return Newcomers(incoming, through, outgoing, gain)
