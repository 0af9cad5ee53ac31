"""Optimizer state follows its neurons, and what grew goes on being trained."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_split import enable_growth, split_neurons, trace
from lightning_split.company import rewrap, shadow_models
from lightning_split.optim import (
    TrainerRanks,
    carry_all,
    carry_state,
    check_trained,
    refuse_optimizers,
    refuse_strategy,
)
from lightning_split.surgery import AxisMap, Replacement, Split
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from networks import Residual, randomised

pytestmark = [
    pytest.mark.usefixtures("double"),
    # Advice about workers and log intervals: a toy of one batch needs neither.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
]

SGD, Adam = torch.optim.SGD, torch.optim.Adam
MAKERS: dict[str, Callable[..., Optimizer]] = {
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01, t0=1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "Adam": lambda p: Adam(p, lr=0.01),
    "AdamW-amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "RMSprop-centered": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.9),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "SGD-nesterov": lambda p: SGD(p, lr=0.01, momentum=0.9, nesterov=True),
}
if hasattr(torch.optim, "Muon"):
    MAKERS["Muon"] = lambda p: torch.optim.Muon(p, lr=0.01)

# The power of the gradient in every entry, written out by hand: what each optimizer must carry.
POWERS = {
    "ASGD": {"ax": None},
    "Adadelta": {"square_avg": 2, "acc_delta": 0},
    "Adafactor": {},
    "Adagrad": {"sum": 2},
    "Adam": {"exp_avg": 1, "exp_avg_sq": 2},
    "AdamW-amsgrad": {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2},
    "Adamax": {"exp_avg": 1, "exp_inf": "abs"},
    "NAdam": {"exp_avg": 1, "exp_avg_sq": 2},
    "RAdam": {"exp_avg": 1, "exp_avg_sq": 2},
    "RMSprop-centered": {"square_avg": 2, "grad_avg": 1, "momentum_buffer": 1},
    "Rprop": {"prev": 1, "step_size": 0},
    "SGD-nesterov": {"momentum_buffer": 1},
    "Muon": {"momentum_buffer": 1},
}


def residual() -> nn.Module:
    """4-d weights, BatchNorm, weights that grow on both sides, in eval mode."""
    return randomised(Residual()).eval()


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    out = net(x)
    return (out - x.flatten(1)[:, : out.shape[1]]).square().mean()


def data(net: nn.Module, n: int = 16) -> Tensor:
    return torch.randn(n, 1, 6, 6) if isinstance(net, Residual) else torch.randn(n, 3)


def stepped(net: nn.Module, optimizer: Optimizer, x: Tensor, steps: int = 3) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(net, x)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def split(net: nn.Module, weights: tuple[float, ...], neuron: int = 1, epsilon: float = 0.0) -> Any:
    """Split one neuron of every group."""
    arch = trace(net, data(net, 2))
    splits = [Split(g.name, neuron, weights, epsilon * torch.randn(len(weights), g.dim)) for g in arch.groups]
    return split_neurons(net, splits, arch=arch)


def expected(entry: Tensor, replacement: Replacement, power: Any) -> Tensor:
    """Entry by entry, in plain loops over the grown positions."""
    out = torch.empty(replacement.new.shape)
    for place in torch.cartesian_prod(*map(torch.arange, out.shape)).view(-1, out.ndim).tolist():
        scale, source = 1.0, list(place)
        for axis, grew in replacement.maps.items():
            source[axis] = int(grew.index[place[axis]])
            scale *= float(grew.scale[place[axis]])
        factor = abs(scale) if power == "abs" else scale**power
        out[tuple(place)] = factor * entry[tuple(source)]
    return out


def snapshot(optimizer: Optimizer) -> dict[nn.Parameter, dict[str, Any]]:
    return {
        p: {k: v.clone() if isinstance(v, Tensor) else v for k, v in s.items()}
        for p, s in optimizer.state.items()
    }


# one optimizer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MAKERS))
@pytest.mark.parametrize("weights", [(0.5, 0.5), (-1.0, 2.0)], ids=["positive", "signed"])
@pytest.mark.parametrize("make", [mlp, residual])
def test_every_entry_follows_its_neuron(
    make: Callable[[], nn.Module], name: str, weights: tuple[float, ...]
) -> None:
    """Old parameters are gone, new ones are in their places, every entry has its rule's value."""
    net = make()
    x = data(net)
    params = [p for p in net.parameters() if p.ndim == 2 or name != "Muon"]
    optimizer = MAKERS[name](params)
    stepped(net, optimizer, x)
    before = snapshot(optimizer)
    hyper = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]

    replaced = split(net, weights, epsilon=0.1)
    carry_state(optimizer, replaced)

    wanted = [replaced[p].new if p in replaced else p for p in params]
    got = optimizer.param_groups[0]["params"]
    assert [id(p) for p in got] == [id(p) for p in wanted]
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == hyper
    assert not {id(p) for p in replaced} & {id(p) for p in optimizer.state}
    if name == "LBFGS":
        assert not optimizer.state
    else:
        checked = 0
        for old, replacement in replaced.items():
            if old not in before:
                continue
            after = optimizer.state[replacement.new]
            assert after.keys() == before[old].keys()
            for key, power in POWERS[name].items():
                entry = before[old][key]
                want = replacement.new.detach() if power is None else expected(entry, replacement, power)
                torch.testing.assert_close(after[key], want)
                checked += 1
            for key in ("step", "mu_product", "eta", "mu"):
                if key in after:
                    torch.testing.assert_close(after[key], before[old][key])
                    checked += 1
        assert checked >= len(params) - 1  # all but the output bias have grown

    values = [p.detach().clone() for p in got]
    stepped(net, optimizer, x, 1)
    assert all(not torch.equal(p, v) for p, v in zip(got, values, strict=True))


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_reset_starts_the_grown_parameters_anew(name: str) -> None:
    """With mode 'reset' grown parameters have no state, the others keep theirs, and all train."""
    net, x = mlp(), torch.randn(16, 3)
    optimizer = MAKERS[name]([p for p in net.parameters() if p.ndim == 2 or name != "Muon"])
    stepped(net, optimizer, x)
    kept = net[2].bias
    before = snapshot(optimizer).get(kept)
    replaced = split(net, (0.5, 0.5))
    carry_state(optimizer, replaced, "reset")
    assert not any(r.new in optimizer.state for r in replaced.values())
    if before is not None and name != "LBFGS":
        torch.testing.assert_close(dict(optimizer.state[kept]), before)
    new = next(iter(replaced.values())).new
    value = new.detach().clone()
    stepped(net, optimizer, x, 1)
    assert not torch.equal(new, value)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (-1.0, 2.0), (0.25, 0.25, 0.5)])
