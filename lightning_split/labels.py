"""Labels: beside every activation, a tensor that names the neuron each element belongs to.

While a :class:`LabelMode` is active, every operator that runs on labelled tensors also says what becomes
of the labels (:mod:`lightning_split.operators`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from lightning_split.constants import Constants, storage_key
from lightning_split.loose import Guesses
from lightning_split.neurons import Ids, NeuronTable
from lightning_split.pairs import Lines, Pair

if TYPE_CHECKING:
    from lightning_split.tally import Tally

__all__ = [
    "Handler",
    "Held",
    "LabelMode",
    "stored_once",
    "tensors_of",
    "written_by",
]


class BookKeeping:
    """Inside, operators on labels pass by all modes; they are our own business, and many."""

    def __enter__(self) -> None:
        self._guards = torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction()
        for guard in self._guards:
            guard.__enter__()

    def __exit__(self, *error: Any) -> None:
        for guard in reversed(self._guards):
            guard.__exit__(*error)


class LabelMode(TorchDispatchMode):
    """Carries labels beside the activations of one run of a model.

    Args:
        table: Receives ties, fusions and barriers.
        where: Says where in the model execution stands; used in the reasons.
        handler_of: What each operator does to labels (:func:`lightning_split.operators.handler_of`).
        follow: Is shown what each operator returns.
        label: ``label(owner, axis, size)`` gives the ids along an axis of a loose tensor.
    """

    def __init__(
        self,
        table: NeuronTable,
        where: Callable[[], str],
        handler_of: Callable[[Any], Handler],
        follow: Callable[[Any], None] = lambda out: None,
        label: Callable[[Owner, int, int], Tensor | None] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.table = table
        self.suspended = 0  # > 0 while labels are not followed: in a layer's own forward pass
        self.inside = 0  # > 0 while weights may be used: in a layer with a rule, followed or not
        self.chunks = 0  # > 0 while the user's code asks for a number of pieces, not for pieces of a size
        self.lines, self.pairs = Lines(), list[Pair]()
        self.owned: dict[int, Held] = {}  # id of a tensor that has neurons on an axis -> whose it is
        self.open_dim: int | None = None  # where a reshape that runs was given -1: this dimension may grow
        self.parameters: dict[int | None, nn.Parameter] = {}  # by their memory
        self.kept: list[
            tuple[nn.Parameter, Tensor]
        ] = []  # those that were written to, with their values before
        self.leaked: dict[Owner, str] = {}  # what was used outside of its layer, and by what
        self.borrowed: set[Owner] = set()  # the same, of tensors whose guesses tell what became of them
        self.place = where
        self.tally: Tally | None = None  # counts what is multiplied
        self.guesses = Guesses(self, label or (lambda owner, axis, size: self.phantoms(size)))
        self._handler_of = handler_of
        self._follow = follow
        self.constants = Constants()
        self.claimed: list[Tensor] = []  # blank memory that a handler has just given to the neurons written
        self._labels: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._weights: WeakIdKeyDictionary = WeakIdKeyDictionary()

    # labels of tensors ------------------------------------------------------------------------

    def get(self, tensor: Tensor) -> Tensor | None:
        """The labels of a tensor (same shape), or ``None`` if it carries no neuron."""
        found: Tensor | None = self._labels.get(tensor)
        return found

    def set(self, tensor: Tensor, labels: Tensor | None) -> None:
        """Give a tensor its labels."""
        if labels is None or not bool((stored_once(labels) >= 0).any()):
            self._labels.pop(tensor, None)
        else:
            self._labels[tensor] = _compressed(labels, tensor.shape)

    def varying(self, labels: Tensor) -> list[bool]:
        """For each dimension, whether different neurons lie along it."""
        core = self.table.runs(stored_once(labels))
        return [core.shape[d] > 1 and bool((core != core.narrow(d, 0, 1)).any()) for d in range(core.ndim)]

    def ids(self, labels: Tensor) -> list[int]:
        """The distinct ids in a label tensor."""
        return [i for i in torch.unique(stored_once(labels)).tolist() if i >= 0]

    def where(self) -> str:
        """Where execution stands, and on what, as the end of a reason."""
        return f"{self.place()}{self.guesses.subject}"

    def phantoms(self, count: int) -> Tensor:
        """Labels of elements that belong to whichever neurons they meet, or to none."""
        return torch.from_numpy(self.table.mint(count))

    def bar(self, tensors: Iterable[Tensor], why: str) -> None:
        """Leave alone all neurons in these tensors; what only may belong to neurons does not."""
        for tensor in tensors:
            labels = self.get(tensor)
            if labels is not None:
                self.table.bar(self.ids(labels), f"{why}{self.where()}")
            else:
                self.guesses.fix(tensor, why)

    def unify(self, a: Tensor, b: Tensor, why: str, *, both: bool = False) -> Tensor:
        """Tie labels that meet element by element, and return the labels of the result.

        Args:
            a: Labels.
            b: Others.
            why: What brings them together.
            both: There is no result; each tensor keeps its own.
        """
        shape = torch.broadcast_shapes(a.shape, b.shape)
        a, b = a.expand(shape), b.expand(shape)
        vary = [x or y for x, y in zip(self.varying(a), self.varying(b), strict=True)]
        for d in range(len(shape)):
            if not vary[d] and shape[d] > 1:
                a, b = a.narrow(d, 0, 1), b.narrow(d, 0, 1)
        ra, rb = self.table.runs(a), self.table.runs(b)
        if not torch.equal(ra, rb):
            fa, fb = ra.flatten().numpy(), rb.flatten().numpy()
            alone = (fa >= 0) != (fb >= 0)
            self.table.bar(
                np.unique(np.maximum(fa, fb)[alone]).tolist(),
                f"{why} meets values that belong to no neuron{self.where()}",
            )
            known = (fa >= 0) & (fb >= 0) & (fa != fb)
            self._tie_pairs(np.unique(np.stack([fa[known], fb[known]]), axis=1), why, both)
        return torch.where(ra >= 0, ra, rb).expand(shape)

    def multiply(self, labels: Sequence[Tensor], why: str, power: float | None) -> bool:
        """Let the neurons of two factors meet one by one, their products to be summed.

        Args:
            labels: Of each factor along the axis that is summed over, ``(n,)``; both are linear in the
                weights that make them.
            why: Why they are left alone, if it turns out that they must be.
            power: Of n by which the sum is divided, if that is known.

        Returns:
            Whether they can: if none meets itself.
        """
        a, b = map(self.table.runs, labels)
        known = bool((a >= 0).all()) and bool((b >= 0).all())
        if not known or bool(torch.isin(a, b).any()):
            return False
        self.unify(a, b, "a product of activations", both=True)
        self.pairs.append(Pair(labels[0].numpy(), labels[1].numpy(), power, f"{why}{self.where()}"))
        return True

    def merge(self, labels: Tensor, dim: int, why: str) -> Tensor:
        """Tie what lies side by side along a dimension; the result no longer depends on it."""
        first = labels.narrow(dim, 0, 1)
        core = labels
        for d, varies in enumerate(self.varying(labels)):
            core = core if varies or d == dim else core.narrow(d, 0, 1)
        rows = self.table.runs(core.movedim(dim, 0).reshape(labels.shape[dim], -1))
        if bool(((rows[1:, 0] == rows[:-1, -1]) & (rows[1:, 0] >= 0)).any()):
            self.table.bar(self.ids(labels), f"{why} cuts channels apart that are one neuron{self.where()}")
        if bool((rows >= 0).all()) and bool((rows.sort().values.diff() > 0).all()):  # one to one
            rest = rows[1:]
            self.table.tie(rows[:1].expand(rest.shape).flatten().numpy(), rest.flatten().numpy())
        else:
            for i in range(1, labels.shape[dim]):
                self.unify(first, labels.narrow(dim, i, 1), why)
        return first.expand(labels.shape)

    def _tie_pairs(self, pairs: Ids, why: str, both: bool) -> None:
        left, right = pairs
        if not left.size:
            return
        several = [
            [other[key == k] for k in np.unique(key)[np.unique(key, return_counts=True)[1] > 1]]
            for key, other in ((left, right), (right, left))
        ]
        # One id that meets several on both sides is an outer product: each element is two neurons at once.
        sound = not (several[0] and several[1])
        sound = sound and all(self.table.fuse(ids) for ids in (*several[0], *several[1]))
        if not sound:
            self.table.bar(
                np.unique(pairs).tolist(),
                f"{why} pairs neurons with others that do not lie side by side (repeated channel shuffles "
                f"do), so that offspring beside their parents would be paired otherwise{self.where()}",
            )
        self.table.tie(left, right, both=both)

    # dispatch -----------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = self._labelled(func, args, kwargs or {})
        if self.tally is not None:
            self.tally.follow(self, func, args, out)
        with torch._C.DisableTorchFunction():
            self.constants.follow(func, args, kwargs or {}, out)
        return out

    def _labelled(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run an operator and move the labels."""
        mutated = written_by(func, args, kwargs)
        for tensor in mutated:
            self._keep(tensor)
        out = func(*args, **kwargs)
        self._follow(out)
        if self.suspended:
            return out
        inputs = [t for t in tree_leaves((list(args), kwargs)) if isinstance(t, Tensor)]
        name = func.overloadpacket.__name__
        if not self.inside:
            self._follow_weights(name, inputs, out)
        neurons = [t for t in inputs if self.get(t) is not None]
        with torch._C.DisableTorchFunction():
            loose = self.guesses.among(inputs)
            if not neurons:
                self._without_neurons(func, name, args, kwargs, inputs, loose, out, mutated)
                return out
            self.guesses.meet(func, name, args, loose, neurons)
        before = [(t, self.get(t)) for t in mutated]
        with torch._C.DisableTorchFunction():
            if torch._C._current_graph_task_id() >= 0:  # inside of a backward pass
                self.bar(inputs, _DIFFERENTIATED)
            else:
                self._handler_of(func)(self, func, name, args, kwargs, inputs, out)
            for tensor, labels in before:
                if not any(tensor is t for t in self.claimed):
                    self._check_write(name, tensor, labels)
            self.claimed.clear()
            self.lines.follow(name, neurons, args[0] if args else None, tensors_of(out))
            for tensor in loose:  # a guess again: elsewhere it may be a term of the loss, say
                self.set(tensor, None)
        return out

    def _keep(self, tensor: Tensor) -> None:
        """Remember the values of a parameter that a pass is about to write to."""
        parameter = self.parameters.pop(storage_key(tensor), None) if self.parameters else None
        if parameter is not None:
            with torch._C._DisableTorchDispatch():
                self.kept.append((parameter, parameter.detach().clone()))

    def _without_neurons(
        self,
        func: Any,
        name: str,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        inputs: list[Tensor],
        loose: list[Tensor],
        out: Any,
        mutated: list[Tensor],
    ) -> None:
        """What an operator does to tensors that may belong to neurons."""
        opens = name == "cat" and not mutated and any(map(self.constants.uniform, inputs))
        if not loose and not opens:
            return
        if mutated or torch._C._current_graph_task_id() >= 0:
            for t in loose:
                self.guesses.fix(t, f"{name} writes it" if mutated else _DIFFERENTIATED)
            return
        outputs = [t for t in tensors_of(out) if not any(t is i for i in inputs)]
        self.guesses.judge(
            name,
            loose,
            outputs,
            lambda: self._handler_of(func)(self, func, name, args, kwargs, inputs, out),
        )

    def watch(self, tensors: Iterable[Tensor], owners: frozenset[Owner]) -> None:
        """Notice where these scalars, which were computed of weights, are used."""
        for tensor in tensors:
            self._weights[tensor] = frozenset(Held(owner) for owner in owners)

    def _check_write(self, name: str, tensor: Tensor, before: Tensor | None) -> None:
        """An in-place write that changes what a tensor's elements belong to is not followed."""
        after = self.get(tensor)
        same = after is before or (
            after is not None
            and before is not None
            and torch.equal(self.table.runs(stored_once(after)), self.table.runs(stored_once(before)))
        )
        if not same:
            for labels in (before, after):
                if labels is not None:
                    self.table.bar(
                        self.ids(labels), f"{name} writes neurons into another tensor{self.where()}"
                    )
            self.set(tensor, None)

    def leak(self, tensors: Iterable[Tensor], why: str) -> None:
        """What the network computes depends on weights other than through their layer."""
        for tensor in tensors:
            for held in self._owners(tensor):
                if held.lent:
                    self.borrowed.add(held.owner)
                else:
                    self.leaked.setdefault(held.owner, f"{why}{self.where()}")

    def _owners(self, tensor: Tensor) -> frozenset[Held]:
        held = self.owned.get(id(tensor))
        if held is not None:
            return frozenset({held})
        found: frozenset[Held] = self._weights.get(tensor, frozenset())
        return found

    def _follow_weights(self, name: str, inputs: list[Tensor], out: Any) -> None:
        """Notice weights, and what is computed of them, that meet activations outside of their layer."""
        owners = frozenset(o for t in inputs for o in self._owners(t))
        if not owners:
            return
        # A scalar may be a loss, to which a penalty on the weights is added.
        if name in _CONTRACTIONS or any(t.ndim and self.get(t) is not None for t in inputs):
            self.leak(inputs, f"is used by {name}")
            return
        for t in tensors_of(out):
            self._weights[t] = owners


