"""Important samples: against the matrices of single samples, and refused where there are none."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning_split import (
    Every,
    GradMax,
    Lanczos,
    Mixed,
    SplittingCallback,
    SteepestSplitting,
    TopK,
    grow,
)
from lightning_split._compat import MisconfigurationException
from lightning_split.curvature import SplittingOperator
from lightning_split.cuts import CutNetwork
from lightning_split.picking import Picked, UnlikeError, joined, picked
from lightning_split.sampling import NotSeparableError, check_separable, drawn, important_samples
from lightning_split.tracing import trace_step
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from networks import randomised

CLASSES = 3


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 3), nn.SiLU()
        )
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class Tokens(nn.Module):
    """A Transformer that reads (steps, samples, features), or rows of all tokens at once."""

    def __init__(self, *, flat: bool) -> None:
        super().__init__()
        self.flat = flat
        self.embed = nn.Linear(2, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, activation="gelu", batch_first=False)
        self.mlp = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.embed(x.flatten(2).permute(2, 0, 1)))  # steps first
        steps, samples = x.shape[:2]
        if self.flat:
            return self.mlp(x.reshape(steps * samples, 4)).view(steps, samples, CLASSES).mean(0)
        return self.mlp(x).mean(0)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 4, batch_first=True)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.flatten(2).transpose(1, 2))[0][:, -1])


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": Convolutions,
    "steps first": lambda: Tokens(flat=False),
    "rows of all tokens": lambda: Tokens(flat=True),
    "recurrent": Recurrent,
}


def entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def some_batches(count: int, size: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, 2, 4, 3), torch.randint(CLASSES, (size,))) for _ in range(count)]


def matrices(model: nn.Module, arch: Any, batches: list[Any], weigh: Any = None) -> dict[str, Tensor]:
    operator = SplittingOperator(model, arch, batches, entropy, weigh=weigh)
    return {name: operator.dense(name) for name in operator.shapes}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", NETWORKS)
def test_matrices_are_those_of_the_kept_samples_by_their_odds(name: str) -> None:
    """Σ_i S_i / (q_i n), with S_i of batches of a single sample."""
    model = randomised(NETWORKS[name]())
    batches = [*some_batches(4, 6), *some_batches(1, 4)]  # one of another size
    arch = trace_step(model, batches[0], entropy)
    cut = CutNetwork(model, arch, entropy)
    scores = []
    for number, batch in enumerate(batches):
        first = cut.first_pass(batch, number)
        last = first.cotangents[max(first.cotangents)]
        samples = last.shape.index(len(batch[1])) if len(batch[1]) in last.shape else 0
        rows = last.movedim(samples, 0)
        if len(rows) != len(batch[1]):
            rows = rows.view(-1, len(batch[1]), *rows.shape[1:]).transpose(0, 1)
        scores.append(rows.flatten(1).norm(dim=1))
    kept, odds = drawn(torch.cat(scores), 0.4, seed=3)
    assert len(kept) == round(0.4 * 28)
    expected: dict[str, Tensor] = {}
    samples = [(x[i : i + 1], y[i : i + 1], len(y)) for x, y in batches for i in range(len(y))]
    for number, chance in zip(kept.tolist(), odds.tolist(), strict=True):
        x, y, size = samples[number]
        for group, matrix in matrices(model, arch, [(x, y)]).items():
            share = matrix / (chance * size * len(batches))
            expected[group] = expected.get(group, torch.zeros_like(share)) + share
    found = important_samples(model, arch, batches, entropy, 0.4, seed=3)
    for group, matrix in matrices(model, arch, found.batches, found.weigh).items():
        torch.testing.assert_close(matrix, expected[group], rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("double")
def test_all_samples_make_the_matrices_of_the_whole_batches() -> None:
    model = randomised(Convolutions())
    batches = some_batches(3, 5)
    arch = trace_step(model, batches[0], entropy)
    found = important_samples(model, arch, batches, entropy, 0.999)
    for group, matrix in matrices(model, arch, batches).items():
        torch.testing.assert_close(matrix, matrices(model, arch, found.batches, found.weigh)[group])


def test_the_draw_is_unbiased_and_of_the_size_asked_for() -> None:
    scores = torch.tensor([0.0, 0.1, 0.2, 0.4, 5.0, 0.3, 0.0, 1.0])
    counts = torch.zeros(8, dtype=torch.float64)
    for seed in range(1000):
        kept, odds = drawn(scores, 0.5, seed)
        assert len(kept) == 4
        assert len(set(kept.tolist())) == 4
        assert bool((odds > 0).all())
        assert bool((odds <= 1).all())
        counts[kept] += 1 / odds
    torch.testing.assert_close(counts / 1000, torch.ones_like(counts), rtol=0.3, atol=0)
    kept, odds = drawn(scores, 0.25, 0)
    assert 4 in kept.tolist()
    assert float(odds[kept.tolist().index(4)]) == 1.0


@pytest.mark.parametrize("exponent", [0.0, 1.0, 4.0])
def test_a_draw_of_its_own_size_loses_a_fifth_of_the_precision(exponent: float) -> None:
    """Sums of ±g over what is kept have 1.25 times the variance of the sums over all."""
    scores = torch.rand(400, dtype=torch.float64) ** exponent
    estimates = torch.zeros(600, dtype=torch.float64)
    for seed in range(len(estimates)):
        kept, odds = drawn(scores, None, seed)
        signs = 2.0 * torch.randint(0, 2, (len(kept),)) - 1
        estimates[seed] = (signs * scores[kept] / odds).sum()
    ratio = float(estimates.square().mean() / scores.square().sum())
    assert 1.0 < ratio < 1.5
    share = len(kept) / len(scores)
    assert {0.0: share > 0.75, 1.0: 0.5 < share < 0.75, 4.0: share < 0.4}[exponent]


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_a_draw_without_scores_is_even(count: int) -> None:
    kept, odds = drawn(torch.zeros(count), 0.3, 1)
    assert len(kept) == max(1, round(0.3 * count))
    torch.testing.assert_close(odds, torch.full_like(odds, len(kept) / count))


def test_gradients_at_the_last_read_are_those_of_a_whole_pass() -> None:
    model = randomised(Convolutions()).double()
    x, y = some_batches(1, 5)[0]
    batch = (x.double(), y)
    cut = CutNetwork(model, trace_step(model, batch, entropy), entropy)
    first = cut.first_pass(batch, 0)
    last = max(first.cotangents)
    found = cut.late_gradient(batch, 0, last)
    assert found is not None
    assert found[0] == first.places[last]
    torch.testing.assert_close(found[1], first.cotangents[last])
    assert cut.late_gradient(batch, 0, 99) is None
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_batch_with_a_gradient_that_is_not_finite_is_named() -> None:
    model = randomised(Convolutions())
    batches = some_batches(3, 6)
    arch = trace_step(model, batches[0], entropy)
    batches[2][0][4] = float("nan")
    with pytest.raises(ValueError, match=r"at the input of 'head' is not finite in batch 2"):
        important_samples(model, arch, batches, entropy, 0.5)


def test_fewer_samples_of_importance_are_nearer_than_as_many_at_random() -> None:
    """In a network that fits most samples, a quarter by importance errs less than a quarter at random."""
    model = Convolutions()
    batches = some_batches(8, 64)
    batches = [(x, (x.mean((1, 2, 3)) > 0).long() + (x[:, 0].mean((1, 2)) > 0.2).long()) for x, _ in batches]
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        for batch in batches:
            optimizer.zero_grad()
            entropy(model, batch).backward()
            optimizer.step()
    model = model.double().eval()
    batches = [(x.double(), y) for x, y in batches]
    arch = trace_step(model, batches[0], entropy)
    whole = matrices(model, arch, batches)

    def error(found: dict[str, Tensor]) -> float:
        return sum(float((found[g] - whole[g]).square().sum() / whole[g].square().sum()) for g in whole)

    important, random = 0.0, 0.0
    for seed in range(10):
        found = important_samples(model, arch, batches, entropy, 0.25, seed=seed)
        important += error(matrices(model, arch, found.batches, found.weigh))
        chosen = torch.randperm(8, generator=torch.Generator().manual_seed(seed))[:2]
        random += error(matrices(model, arch, [batches[i] for i in chosen]))
    assert important < 0.4 * random


# losses and batches that are refused -------------------------------------------------------------------


def _contrastive(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    z = F.normalize(model(batch[0]), dim=1)
    return F.cross_entropy(5 * z @ z.T, torch.arange(len(z)).roll(1))


def _summed(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def _balanced(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    weights = torch.bincount(batch[1], minlength=CLASSES).to(batch[0]) + 1
    return F.cross_entropy(model(batch[0]), batch[1], weight=weights)


def _fixed_size(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0].view(6, 2, 4, 3)), batch[1])


@pytest.mark.parametrize(
    ("loss_fn", "why"),
    [
        (_contrastive, "not those of the whole"),
        (_summed, "not those of the whole"),
        (_balanced, "not those of the whole"),
        (_fixed_size, "half a batch does not run"),
    ],
)
def test_losses_that_are_no_mean_over_samples_are_refused(loss_fn: Any, why: str) -> None:
    model = randomised(Convolutions())
    batch = some_batches(1, 6)[0]
    arch = trace_step(model, batch, loss_fn)
    check_separable(model, arch, batch, entropy)
    with pytest.raises(NotSeparableError, match=why):
        check_separable(model, arch, batch, loss_fn)


def test_batch_statistics_and_single_samples_are_refused() -> None:
    model = randomised(Convolutions())
    batch = some_batches(1, 6)[0]
    arch = trace_step(model, batch, entropy)
    with pytest.raises(NotSeparableError, match="leave sample_share at 1"):
        check_separable(model, arch, batch, entropy, train=True)
    with pytest.raises(NotSeparableError, match="one sample each"):
        check_separable(model, arch, some_batches(1, 1)[0], entropy)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, float("nan"), "all"])
def test_a_share_is_a_share(share: Any) -> None:
    with pytest.raises(ValueError, match="sample_share must be above 0 and at most 1"):
        SteepestSplitting(sample_share=share)


# growths -------------------------------------------------------------------------------------------------


def test_a_growth_with_important_samples_repeats_and_leaves_the_rest_alone() -> None:
    reports, states = [], []
    for _ in range(2):
        torch.manual_seed(1)
        model = Convolutions()
        batches = some_batches(12, 16)
        grower = SteepestSplitting(sample_share=0.25, solver=Lanczos(4))
        report = grow(
            model,
            batches[:8],
            entropy,
            grower=grower,
            strategy=TopK(count=2),
            confirm_batches=batches[8:],
            significance=None,
        )
        reports.append(report)
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    assert len(reports[0].splits) == 2
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_growth_that_cannot_take_samples_out_uses_all_of_them() -> None:
    """Batches of one sample, say, after a first look at larger ones."""
    batches, reports = some_batches(4, 1), []
    for part in (1.0, 0.5):
        torch.manual_seed(2)
        model = randomised(Convolutions())
        grower = SteepestSplitting(sample_share=part)
        reports.append(grow(model, batches, entropy, grower=grower, strategy=TopK(count=1)))
    whole, share = reports
    assert "one sample each" in share.notes[0]
    assert "This growth has used all samples." in share.notes[0]
    for one, other in zip(whole.splits, share.splits, strict=True):
        assert (one.group, one.neuron) == (other.group, other.neuron)
        assert torch.equal(one.displacements, other.displacements)


class Module(pl.LightningModule):
    def __init__(self, loss_fn: Any = entropy) -> None:
        super().__init__()
        self.net, self.loss_fn = Convolutions(), loss_fn

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss_fn(self.net, batch)
        self.log("train_loss", loss, on_epoch=True, on_step=False)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


def _fit(module: pl.LightningModule, grower: Any, tmp_path: Any, precision: Any = "32") -> SplittingCallback:
    x, y = torch.randn(96, 2, 4, 3), torch.randint(CLASSES, (96,))
    callback = SplittingCallback(
        trigger=Every(1), grower=grower, strategy=TopK(count=1), num_batches=6, significance=None
    )
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        accelerator="cpu",
        precision=precision,
    )
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True))
    return callback


@pytest.mark.parametrize(
    ("mixed", "precision", "share"),
    [(False, "32", 0.5), (True, "32", "auto"), (False, "bf16-mixed", "auto")],
)
def test_in_a_trainer(tmp_path: Any, mixed: bool, precision: Any, share: Any) -> None:
    grower: Any = SteepestSplitting(sample_share=share)
    module = Module()
    callback = _fit(module, Mixed((grower, GradMax())) if mixed else grower, tmp_path, precision)
    assert callback.history
    assert module.net.features[0].out_channels + module.net.features[3].out_channels > 7


@pytest.mark.parametrize("mixed", [False, True])
def test_refused_before_training(tmp_path: Any, mixed: bool) -> None:
    grower: Any = SteepestSplitting(sample_share=0.5)
    with pytest.raises(MisconfigurationException, match="mean over them.*leave sample_share at 1"):
        _fit(Module(_contrastive), Mixed((grower, GradMax())) if mixed else grower, tmp_path)


# taking samples out of batches ---------------------------------------------------------------------------


Pair = namedtuple("Pair", "image label")


@dataclass
class Record:
    image: Tensor
    names: list[str]
    scale: float


def _of(batch: Any, *which: int, size: int = 3) -> Picked:
    return Picked(batch, torch.tensor(which), size)


def test_samples_are_taken_out_of_all_kinds_of_batches() -> None:
    x = torch.arange(6.0).view(3, 2)
    names = ["a", "b", "c"]
    assert torch.equal(picked([_of(x, 0, 2)]), x[[0, 2]])
    found = picked([_of({"x": x, "meta": {"names": names, "size": 3}}, 1)])
    assert torch.equal(found["x"], x[1:2])
    assert found["meta"] == {"names": ["b"], "size": 3}
    pair = picked([_of(Pair(x, np.arange(3)), 2, 1)])
    assert isinstance(pair, Pair)
    assert torch.equal(pair.image, x[[2, 1]])
    assert pair.label.tolist() == [2, 1]
    record = picked([_of(Record(x, names, 0.5), 0, 1), _of(Record(x + 9, ["d", "e", "f"], 0.5), 2)])
    assert record.names == ["a", "b", "f"]
    assert torch.equal(record.image, torch.cat([x[:2], x[2:] + 9]))
    # boxes of every image, of different numbers
    boxes = [torch.ones(n, 4) for n in (2, 1, 4)]
    assert [len(b) for b in picked([_of([x, boxes], 2, 0)])[1]] == [4, 2]
    two = (torch.zeros(2, 3), torch.zeros(2))  # a pair of tensors, not two samples
    assert [t.shape[0] for t in picked([_of(two, 1, size=2)])] == [1, 1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"x": torch.zeros(3, 2)}, {"x": torch.zeros(3, 4)}),
        ({"x": torch.zeros(3, 2)}, {"y": torch.zeros(3, 2)}),
        ({"x": torch.zeros(3, 2), "t": 1}, {"x": torch.zeros(3, 2), "t": 2}),
        ((torch.zeros(3), torch.ones(2)), (torch.zeros(3), torch.zeros(2))),
        ((torch.zeros(3),), [torch.zeros(3)]),
        ((torch.zeros(3), torch.zeros(3)), (torch.zeros(3),)),
    ],
)
def test_batches_that_differ_in_more_than_samples_stay_apart(one: Any, other: Any) -> None:
    parts = [_of(one, 0), _of(other, 1), _of(other, 2)]
    with pytest.raises(UnlikeError):
        picked(parts)
    assert [numbers for _, numbers in joined(parts, 8)] == [[0], [1], [2]]


def test_no_sample_is_left_in_a_batch_of_its_own() -> None:
    x = torch.arange(3.0)
    parts = [_of(x, 0, 1), _of(x, 0, 1), _of(x, 0, 1), _of(x, 0, 1), _of(x, 2)]
    assert [(len(batch), numbers) for batch, numbers in joined(parts, 4)] == [(4, [0, 1]), (5, [2, 3, 4])]