@pytest.mark.parametrize(("make", "grown"), [(mlp, 3), (residual, 12)])
def test_the_scale_is_that_of_the_gradient(
    make: Callable[[], nn.Module], grown: int, weights: tuple[float, ...]
) -> None:
    """At ε = 0 the gradient of the grown net is the carried old one: hence the scale of moments."""
    net = make()
    x = data(net)
    loss_of(net, x).backward()
    old = {p: p.grad.clone() for p in net.parameters() if p.grad is not None}
    replaced = split(net, weights)
    net.zero_grad()
    loss_of(net, x).backward()
    assert len(replaced) == grown
    for p, replacement in replaced.items():
        torch.testing.assert_close(replacement.new.grad, expected(old[p], replacement, 1))


@pytest.mark.parametrize("name", ["SGD-nesterov", "Adam"])
def test_a_split_at_zero_carries_the_state_of_a_net_born_split(name: str) -> None:
    """The carried state is what the optimizer had built up if the net had been split all along.

    Learning rate zero keeps both nets in place while their moments build up.
    """
    net, batches = mlp(), [torch.randn(8, 3) for _ in range(4)]
    born = mlp()
    born.load_state_dict(net.state_dict())
    split(born, (0.5, 0.5))
    optimizers = [MAKERS[name](net.parameters()), MAKERS[name](born.parameters())]
    for model, optimizer in zip((net, born), optimizers, strict=True):
        optimizer.param_groups[0]["lr"] = 0.0
        for x in batches:
            stepped(model, optimizer, x, 1)
    carry_state(optimizers[0], split(net, (0.5, 0.5)))
    for p, q in zip(net.parameters(), born.parameters(), strict=True):
        torch.testing.assert_close(dict(optimizers[0].state[p]), dict(optimizers[1].state[q]))


