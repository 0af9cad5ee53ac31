"""A whole splitting phase can be repeated and interrupted, and does not wait for the device per neuron."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning_split import Lanczos, SplittingCallback, SteepestSplitting, TopK, grow, trace
from lightning_split.context import GrowthContext
from lightning_split.significance import FreshBatches
from lightning_split.triggers import Every
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

Batch = tuple[Tensor, Tensor]


def _network(activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), activation(), nn.Linear(4, 2))


def _batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 5, generator=generator), torch.randn(16, 2, generator=generator))
        for _ in range(count)
    ]


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


class _InterruptedAt:
    """A loss that is interrupted at its n-th call."""

    def __init__(self, number: int, error: type[BaseException]) -> None:
        self.number, self.error, self.calls = number, error, 0

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        self.calls += 1
        loss = _loss(model, batch)
        if self.calls == self.number:
            raise self.error
        return loss


def _state(model: nn.Module) -> list[Any]:
    tensors = [t for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values())]
    attributes = [sorted(vars(m)) for m in model.modules()]
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modes = [(m.training, *(dict(vars(m)[name]) for name in hooks)) for m in model.modules()]
    places = [(p.data_ptr(), p.requires_grad, p._version) for p in model.parameters()]
    return [list(map(id, tensors)), [p.grad for p in model.parameters()], attributes, modes, places]


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interruption_at_any_call_leaves_everything_as_it_was(
    error: type[BaseException], activation: type[nn.Module]
) -> None:
    """Tracing, estimation, confirmation, the check of the widened network, the loss afterwards.

    Ctrl-C always comes out. An exception does, unless a trial of tracing met it: then it is the reason for
    which neurons are left alone, or the growth goes on without the trial.
    """
    original, batches = _network(activation).train(), _batches(6)
    original[3].bias.requires_grad_(False)
    rng = torch.get_rng_state()
    number, raised = 0, 0
    while True:
        number += 1
        loss = _InterruptedAt(number, error)
        model = copy.deepcopy(original)
        state = _state(model)
        splits: tuple[Any, ...] = ()
        try:
            splits = grow(
                model, batches[:2], loss, strategy=TopK(count=2), confirm_batches=batches[2:], seed=3
            ).splits
        except error:
            raised += 1
        except ValueError:
            assert error is ZeroDivisionError
        if loss.calls < number:
            break  # the growth has run to its end
        assert torch.equal(torch.get_rng_state(), rng)
        if not splits:
            assert _state(model) == state
            pairs = zip(model.state_dict().values(), original.state_dict().values(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    assert number > 25
    assert len(splits) == 2
    assert raised == number - 1 if error is KeyboardInterrupt else raised > 15


class _Stop(BaseException):
    """What a Trainer does not take for an orderly end."""


@pytest.mark.parametrize("call", [6, 14, 22])
def test_a_trainer_is_as_before_an_interrupted_growth(call: int) -> None:
    """Module, optimizer, loader and random state, wherever in the growth the user's step fails."""

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = _network()
            self.calls = 0

        def training_step(self, batch: Batch) -> Tensor:
            self.calls += 1  # an attribute that the probing gives back
            probed.append(1)
            if growing and len(probed) == call:
                raise _Stop
            return _loss(self.net, batch) + 0 * torch.rand(())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 1e-2)

    class Snapshot(pl.Callback):
        """Before the growth callback, at the start of the epoch in which the growth is due."""

        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 1:
                before.append(_trainer_state(trainer, pl_module))
                growing.append(True)
                probed.clear()

    probed: list[int] = []
    growing: list[bool] = []
    before: list[Any] = []
    module = Module()
    data = TensorDataset(*(torch.cat(parts) for parts in zip(*_batches(6), strict=True)))
    loader = DataLoader(data, 16, shuffle=True, generator=torch.Generator().manual_seed(2))
    grower = SplittingCallback(
        strategy=TopK(count=1), trigger=Every(1), num_batches=2, confirm_batches=2, verbose=False
    )
    trainer = pl.Trainer(
        max_epochs=3,
        callbacks=[Snapshot(), grower],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(_Stop):
        trainer.fit(module, loader)
    assert not grower.history
    after = _trainer_state(trainer, module)
    assert [len(part) for part in after] == [len(part) for part in before[0]]
    for found, expected in zip(after, before[0], strict=True):
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def _trainer_state(trainer: pl.Trainer, module: pl.LightningModule) -> list[list[Any]]:
    optimizer = trainer.optimizers[0]
    moments = [t.clone() for p in module.parameters() for t in optimizer.state[p].values()]
    loader = trainer.fit_loop._combined_loader.flattened[0]
    attributes = [sorted(set(vars(m)) - {"_trainer", "_fabric"}) for m in module.modules()]
    return [
        [v.clone() for v in module.state_dict().values()],
        [id(p) for group in optimizer.param_groups for p in group["params"]],
        moments,
        [torch.get_rng_state(), loader.generator.get_state()],
        [m.training for m in module.modules()],
        [module.calls],
        attributes,
    ]


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_the_same_seed_gives_the_same_bits(activation: type[nn.Module]) -> None:
    """Whatever was drawn from the global generators in between."""
    reports, models = [], []
    for junk in (0, 7):
        torch.manual_seed(0)
        model = _network(activation)
        torch.manual_seed(junk)
        batches = _batches(40)
        reports.append(grow(model, batches[:4], _loss, strategy=TopK(count=2), confirm_batches=batches[4:]))
        models.append(model)
    first, second = ([(c.group, c.neuron, c.gain, c.standard_error) for c in r.candidates] for r in reports)
    assert first == second
    states = zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)


