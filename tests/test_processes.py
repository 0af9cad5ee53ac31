"""SplittingCallback on two processes: one decision, equal ranks, exact resumes, and clean ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning_split import (
    Every,
    Folding,
    GradMax,
    KnapsackEnergy,
    MeasuredLatency,
    Mixed,
    NewNeurons,
    Plateau,
    SteepestSplitting,
    enable_growth,
)
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, Subset

from modules import Classifier, ResumableLoader, assert_same, images, loader, trainer, two_splits, widths

ROOT = Path(__file__).parents[1]


class Distributed(Classifier):
    """Logs a metric that stalls on rank 0 alone, and one that is averaged over the ranks."""

    def __init__(self, unused: bool = False) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3) if unused else None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("mean_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        self.log("step_loss", loss, on_step=True, on_epoch=False)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("plan", float(-self.current_epoch * self.global_rank), sync_dist=False)


class Taught(Distributed):
    """With a teacher that follows the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = deepcopy(self.net).requires_grad_(False)

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            for mine, other in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                mine.lerp_(other, 0.1)


class ByHand(Distributed):
    """Steps its optimizer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
        optimizer.step()


class Enabled(Distributed):
    """Spawned workers send grown weights back to a process without callbacks."""

    def __init__(self) -> None:
        super().__init__()
        enable_growth(self)


def _loss(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module.net(batch[0]), batch[1])


def _everything() -> dict[str, Any]:
    members = [SteepestSplitting(), NewNeurons(draws=1), GradMax(), Folding(clusters=2, samples=16)]
    return {"grower": Mixed(members), "step_size": "line_search"}


def _fastest() -> KnapsackEnergy:
    return KnapsackEnergy(100.0, per_group_max=1, cost=MeasuredLatency(factors=(1.0, 2.0), repeats=1))


# what each of two processes runs ------------------------------------------------------------------


def _fit(folder: Path, case: dict[str, Any], ckpt_path: str | None = None, name: str = "whole") -> list[Any]:
    """One run; the states of both processes, on both."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    pl.seed_everything(0)  # Lightning shuffles the shards by it
    # Weights and random state start apart on the ranks: only DDP and the callback align them.
    torch.manual_seed(rank + (0 if ckpt_path is None else 99))
    manual = case.get("manual", False)
    module = ByHand() if manual else Distributed(case.get("unused", False))
    if case.get("taught"):
        module = Taught()
    for place in (0, 5, 7) if case.get("normed") else ():
        weight_norm(module.net[place])
    monitor = case.get("monitor", "plan")
    callback = two_splits(
        trigger=Plateau(monitor, **case.get("plateau", {"patience": 1, "min_delta": 0.5})),
        loss_fn=_loss if manual else None,
        **(_everything() if case.get("mixed") else {}),
        **({"grower": SteepestSplitting(sample_share=0.5)} if case.get("important") else {}),
        **({"strategy": _fastest()} if case.get("latency") else {}),
    )
    steps = case.get("every_steps")
    save = ModelCheckpoint(
        folder / name,
        save_top_k=-1,
        filename="{step}",
        **({"every_n_train_steps": steps} if steps else {"save_on_train_epoch_end": True}),
    )
    resumes = case.get("resume", False)
    ema = [EMAWeightAveraging(decay=0.9)] if case.get("ema") else []
    t = trainer(
        folder,
        callback,
        *ema,
        *([save] if resumes else []),
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo", **case.get("ddp", {})),
        accumulate_grad_batches=case.get("accumulate", 1),
        enable_checkpointing=resumes,
        max_epochs=5,
        use_distributed_sampler=not steps,
    )
    data: Any = loader(96)
    if steps:  # each rank has one batch of its own, over and over: Lightning starts loaders anew on resume
        data = DataLoader(Subset(images(), list(range(16 * rank, 16 * rank + 16)) * 3), 16)
    if case.get("stream"):
        data = ResumableLoader(Subset(images(96), range(48 * rank, 48 * rank + 48)))
    t.fit(module, data, ckpt_path=ckpt_path)
    names = {p: n for n, p in module.named_parameters()}
    mine = {
        "widths": widths(module),
        "history": callback.history,
        "parameters": {n: p.detach() for n, p in module.named_parameters()},
        "buffers": dict(module.named_buffers()),
        "optimizer": {names[p]: dict(state) for p, state in t.optimizers[0].state.items()},
    }
    both: list[Any] = [None, None]
    torch.distributed.all_gather_object(both, mine)
    return both


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step="))