def test_adafactor_factors_are_exact_where_its_model_is() -> None:
    """Where g² is a product, so is the carried estimate: s² times the copied one, entry by entry."""
    for shape, maps in (
        ((3, 4), {0: AxisMap(torch.tensor([0, 1, 1, 2]), torch.tensor([1.0, 0.5, 0.5, 1.0]))}),
        ((3, 1), {1: AxisMap(torch.tensor([0, 0]), torch.tensor([1.0, 1.0]))}),
        ((1, 2), {0: AxisMap(torch.tensor([0, 0]), torch.tensor([-1.0, 2.0]))}),
        (
            (2, 3),
            {
                0: AxisMap(torch.tensor([0, 0, 1]), torch.tensor([0.25, 0.75, 1.0])),
                1: AxisMap(torch.tensor([0, 1, 2, 2]), torch.tensor([1.0, 1.0, -1.0, 2.0])),
            },
        ),
        ((2, 3, 2), {0: AxisMap(torch.tensor([0, 1, 1]), torch.tensor([1.0, -1.0, 2.0]))}),
    ):
        old = nn.Parameter(torch.randn(shape))
        old.grad = torch.rand(*shape[:-1], 1) * torch.rand(*shape[:-2], 1, shape[-1])
        optimizer = torch.optim.Adafactor([old], lr=1e-3)
        optimizer.step()
        estimate = _estimate(optimizer.state[old])
        new_shape = [len(maps[a].index) if a in maps else n for a, n in enumerate(shape)]
        replacement = Replacement(nn.Parameter(torch.randn(new_shape)), maps)
        carry_state(optimizer, {old: replacement})
        got = _estimate(optimizer.state[replacement.new])
        torch.testing.assert_close(got, expected(estimate, replacement, 2))


def _estimate(state: dict[str, Tensor]) -> Tensor:
    return state["row_var"] @ state["col_var"] / state["row_var"].mean(-2, keepdim=True)


def test_parameters_are_told_apart_by_identity() -> None:
    """Of two parameters with equal values only the replaced one leaves."""
    old, twin = (nn.Parameter(torch.ones(2)) for _ in range(2))
    new = nn.Parameter(torch.ones(3))
    optimizer = Adam([{"params": [twin]}, {"params": [old]}])
    for p in (old, twin):
        p.grad = torch.ones(2)
    optimizer.step()
    replaced = {old: Replacement(new, {0: AxisMap(torch.tensor([0, 1, 1]), torch.ones(3))})}
    carry_state(optimizer, replaced)
    assert optimizer.param_groups[0]["params"][0] is twin
    assert optimizer.param_groups[1]["params"][0] is new
    assert {id(p) for p in optimizer.state} == {id(twin), id(new)}
    assert optimizer.state[twin]["exp_avg"].shape == (2,)


def test_groups_keep_number_order_names_and_rates() -> None:
    """Groups of names and rates stay as they are; only the object in the slot is another."""
    net = mlp()
    groups: list[dict[str, Any]] = [
        {"params": [("out.bias", net[2].bias), ("in.weight", net[0].weight)], "lr": 0.1},
        {"params": [("in.bias", net[0].bias), ("out.weight", net[2].weight)], "lr": 0.2},
    ]
    optimizer = SGD(groups)
    before = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    carry_state(optimizer, split(net, (0.5, 0.5)))
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == before
    places = [[id(p) for p in g["params"]] for g in optimizer.param_groups]
    assert places == [
        [id(net[2].bias), id(net[0].weight)],
        [id(net[0].bias), id(net[2].weight)],
    ]
    if "param_names" in before[0]:
        assert before[0]["param_names"] == ["out.bias", "in.weight"]