@pytest.mark.parametrize("where", ["estimation", "confirmation"])
def test_products_that_are_not_finite_name_the_group(where: str) -> None:
    """A finite loss whose curvature overflows, in a batch of either kind."""

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return grad * (1 + 1e300 * (x - x.detach()).mul(1e300))  # 1, with an infinite slope

    class Bent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.bent = nn.Linear(5, 3), nn.Linear(3, 2), False

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).tanh()
            return self.second(Overflow.apply(x) if self.bent else x)

    bad = _batches(3)[1 if where == "estimation" else 2]

    def loss(m: Any, b: Batch) -> Tensor:
        m.bent = b is bad
        return _loss(m, b)

    batches = _batches(3)
    batches[1 if where == "estimation" else 2] = bad
    with pytest.raises(ValueError, match="group 'first'.*not finite"):
        grow(Bent(), batches[:2], loss, confirm_batches=batches[2:])


def test_changes_that_are_not_finite_name_the_group() -> None:
    """Displaced neurons of a network with kinks that run into a pole, in a fresh batch."""
    limits: list[Tensor] = []

    class Poled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.bent = nn.Linear(5, 3), nn.Linear(3, 2), False

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            if self.bent:
                limits.append(x.detach().amax())
                x = torch.where(x > limits[0], torch.inf, x)
            return self.second(x)

    batches = _batches(3)

    def loss(m: Any, b: Batch) -> Tensor:
        m.bent = b is batches[-1]
        return _loss(m, b)

    with pytest.raises(ValueError, match="changes of the loss.*group 'first'.*not finite"):
        grow(Poled(), batches[:1], loss, confirm_batches=batches[1:])


class _Looks(TorchDispatchMode):
    """Counts what would wait for a device: values that Python reads, and copies between devices or dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        if name in ("aten._local_scalar_dense", "aten._to_copy", "aten.item", "aten.nonzero"):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_looks_at_values_do_not_grow_with_the_number_of_neurons(activation: type[nn.Module]) -> None:
    """The same number for 4 and for 64 neurons, from the first product to the candidates."""
    counts = []
    for width in (4, 64):
        model = nn.Sequential(nn.Linear(20, width), activation(), nn.Linear(width, 2))
        generator = torch.Generator().manual_seed(0)
        batches = [
            (torch.randn(8, 20, generator=generator), torch.randn(8, 2, generator=generator))
            for _ in range(3)
        ]
        arch = trace(model, batches[0][0])
        context = GrowthContext(model, arch, _loss, batches[:2], FreshBatches(batches[2:]))
        with _Looks() as looks:
            proposal = SteepestSplitting(solver=Lanczos(8)).propose(context, step_size=0.1)
        assert len(proposal.candidates) == width
        counts.append(looks.counts)
    assert counts[0] == counts[1]
    assert counts[0]["aten._local_scalar_dense"] > 0