Owner = tuple[str, str]  # path of a layer, name of its tensor


class Held(NamedTuple):
    """Whose a tensor is that was computed of a layer's."""

    owner: Owner
    lent: bool = False  # whether the layer lends it, so that what becomes of it is guessed


Handler = Callable[["LabelMode", Any, str, Sequence[Any], dict[str, Any], list[Tensor], Any], None]


def stored_once(labels: Tensor) -> Tensor:
    """The labels without the repetition along expanded dimensions (those shrink to size 1)."""
    for d, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
        if stride == 0 and size > 1:
            labels = labels.narrow(d, 0, 1)
    return labels


def _compressed(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """The labels stored once along every dimension on which they do not depend."""
    core = stored_once(labels)
    for d, size in enumerate(core.shape):
        if size > 1 and not bool((core != core.narrow(d, 0, 1)).any()):
            core = core.narrow(d, 0, 1)
    return core.contiguous().expand(tuple(shape))


def tensors_of(out: Any) -> list[Tensor]:
    """The tensors among what an operator returned."""
    return [t for t in tree_leaves(out) if isinstance(t, Tensor)]


def written_by(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among the arguments that an operator writes into."""
    if not func._schema.is_mutable:
        return []
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found += [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    return found


_DIFFERENTIATED = (
    "the pass differentiates the network (a gradient penalty, say), which splitting matrices do not cover; a "
    "loss_fn without that term lets them grow"
)

# Operators that use a weight like a layer does.
_CONTRACTIONS = {
    *("mm", "addmm", "bmm", "baddbmm", "mv", "dot", "convolution", "embedding", "_cdist_forward"),
    *("native_batch_norm", "native_layer_norm", "native_group_norm", "_embedding_bag"),
    *("_thnn_fused_lstm_cell", "lstm", "gru", "mkldnn_rnn_layer", "index_select", "index", "gather"),
}