def test_a_parameter_without_state_only_changes_places() -> None:
    """Before the first step there is nothing to carry, and nothing is made up."""
    net = mlp()
    optimizer = Adam(net.parameters())
    carry_state(optimizer, split(net, (0.5, 0.5)))
    assert not optimizer.state
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in net.parameters()]


def test_lbfgs_starts_anew_wherever_it_keeps_its_history() -> None:
    """Its vectors over all parameters lie with the first one, which need not have grown."""
    net, x = mlp(), torch.randn(16, 3)
    optimizer = MAKERS["LBFGS"]([net[2].bias, net[2].weight, net[0].weight, net[0].bias])
    stepped(net, optimizer, x)
    assert optimizer.state[net[2].bias]["n_iter"] > 0
    carry_state(optimizer, split(net, (0.5, 0.5)))
    assert not optimizer.state
    before = loss_of(net, x).item()
    stepped(net, optimizer, x)
    assert loss_of(net, x).item() < before


def test_an_optimizer_without_the_parameter_is_left_alone() -> None:
    """An LBFGS of other parameters keeps its history."""
    net, other, x = mlp(), mlp(), torch.randn(4, 3)
    optimizer = MAKERS["LBFGS"](other.parameters())
    stepped(other, optimizer, x)
    carry_state(optimizer, split(net, (0.5, 0.5)))
    assert optimizer.state[other[0].weight]["n_iter"] > 0


class Homemade(Adam):
    """Same entries as Adam, but who knows what a subclass keeps in them."""


def test_an_unknown_class_starts_anew_and_says_so() -> None:
    """A class from outside torch.optim loses the grown parameters' state, with a warning."""
    net, x = mlp(), torch.randn(4, 3)
    optimizer = Homemade(net.parameters(), lr=0.01)
    stepped(net, optimizer, x)
    replaced = split(net, (0.5, 0.5))
    sentence = r"3 grown parameters starts anew, because Homemade is not a class of torch\.optim"
    with pytest.warns(UserWarning, match=sentence):
        carry_state(optimizer, replaced)
    assert {id(p) for p in optimizer.state} == {id(net[2].bias)}
    stepped(net, optimizer, x)
    assert len(optimizer.state) == 4


@pytest.mark.parametrize(
    "entry", [("fancy", (4, 3)), ("exp_avg", (12,))], ids=["name unknown", "shape unknown"]
)
def test_an_unknown_entry_resets_its_parameter_only(entry: tuple[str, tuple[int, ...]]) -> None:
    """What cannot be interpreted is dropped with its parameter; the others are carried."""
    net, x = mlp(), torch.randn(4, 3)
    optimizer = Adam(net.parameters())
    stepped(net, optimizer, x)
    optimizer.state[net[0].weight][entry[0]] = torch.zeros(entry[1])
    replaced = split(net, (0.5, 0.5))
    with pytest.warns(UserWarning, match=f"1 grown parameters .* entry '{entry[0]}' of shape"):
        carry_state(optimizer, replaced)
    assert net[0].weight not in optimizer.state
    assert optimizer.state[net[0].bias]["exp_avg"].shape == (5,)


def test_lightning_optimizer_is_unwrapped() -> None:
    """The live state belongs to the optimizer inside Lightning's wrapper."""
    net, x = mlp(), torch.randn(4, 3)
    inner = Adam(net.parameters())
    stepped(net, inner, x)
    carry_state(LightningOptimizer(inner), split(net, (0.5, 0.5)))
    assert [id(p) for p in inner.param_groups[0]["params"]] == [id(p) for p in net.parameters()]
    assert inner.state[net[0].weight]["exp_avg"].shape == (5, 3)


