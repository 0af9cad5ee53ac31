"""The benchmarks of the splitting phase run, and print what they promise."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def _benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Files like those of Fashion-MNIST: 1280 images, whose brightness tells the class."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 1280).astype(np.uint8)
    images = (20 * labels[:, None, None] + rng.integers(0, 60, (1280, 28, 28))).astype(np.uint8)
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        (tmp_path / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes(), 1))
    return tmp_path


def test_times_and_scaling_are_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every column of the table is there, and the file holds the same rows."""
    module = _benchmark("splitting_phase", monkeypatch)
    monkeypatch.setitem(module.LARGE, "small", _small)
    out = tmp_path / "rows.json"
    rows = module.main(["small", "--batch", "4", "--repeats", "1", "--phase-batches", "1", "--eigsh"])
    rows += module.main(["small", "--batch", "4", "--repeats", "1", "--json", str(out)])
    assert set(rows[0]) > {"product", "preparation", "phase of 1+2 batches", "official", "eigsh", "floor"}
    assert json.loads(out.read_text()) == [rows[1]]
    assert all(value > 0 for row in rows for value in row.values() if isinstance(value, float))


def _small() -> nn.Module:
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(pool, nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 10))


def test_accepted_splits_are_counted(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On images that are easily told apart, for each number of fresh batches."""
    module = _benchmark("splitting_phase", monkeypatch)
    options = ["--splits", "mlp", "--data-dir", str(data), "--repeats", "1", "--batches", "8"]
    options += ["--width", "4", "--epochs", "2", "--held-out", "3", "--estimate", "8"]
    rows = module.main(options)
    assert [row["significance"] for row in rows] == ["None", "0.01"]
    assert rows[0]["accepted"] == 3
    assert rows[0]["surely"] <= rows[0]["lower the loss"] <= 3 - rows[0]["surely raise it"]
    assert rows[1]["accepted"] <= rows[1]["passed"] <= rows[1]["of candidates"] == 8
    assert module.main([*options, "--tested"]) == rows[1:]


def test_shares_have_their_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wilson's, as in his paper's formula: 8 of 10, none and all."""
    interval = _benchmark("splitting_phase", monkeypatch)._interval
    assert interval(8, 10) == "49.0% to 94.3%"
    assert interval(100, 100) == "96.3% to 100.0%"
    assert interval(0, 4).startswith("0.0%")
    assert interval(0, 0) == ""


def test_held_out_samples_are_judged_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, in the batches' order."""
    module = _benchmark("splitting_phase", monkeypatch)
    torch.manual_seed(0)
    net, x, y = nn.Linear(3, 4).double(), torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 0])
    found = module._losses(net, [(x[:3], y[:3]), (x[3:], y[3:])])
    expected = -net(x.double()).log_softmax(1)[torch.arange(5), y]
    torch.testing.assert_close(found, expected.detach())
    assert found.dtype == torch.float64


def test_qualities_are_compared(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows for all samples and for a share of them, a ceiling for each number of batches, and the recipe."""
    module = _benchmark("rayleigh_quality", monkeypatch)
    options = [
        "mlp",
        "--data-dir",
        str(data),
        "--width",
        "4",
        "--batch",
        "64",
        "--exact",
        "30",
        "--epochs",
        "1",
    ]
    rows = module.main(
        [*options, "--batches", "2", "--products", "4", "--shares", "0.5", "auto", "--official-epochs", "1"]
    )
    assert [(row["solver"], row["batches"], row["share"]) for row in rows] == [
        ("Lanczos(4)", 2, 1.0),
        ("Lanczos(4)", 2, 0.5),
        ("Lanczos(4)", 2, "auto"),
        ("exact, of the sample", 2, 1.0),
        ("official, one end", 12, 1.0),
    ]
    # No direction has less than the smallest eigenvalue, over all thirds together.
    assert all(row["held-out / exact"] <= 1 + 1e-3 for row in rows)
    assert rows[0]["steps"] > 0
