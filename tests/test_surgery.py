"""Surgery: exact at ε = 0, all or nothing, and nothing else about the tensors changes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from lightning_split import split_neurons, trace
from lightning_split.architecture import Architecture
from lightning_split.splits import weights_of
from lightning_split.surgery import Split, Surgery
from torch import Tensor, nn

from networks import CASES, Residual, randomised


def _splits(arch: Architecture, rng: np.random.Generator, dtype: torch.dtype) -> list[Split]:
    """A random split of a random neuron of every group: two to four offspring, some weights negative."""
    found = []
    for group in arch.groups:
        m = int(rng.integers(2, 5))
        free = rng.uniform(-1.5, 1.5, m - 1)
        weights = (*free.tolist(), 1 - float(free.sum()))
        found.append(
            Split(group.name, int(rng.integers(group.width)), weights, torch.zeros(m, group.dim, dtype=dtype))
        )
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_undisplaced_offspring_leave_the_function_alone(name: str, dtype: torch.dtype) -> None:
    """Rule 2: at ε = 0 outputs change by rounding only, in eval and in train mode, over repeated growth."""
    torch.set_default_dtype(dtype)
    case = CASES[name]
    model, x = randomised(case.model()), case.inputs()
    rng = np.random.default_rng(1)
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-12}[dtype]
    for _ in range(4):
        arch = trace(model, x)
        assert set(arch.widths) == set(case.groups)
        grown = copy.deepcopy(model)
        split_neurons(grown, _splits(arch, rng, dtype), arch=arch)
        for train in (False, True):
            a, b = (copy.deepcopy(m).train(train)(x) for m in (model, grown))
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)
        model = grown


def test_displacements_land_on_the_right_weights() -> None:
    """θ is laid out producer by producer, weight then bias, and offspring stand next to their parent."""
    torch.set_default_dtype(torch.float64)
    model = randomised(Residual())
    arch = trace(model, torch.randn(2, 1, 6, 6))
    group = arch.group("stem")
    delta = torch.arange(2.0 * group.dim).reshape(2, -1)
    stem, conv2 = model.stem.weight.detach().clone(), model.conv2.weight.detach().clone()
    bias = model.conv2.bias.detach().clone()
    head = model.head.weight.detach().clone().view(6, 4, 9)
    split_neurons(model, [Split("stem", 1, (0.25, 0.75), delta)], arch=arch)
    torch.testing.assert_close(
        model.stem.weight[[0, 1, 2, 3, 4]],
        torch.stack(
            [
                stem[0],
                stem[1] + delta[0, :9].view(1, 3, 3),
                stem[1] + delta[1, :9].view(1, 3, 3),
                stem[2],
                stem[3],
            ]
        ),
    )
    torch.testing.assert_close(model.conv2.weight[2], conv2[1] + delta[1, 10:55].view(5, 3, 3))
    torch.testing.assert_close(model.conv2.bias[1:3], bias[1] + delta[:, 55])
    torch.testing.assert_close(
        model.head.weight.view(6, 5, 9)[:, 1:3], torch.stack([head[:, 1] / 4, head[:, 1] * 3 / 4], 1)
    )
    assert (model.stem.out_channels, model.conv2.out_channels, model.conv1.in_channels) == (5, 5, 5)
    assert (model.norm2.num_features, model.head.in_features) == (5, 45)


def test_both_sides_of_a_weight_split_at_once_keep_the_total_displacement() -> None:
    """The displacement of a row is divided among split columns like the weight itself."""
    torch.set_default_dtype(torch.float64)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    arch = trace(model, torch.randn(4, 2))
    weight = model[2].weight.detach().clone()
    delta = torch.randn(2, 4)
    splits = [Split("0", 0, (2.0, -1.0), torch.zeros(2, 3)), Split("2", 1, (0.5, 0.5), delta)]
    split_neurons(model, splits, arch=arch)
    grown = model[2].weight
    torch.testing.assert_close(grown[1:3, 0] + grown[1:3, 1], weight[1, 0] + delta[:, 0])
    torch.testing.assert_close(grown[1, :2], torch.tensor([2.0, -1.0]) * (weight[1, 0] + delta[0, 0]))
    torch.testing.assert_close(grown[1:3, 2:], weight[1, 1:] + delta[:, 1:3])


def test_new_parameters_keep_what_the_old_ones_had() -> None:
    """dtype, requires_grad, attributes, memory format and hooks survive; unrelated tensors stay the same."""
    model = (
        nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 3, 3),
            nn.ReLU(),
            nn.Conv2d(3, 2, 1),
        )
        .to(torch.bfloat16)
        .to(memory_format=torch.channels_last)
    )
    model[3].weight.requires_grad_(False)
    model[3].bias.requires_grad_(False)
    model[0].weight._no_weight_decay = True
    calls: list[Tensor] = []
    model[0].weight.register_hook(calls.append)
    untouched = model[5].weight
    arch = trace(model, torch.randn(2, 2, 8, 8, dtype=torch.bfloat16))
    split = Split("0", 1, (0.5, 0.5), torch.zeros(2, arch.group("0").dim))
    replaced = split_neurons(model, [split], arch=arch)
    assert len(replaced) == 5
    assert model[5].weight is untouched
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert not model[3].weight.requires_grad
    assert model[0].weight._no_weight_decay is True
    assert model[3].weight.is_contiguous(memory_format=torch.channels_last)
    model(torch.randn(2, 2, 8, 8, dtype=torch.bfloat16)).float().sum().backward()
    assert [c.shape for c in calls] == [(5, 2, 3, 3)]


def test_maps_say_where_each_new_entry_comes_from_and_how_gradients_scale() -> None:
    """Gradients at ε = 0 are the old ones, indexed and scaled by the maps."""
    torch.set_default_dtype(torch.float64)
    model, x = randomised(Residual()).eval(), torch.randn(8, 1, 6, 6)
    old = dict(model.named_parameters())
    grads = dict(zip(old, torch.autograd.grad(model(x).square().sum(), list(old.values())), strict=True))
    arch = trace(model, x)
    replaced = split_neurons(model, _splits(arch, np.random.default_rng(0), torch.float64), arch=arch)
    new = dict(model.named_parameters())
    grown = dict(zip(new, torch.autograd.grad(model(x).square().sum(), list(new.values())), strict=True))
    assert len(replaced) == 12
    for name, p in old.items():
        expected = grads[name]
        for axis, grew in (replaced[p].maps if p in replaced else {}).items():
            index, scale = grew.index, grew.scale
            shape = [1] * expected.ndim
            shape[axis] = -1
            expected = expected.index_select(axis, index) * scale.view(shape)
        torch.testing.assert_close(grown[name], expected)


def _state(model: nn.Module) -> list[object]:
    tensors = [t for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values())]
    sizes = [{k: v for k, v in vars(m).items() if isinstance(v, int)} for m in model.modules()]
    return [[id(t) for t in tensors], sizes]


def test_revert_restores_the_very_same_objects() -> None:
    """After a revert parameters, buffers and attributes are the objects that were there before."""
    model = randomised(Residual())
    arch = trace(model, torch.randn(2, 1, 6, 6))
    before, values = _state(model), copy.deepcopy(model.state_dict())
    surgery = Surgery(model, _splits(arch, np.random.default_rng(0), torch.float32), arch)
    surgery.apply()
    assert model.head.in_features > 36
    surgery.revert()
    assert _state(model) == before
    torch.testing.assert_close(dict(model.state_dict()), dict(values), rtol=0, atol=0)


def test_bad_splits_are_refused_and_change_nothing() -> None:
    """Each error is a sentence that says what and where; the model keeps every tensor."""
    model = CASES["mlp"].model()
    arch = trace(model, torch.randn(4, 5))
    zeros = torch.zeros(2, 6)
    before = _state(model)
    for splits, message in (
        ([Split("9", 0, (0.5, 0.5), zeros)], "no channel group named '9'; the groups are: '0', '3'"),
        ([Split("0", 7, (0.5, 0.5), zeros)], "neuron 7 of '0' is out of range: the group has 7"),
        ([Split("0", 1, (0.5, 0.6), zeros)], "sum to 1.1"),
        ([Split("0", 1, (0.5, 0.5), torch.zeros(2, 5))], r"shape \(2, 5\).*\(number of weights, 6\)"),
        ([Split("0", 1, (1.0,), torch.zeros(1, 6))], "at least two weights"),
        ([Split("0", 1, (0.5, 0.5), zeros)] * 2, "occurs twice"),
        ([Split("0", 1, (0.5, 0.5), zeros / 0)], "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            split_neurons(model, splits, arch=arch)
        assert _state(model) == before


def test_a_stale_architecture_is_refused() -> None:
    """An architecture from before the last growth does not fit, and the message says to trace again."""
    model = CASES["mlp"].model()
    arch = trace(model, torch.randn(4, 5))
    split = [Split("0", 0, (0.5, 0.5), torch.zeros(2, 6))]
    split_neurons(model, split, arch=arch)
    before = _state(model)
    with pytest.raises(ValueError, match="trace the model again after each growth"):
        split_neurons(model, split, arch=arch)
    assert _state(model) == before


@pytest.mark.parametrize("name", CASES)
def test_outgoing_and_channelwise_weights_of_a_new_neuron_land_where_they_belong(name: str) -> None:
    """What is added is what gather then finds; the neuron beside, and everybody else, is as before."""
    torch.set_default_dtype(torch.float64)
    case = CASES[name]
    model, x = randomised(case.model()), case.inputs()
    arch, splits, old, new = trace(model, x), [], {}, {}
    lifted = {  # keys, where scores are divided by the root of the width
        model.get_submodule(b.module).get_parameter(b.tensor): (1 + 1 / group.width) ** 0.5
        for group in arch.groups
        for b in (group.outgoing if group.paired else ())
    }
    parts = ("incoming", "through", "outgoing")
    for group in arch.groups:
        neuron = group.width // 2
        for part in parts:
            old[group.name, part] = weights_of(model, group, part)
            new[group.name, part] = torch.randn_like(old[group.name, part][0])
        moved = [new[group.name, part] - old[group.name, part][neuron] for part in parts[:2]]
        rows = [torch.stack([torch.zeros_like(m), m]) for m in (*moved, new[group.name, "outgoing"])]
        splits.append(Split(group.name, neuron, (1.0, 0.0), rows[0], rows[1], rows[2]))
    surgery = Surgery(model, splits, arch)
    surgery.apply()
    surgery.displace()
    for part in parts:
        found = surgery.places.gather(part, 1, surgery.places.grown(part))
        kept = surgery.places.gather(part, 0, surgery.places.grown(part))
        for group in arch.groups:
            # Gradients of keys are those of what they are multiplied by, where scores are divided by a root.
            lift = (1 + 1 / group.width) if group.paired and part == "outgoing" else 1.0
            torch.testing.assert_close(found[group.name][0], lift * new[group.name, part])
            torch.testing.assert_close(kept[group.name][0], lift * old[group.name, part][group.width // 2])
        # scatter is the transpose of gather
        u = {n: torch.randn_like(v) for n, v in found.items()}
        tensors = {key: torch.randn_like(t) for key, t in surgery.places.grown(part).items()}
        scattered, gathered = surgery.places.scatter(part, 1, u), surgery.places.gather(part, 1, tensors)
        left = sum(float((scattered[key] * t).sum()) for key, t in tensors.items())
        assert left == pytest.approx(sum(float((u[n] * g).sum()) for n, g in gathered.items()), abs=1e-9)
    for old_tensor, found in surgery.replaced.items():
        for axis, grew in found.maps.items():
            assert len(grew.index) == found.new.shape[axis]
            whole = next((1 / lift for key, lift in lifted.items() if old_tensor is key and axis == 0), 1.0)
            assert sorted(set(grew.scale.tolist())) == [0.0, pytest.approx(whole)]
            assert int((grew.scale > 0).sum()) == old_tensor.shape[axis]


def test_outgoing_weights_are_the_same_for_all_offspring_of_a_reader() -> None:
    """A new neuron before a split one: each offspring of the reader has the whole new column."""
    torch.set_default_dtype(torch.float64)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    arch = trace(model, torch.randn(4, 2))
    weight, delta, u = model[2].weight.detach().clone(), torch.randn(2, 4), torch.tensor([3.0, 5.0])
    new = Split("0", 1, (1.0, 0.0), torch.zeros(2, 3), None, torch.stack([0 * u, u]))
    split_neurons(model, [new, Split("2", 1, (0.5, 0.5), delta)], arch=arch)
    grown = model[2].weight.detach()
    torch.testing.assert_close(grown[:, 2], torch.tensor([3.0, 5.0, 5.0]))
    torch.testing.assert_close(grown[1:, [0, 1, 3]], weight[1] + delta[:, :3])
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    bad = Split("0", 1, (1.0, 0.0), torch.zeros(2, 3), None, torch.zeros(2, 3))
    with pytest.raises(
        ValueError, match=r"outgoing displacements of shape \(2, 3\); they need shape \(2, 2\)"
    ):
        split_neurons(model, [bad], arch=trace(model, torch.randn(4, 2)))