def test_state_keeps_its_dtype() -> None:
    """float64 scales do not promote the state of a bfloat16 parameter."""
    old = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    new = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    old.grad = torch.ones_like(old)
    optimizer = Adam([old])
    optimizer.step()
    scale = torch.tensor([1.0, 0.5, 0.5], dtype=torch.float64)
    carry_state(optimizer, {old: Replacement(new, {0: AxisMap(torch.tensor([0, 1, 1]), scale)})})
    assert optimizer.state[new]["exp_avg"].dtype == torch.bfloat16
    torch.testing.assert_close(optimizer.state[new]["exp_avg"].double(), scale * 0.1, rtol=1e-2, atol=0)


def test_untrained_parameters_are_found_out() -> None:
    """Old ones that are left, and new ones that are missing or doubled, each raise one sentence."""
    old, new = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    replaced = {old: Replacement(new, {})}
    once = {id(old): 1}
    check_trained([SGD([new])], replaced, once)
    check_trained([SGD([nn.Parameter(torch.ones(1))])], replaced, {})  # frozen before, frozen now
    for optimizers in (
        [SGD([old])],
        [SGD([new]), SGD([old])],
        [SGD([nn.Parameter(torch.ones(3))])],
        [SGD([new]), Adam([new])],
    ):
        with pytest.raises(RuntimeError, match=r"^After the growth \d grown parameters are not in"):
            check_trained(optimizers, replaced, once)


# the Trainer --------------------------------------------------------------------------------------


class Module(pl.LightningModule):
    """Two optimizer classes, a schedule, and nothing that knows of growth."""

    def __init__(self, optimizer: Callable[..., Optimizer] = MAKERS["Adam"]) -> None:
        super().__init__()
        self.net = mlp()
        self.maker = optimizer

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return loss_of(self.net, batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = self.maker(self.net.parameters())
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class GrowOnce(pl.Callback):
    """Splits a neuron of the hidden layer at the start of the second epoch."""

    def __init__(self, *args: Any, carry: bool = True) -> None:
        self.args, self.carry = args, carry
        self.replaced: dict[nn.Parameter, Replacement] = {}
        self.state: dict[nn.Parameter, dict[str, Any]] = {}
        self.rates: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            self.state = snapshot(trainer.optimizers[0])
            self.replaced = split(pl_module.net, (0.5, 0.5))
            self.at_growth = {p: p.detach().clone() for p in pl_module.parameters()}
            if self.carry:
                carry_all(trainer, self.replaced, *self.args)
                self.carried = snapshot(trainer.optimizers[0])

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def fit(module: pl.LightningModule, callback: pl.Callback, **kwargs: Any) -> pl.Trainer:
    torch.manual_seed(1)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        **kwargs,
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(6, 3)), batch_size=3))
    return trainer


@pytest.mark.parametrize("schedule", ["keep", "restart"])
@pytest.mark.parametrize("mode", ["transfer", "reset"])
def test_carry_all_in_a_fit(mode: str, schedule: str) -> None:
    """A real fit trains what grew; 'restart' restarts the rate and keeps the carried moments."""
    module, callback = Module(), GrowOnce(mode, schedule)
    trainer = fit(module, callback)
    again = [0.01, 0.005] if schedule == "restart" else [0.0025, 0.00125]
    assert callback.rates == pytest.approx([0.01, 0.005, *again])
    moved = [not torch.equal(p, callback.at_growth[p]) for p in module.parameters()]
    assert moved == [True] * 4
    assert len(callback.replaced) == 3
    for old, r in callback.replaced.items():
        if mode == "transfer":
            want = expected(callback.state[old]["exp_avg_sq"], r, 2)
            torch.testing.assert_close(callback.carried[r.new]["exp_avg_sq"], want)
        else:
            assert r.new not in callback.carried
    (optimizer,) = trainer.optimizers
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in module.parameters()]


def test_without_carrying_the_growth_is_not_trained() -> None:
    """The trap that carry_all closes: Lightning itself trains on, silently, without what grew."""
    module, callback = Module(), GrowOnce(carry=False)
    fit(module, callback)
    moved = [not torch.equal(p, callback.at_growth[p]) for p in module.parameters()]
    assert moved == [False, False, False, True]