def _script(folder: Path, cases: dict[str, dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    states: dict[str, Any] = {}
    for name, case in cases.items():
        place = folder / name
        states[name] = {"whole": _fit(place, case)}
        if case.get("resume"):
            for path in sorted((place / "whole").glob("*.ckpt"), key=_step)[:-1]:
                states[name][path.stem] = _fit(place, case, str(path), f"from {path.stem}")
    if torch.distributed.get_rank() == 0:
        torch.save(states, folder / "states.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _spawning(folder: Path, strategy: str) -> None:
    """A parent without callbacks gets the grown weights of its children."""
    torch.set_num_threads(1)
    pl.seed_everything(0)
    module = Enabled()
    t = trainer(folder, two_splits(trigger=Every(1)), devices=2, strategy=strategy, max_epochs=3)
    t.fit(module, loader(96))
    torch.save({"widths": widths(module), "metrics": dict(t.callback_metrics)}, folder / "states.pt")


def _run(folder: Path, **options: Any) -> Any:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MASTER_", "PL_", "LOCAL_RANK"))}
    result = subprocess.run(
        [sys.executable, __file__, json.dumps({"folder": str(folder)} | options)],
        env=inherited | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return torch.load(folder / "states.pt")


def _assert_ranks_agree(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    for part in ("widths", "history", "parameters", "optimizer"):
        assert_same(first[part], second[part], part)
    assert [e["epoch"] for e in first["history"]] == [2, 4]
    assert sum(first["widths"]) == 3 + 8 + 2 * 2
    for name, state in first["optimizer"].items():
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == first["parameters"][name].shape


# the tests --------------------------------------------------------------------------------------------


def test_two_processes_stay_together_through_growths(tmp_path: Path) -> None:
    """DDP: after two growths weights, moments and history are bit-equal on both ranks.

    The monitored metric differs between the ranks; both grow when rank 0's says so.
    """
    ranks = _run(tmp_path, cases={"plain": {}})["plain"]["whole"]
    _assert_ranks_agree(ranks)
    # each rank saw its own half of the data: equal states are the collectives' doing
    assert not torch.equal(
        ranks[0]["buffers"]["net.1.running_mean"], ranks[1]["buffers"]["net.1.running_mean"]
    )


@pytest.mark.slow
def test_every_kind_of_ddp_keeps_the_ranks_together(tmp_path: Path) -> None:
    """Also those under which ranks would drift apart silently."""
    cases = {
        "accumulate": {"accumulate": 2},
        "static graph": {"ddp": {"static_graph": True}},
        "unused": {"unused": True, "ddp": {"find_unused_parameters": True}, "accumulate": 2},
        "bucket view": {"ddp": {"gradient_as_bucket_view": True}},
        "by hand": {"manual": True},
        "all growers": {"mixed": True},
        "by hand, static graph": {"manual": True, "ddp": {"static_graph": True}},
        "by hand, unused": {"manual": True, "ddp": {"find_unused_parameters": True}},
        "average": {"ema": True},
        "teacher": {"taught": True},
        "measured latency": {"latency": True},
        "weight norm": {"normed": True},
        "important samples": {"important": True},
    }
    for name, states in _run(tmp_path, cases=cases).items():
        assert len(states["whole"]) == 2, name
        _assert_ranks_agree(states["whole"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"ema": True},
        {"every_steps": 1, "monitor": "mean_loss"},
        {"every_steps": 1, "monitor": "mean_loss", "ema": True},
        # of six steps the first is the best and five are no better: growths after steps 6 and 12
        {
            "every_steps": 1,
            "monitor": "step_loss",
            "plateau": {"interval": "step", "patience": 5, "min_delta": 9.0},
        },
        {"every_steps": 1, "monitor": "mean_loss", "stream": True},
        {"normed": True, "ema": True},
        {"important": True, "every_steps": 1, "monitor": "mean_loss", "stream": True},
    ],
    ids=[
        "epochs",
        "epochs, average",
        "steps",
        "steps, average",
        "by step",
        "streams",
        "weight norm, average",
        "important samples of streams",
    ],
)
def test_resuming_two_processes_equals_the_uninterrupted_run(tmp_path: Path, case: dict[str, Any]) -> None:
    """From every checkpoint but the last: the same growths and bit-identical weights and moments.

    The steps' monitored mean differs between the ranks until it is reduced, in mid-epoch too.
    """
    states = _run(tmp_path, cases={"run": case | {"resume": True}})["run"]
    whole = states.pop("whole")
    _assert_ranks_agree(whole)
    assert len(states) == (14 if "every_steps" in case else 4)
    for name, ranks in states.items():
        _assert_ranks_agree(ranks)
        for part in ("history", "parameters", "optimizer"):
            assert_same(ranks[0][part], whole[0][part], f"{name}: {part}")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_children_send_grown_weights_home(tmp_path: Path, strategy: str) -> None:
    """With enable_growth in its __init__ the parent's module, where no callback ran, takes them."""
    found = _run(tmp_path, spawn=strategy)
    assert sum(found["widths"]) == 3 + 8 + 2 * 2


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if "spawn" in given:
        _spawning(Path(given["folder"]), given["spawn"])
    else:
        _script(Path(given["folder"]), given["cases"])
