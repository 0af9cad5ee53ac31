"""Each example runs as a user starts it, on real or freshly made data, and says what it should."""

from __future__ import annotations

import gzip
import importlib.util
import re
import struct
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def _example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_quickstart_grows_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two growths in a few epochs: tables with every promised column, a comparison, TensorBoard files."""
    result = _example("quickstart").main(
        ["--fast", "--out", str(tmp_path), "--picture", str(tmp_path / "p.png")]
    )
    printed = capsys.readouterr().out
    assert result["growths"] == 2
    for part in (
        "splitting index",
        "predicted gain",
        "measured",
        "parameters",
        "MACs",
        "seed without growth",
    ):
        assert part in printed
    assert list(tmp_path.glob("quickstart/grown/events*"))
    assert (tmp_path / "p.png").stat().st_size > 10_000


def _idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """Four gzip files in the layout of Fashion-MNIST: classes differ in where the image is bright."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 600), ("t10k", 100)):
        labels = rng.integers(0, 10, count)
        images = rng.integers(0, 60, (count, 28, 28))
        for image, label in zip(images, labels, strict=True):
            image[2 * label : 2 * label + 8] += 150
        _idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        _idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", labels)
    return tmp_path


@pytest.mark.parametrize("strategy", ["knapsack", "top-k"])
def test_image_classification_reads_gzip_files_and_grows(fashion: Path, strategy: str) -> None:
    """Fashion-MNIST's files in --data-dir, one growth, and a network that has learned something."""
    arguments = ["--data-dir", str(fashion), "--fast", "--strategy", strategy, "--out", str(fashion / "runs")]
    result = _example("image_classification").main(arguments)
    assert result["growths"] == 1
    assert result["val_acc"] > 0.2


def test_idx_files_are_read_as_they_were_written(fashion: Path) -> None:
    """Bytes, shapes and scaling of the gzip reader."""
    module = _example("image_classification")
    raw = gzip.decompress((fashion / "t10k-images-idx3-ubyte.gz").read_bytes())
    expected = torch.frombuffer(bytearray(raw[16:]), dtype=torch.uint8).reshape(100, 28, 28)
    assert torch.equal(module.read_idx(fashion / "t10k-images-idx3-ubyte.gz"), expected)
    train, val, classes, channels = module.fashion_mnist_from_gzip(fashion)
    assert (len(train), len(val), classes, channels) == (600, 100, 10, 1)


@pytest.mark.slow
def test_image_folders_and_torchvision_models_work(tmp_path: Path) -> None:
    """A folder of images, a model of torchvision by name, and no change to either."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 6)):
        for label, colour in enumerate(("red", "green")):
            folder = tmp_path / part / colour
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 80, (40, 40, 3), dtype=np.uint8)
                pixels[..., label] += 150
                Image.fromarray(pixels).save(folder / f"{i}.png")
    result = _example("image_classification").main(
        ["--dataset", "folder", "--data-dir", str(tmp_path), "--image-size", "32", "--fast",
         "--arch", "mobilenet_v3_small", "--batch-size", "8", "--strategy", "top-k", "--budget", "0.05",
         "--out", str(tmp_path / "runs")]
    )  # fmt: skip
    assert result["growths"] == 1


def test_the_readme_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's code works on a user's model and loader (for fewer epochs)."""
    from modules import Classifier, loader

    text = (EXAMPLES.parent / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert "max_epochs=100" in code
    monkeypatch.chdir(tmp_path)
    model = Classifier()
    before = sum(p.numel() for p in model.parameters())
    shorter = code.replace("max_epochs=100", "max_epochs=6").replace("min_delta=0.01", "min_delta=10.0")
    exec(shorter, {"model": model, "loader": loader()})
    assert sum(p.numel() for p in model.parameters()) > before