class FromInit(Module):
    """Creates its optimizer once and returns it again, which new optimizers cannot cure."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer = SGD(self.net.parameters(), lr=0.01, momentum=0.9)

    def configure_optimizers(self) -> Any:
        schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, gamma=0.5)
        return [self.optimizer], [{"scheduler": schedule, "interval": "step"}]


def test_restart_with_an_optimizer_made_in_init() -> None:
    """The same optimizer returned again holds the new parameters, and its rate restarts too."""
    module, callback = FromInit(), GrowOnce("transfer", "restart")
    fit(module, callback)
    assert callback.rates == pytest.approx([0.01, 0.005, 0.01, 0.005])
    moved = [not torch.equal(p, callback.at_growth[p]) for p in module.parameters()]
    assert moved == [True] * 4
    assert len(callback.carried) == 4


class Partial(Module):
    """After the growth its configure_optimizers forgets the first layer."""

    calls = 0

    def configure_optimizers(self) -> Any:
        self.calls += 1
        return SGD((self.net if self.calls == 1 else self.net[2]).parameters(), lr=0.1)


def test_restart_that_loses_parameters_is_an_error() -> None:
    """What a fresh configure_optimizers leaves out is reported, not left untrained."""
    with pytest.raises(RuntimeError, match="2 grown parameters are not in the optimizers as often"):
        fit(Partial(), GrowOnce("transfer", "restart"))


def test_lbfgs_in_a_fit() -> None:
    """LBFGS starts anew at the new size and goes on training."""
    module, callback = Module(MAKERS["LBFGS"]), GrowOnce()
    fit(module, callback)
    assert not callback.carried
    assert all(not torch.equal(p, callback.at_growth[p]) for p in module.parameters())


class Sharded(SGD):
    """Looks like ZeroRedundancyOptimizer."""

    def consolidate_state_dict(self) -> None: ...


def test_sharding_optimizers_are_refused() -> None:
    """An optimizer that shards by parameter is named and refused, and nothing has changed."""
    module = Module(lambda p: Sharded(p, lr=0.1))
    with pytest.raises(MisconfigurationException, match="cannot carry Sharded over a growth"):
        fit(module, GrowOnce())
    trainer = fit(Module(), GrowOnce())
    refuse_optimizers(trainer)


# strategies ---------------------------------------------------------------------------------------


class _Trainer:
    """As much of a Trainer as a refusal reads."""

    def __init__(self, strategy: Any, module: Any = None) -> None:
        self.strategy, self.lightning_module = strategy, module


def test_strategies_are_told_apart() -> None:
    """One device and DDP pass, sharding strategies are refused by name."""
    refuse_strategy(pl.Trainer(accelerator="cpu", logger=False))
    refuse_strategy(pl.Trainer(accelerator="cpu", strategy="ddp", logger=False))
    sharding: Any = _Trainer(FSDPStrategy())
    with pytest.raises(
        MisconfigurationException,
        match=r"^SplittingCallback cannot grow a network under FSDPStrategy, which shards",
    ):
        refuse_strategy(sharding)


def test_spawn_needs_growth_enabled() -> None:
    """Spawned processes are refused until the module itself can load grown weights."""
    module = Module()
    strategy = pl.Trainer(accelerator="cpu", strategy="ddp_spawn", logger=False).strategy
    spawning: Any = _Trainer(strategy, module)
    message = re.escape("call lightning_split.enable_growth(self) at the end of Module.__init__")
    with pytest.raises(MisconfigurationException, match=message):
        refuse_strategy(spawning)
    enable_growth(module)
    refuse_strategy(spawning)


@pytest.mark.filterwarnings("ignore:.*SWA.*")  # Lightning's notice that it replaces the schedule
@pytest.mark.parametrize("make", [EMAWeightAveraging, lambda: StochasticWeightAveraging(1e-2)])
def test_shadow_models_are_found(make: Callable[[], pl.Callback]) -> None:
    """The averaging callbacks' copies are handed out as modules of the same structure."""
    found: list[nn.Module] = []

    class Look(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            found.extend(shadow_models(trainer))

    module = Module()
    averaging = make()
    assert shadow_models(pl.Trainer(accelerator="cpu", logger=False, callbacks=[averaging])) == []
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[averaging, Look()],
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(6, 3)), batch_size=3))
    (shadow,) = found
    assert isinstance(shadow, Module)
    assert shadow is not module
    assert list(shadow.state_dict()) == list(module.state_dict())


def test_one_process_has_nothing_to_do() -> None:
    """On one device nothing is wrapped, averaged, gathered or broadcast."""
    trainer = pl.Trainer(accelerator="cpu", logger=False)
    ranks, tensors = TrainerRanks(trainer), {"a": torch.ones(2)}
    assert ranks.mean_of(tensors)["a"] is tensors["a"]
    assert ranks.gather_of(tensors)["a"] is tensors["a"]
    assert ranks.agree("plan") == "plan"
    module = Module()
    trainer.strategy.connect(module)
    rewrap(trainer, module)
    assert trainer.strategy.model is module


class Ddp(pl.Callback):
    """Grows on both ranks and compares them after training; runs inside the processes."""

    def setup(self, *args: Any, **kwargs: Any) -> None:
        torch.set_default_dtype(torch.float64)  # a spawned process starts from torch's defaults

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch != 1:
            return
        ranks = TrainerRanks(trainer)
        rank = float(trainer.global_rank)
        tensors = {
            "a": torch.full((2, 3), rank),
            "b": torch.tensor(rank, dtype=torch.float32),
            "c": torch.tensor([10.0 * rank]),
        }
        mean, gathered = ranks.mean_of(tensors), ranks.gather_of({"a": tensors["a"]})
        assert list(mean) == ["a", "b", "c"]
        torch.testing.assert_close(mean["a"], torch.full((2, 3), 0.5))
        torch.testing.assert_close(mean["b"], torch.tensor(0.5, dtype=torch.float32))
        torch.testing.assert_close(mean["c"], torch.tensor([5.0]))
        torch.testing.assert_close(tensors["a"], torch.full((2, 3), rank))  # the input is not reduced
        torch.testing.assert_close(gathered["a"][:, 0], torch.tensor([0.0, 0.0, 1.0, 1.0]))
        assert ranks.agree(trainer.global_rank) == 0
        wrapper = trainer.strategy.model
        replaced = split_neurons_alike(pl_module)
        rewrap(trainer, pl_module)
        assert trainer.strategy.model is not wrapper
        assert trainer.strategy.model.module is pl_module
        carry_all(trainer, replaced)
        self.at_growth = [p.detach().clone() for p in pl_module.parameters()]

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        for before, p in zip(self.at_growth, pl_module.parameters(), strict=True):
            assert not torch.equal(before, p)
            both = trainer.strategy.all_gather(p.detach())
            torch.testing.assert_close(both[0], both[1], rtol=0, atol=0)
            moments = trainer.strategy.all_gather(trainer.optimizers[0].state[p]["exp_avg"])
            torch.testing.assert_close(moments[0], moments[1], rtol=0, atol=0)

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        # gloo's threads abort the interpreter now and then if the group outlives it
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def adam(parameters: Any) -> Optimizer:
    return Adam(parameters, lr=0.01)


def split_neurons_alike(pl_module: Any) -> Any:
    arch = trace(pl_module.net, torch.zeros(2, 3))
    group = arch.groups[0]
    return split_neurons(
        pl_module.net,
        [Split(group.name, 1, (0.5, 0.5), torch.zeros(2, group.dim))],
        arch=arch,
    )


class Enabled(Module):
    """Spawned workers send grown weights back to this process."""

    def __init__(self) -> None:
        super().__init__(adam)  # pickles, as a lambda does not
        enable_growth(self)


@pytest.mark.slow
def test_ranks_stay_equal_under_ddp() -> None:
    """Two processes grow, re-wrap and train on: parameters and moments are equal bit for bit."""
    module = Enabled()
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        devices=2,
        strategy="ddp_spawn",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Ddp()],
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(12, 3)), batch_size=3))
    assert module.net[0].weight.shape == (5, 3)
