"""Modules that others wrote: Lightning's demos, a GAN, an autoencoder, Hugging Face classifiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.demos import LightningTransformer
from lightning_split import Every, SplittingCallback, TopK
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from modules import trainer


def _callback(**options: Any) -> SplittingCallback:
    defaults: dict[str, Any] = {
        "trigger": Every(1),
        "strategy": TopK(count=4),
        "num_batches": 2,
        "confirm_batches": 2,
        "verbose": False,
    }
    return SplittingCallback(**(defaults | options))


class Moved(pl.Callback):
    """Notes which parameters the last batch did not move."""

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        self.before = {n: p.detach().clone() for n, p in module.named_parameters()}

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        held = self.before
        self.resting = [n for n, p in module.named_parameters() if torch.equal(p, held[n])]


def _fit(path: Path, module: pl.LightningModule, data: Any, **options: Any) -> SplittingCallback:
    callback, moved = _callback(**options.pop("splitting", {})), Moved()
    trainer(path, callback, moved, **({"max_epochs": 3} | options)).fit(module, data)
    assert [e["epoch"] for e in callback.history] == [1, 2]
    assert all(e["num_splits"] for e in callback.history)
    assert not moved.resting
    return callback


class Transformer(LightningTransformer):
    """Without its download."""

    def prepare_data(self) -> None:
        pass


def test_lightnings_transformer(tmp_path: Path) -> None:
    """The demo's encoder and decoder layers grow in their feed-forward parts; its positions are kept."""
    module = Transformer(vocab_size=20)
    module.model = type(module.model)(vocab_size=20, ninp=8, nhead=2, nhid=6, nlayers=1)
    tokens = torch.randint(0, 20, (12, 9), generator=torch.Generator().manual_seed(0))
    data = TensorDataset(tokens[:, :-1], tokens[:, 1:])
    callback = _fit(tmp_path, module, DataLoader(data, 4))
    layer = module.model.transformer.encoder.layers[0]
    grown = {name for e in callback.history for name, *_ in e["splits"]}
    assert grown
    assert layer.linear1.out_features == layer.linear2.in_features


class Autoencoder(pl.LightningModule):
    """Strided convolutions down, transposed ones up."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.GELU()),
            *(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Tanh()),
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(4, 3, 2, stride=2), nn.GELU(), nn.ConvTranspose2d(3, 1, 2, stride=2)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        loss = F.mse_loss(self.decoder(self.encoder(x)), x)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.01)


def test_an_autoencoder(tmp_path: Path) -> None:
    """Every hidden width grows, the bottleneck too."""
    module = Autoencoder()
    data = DataLoader(TensorDataset(torch.randn(12, 1, 8, 8)), 4)
    callback = _fit(tmp_path, module, data, splitting={"strategy": TopK(fraction=0.9), "significance": None})
    before, after = callback.history[0]["widths_before"], callback.history[-1]["widths_after"]
    assert before == {"encoder.0": 3, "encoder.2": 4, "decoder.0": 3}
    assert all(after[name] > width for name, width in before.items())
    assert module.decoder[2].out_channels == 1


class Gan(pl.LightningModule):
    """Lightning's own GAN example in small: manual optimization, two optimizers, toggling."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU(0.2), nn.Linear(6, 5), nn.Tanh())
        self.discriminator = nn.Sequential(nn.Linear(5, 6), nn.LeakyReLU(0.2), nn.Linear(6, 1))

    def loss(self, real: Tensor, which: int) -> Tensor:
        fake = self.generator(torch.randn(len(real), 4))
        ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
        if which == 0:
            return F.binary_cross_entropy_with_logits(self.discriminator(fake), ones)
        judged = self.discriminator(real), self.discriminator(fake.detach())
        return sum(map(F.binary_cross_entropy_with_logits, judged, (ones, zeros))) / 2

    def training_step(self, batch: Any) -> None:
        for which, optimizer in enumerate(self.optimizers()):
            self.toggle_optimizer(optimizer)
            loss = self.loss(batch[0], which)
            self.log(f"loss_{which}", loss, prog_bar=True)
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        betas = (0.5, 0.999)
        one = torch.optim.Adam(self.generator.parameters(), 0.002, betas)
        two = torch.optim.Adam(self.discriminator.parameters(), 0.002, betas)
        return [one, two], []


@pytest.mark.parametrize(("which", "grows"), [(0, "generator"), (1, "discriminator")])
def test_a_gan(tmp_path: Path, which: int, grows: str) -> None:
    """loss_fn says whose loss; the images keep their size, though only the other loss reads real ones."""
    module = Gan()
    callback = _fit(
        tmp_path,
        module,
        DataLoader(TensorDataset(torch.randn(24, 5)), 8),
        splitting={"loss_fn": lambda m, batch: m.loss(batch[0], which), "strategy": TopK(fraction=0.9)},
    )
    grown = {name for e in callback.history for name, *_ in e["splits"]}
    assert f"{grows}.0" in grown
    assert "generator.2" not in grown
    if which == 0:
        assert "different optimizers" in callback.barred["generator.2"]
    assert module.generator[2].out_features == module.discriminator[0].in_features == 5
    assert [e["step"] for e in callback.history] == [3, 6]


class TextClassifier(pl.LightningModule):
    """The usual wrapper: the model returns its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        from transformers import get_linear_schedule_with_warmup

        gentle = [p for n, p in self.model.named_parameters() if "bias" in n or "LayerNorm" in n]
        known = {id(p) for p in gentle}
        others = [p for p in self.model.parameters() if id(p) not in known]
        groups = [{"params": others, "weight_decay": 0.01}, {"params": gentle, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, 1e-3)
        schedule = get_linear_schedule_with_warmup(optimizer, 2, 20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("name", ["Bert", "DistilBert"])
def test_hugging_face_text_classifiers(tmp_path: Path, name: str) -> None:
    """Feed-forward layers grow; weight decay groups keep their members."""
    transformers = pytest.importorskip("transformers")
    small = {
        "Bert": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6},
        "DistilBert": {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 6},
    }[name]
    config = getattr(transformers, f"{name}Config")(vocab_size=30, max_position_embeddings=8, **small)
    model = getattr(transformers, f"{name}ForSequenceClassification")(config)
    model.train()
    rng = torch.Generator().manual_seed(0)
    samples = [
        {
            "input_ids": torch.randint(0, 30, (7,), generator=rng),
            "attention_mask": torch.ones(7, dtype=torch.long),
            "labels": torch.tensor(i % 2),
        }
        for i in range(12)
    ]
    module = TextClassifier(model)
    callback = _callback(include=["*.intermediate.dense", "*.lin1"], significance=None)
    t = trainer(tmp_path, callback, max_epochs=3)
    t.fit(module, DataLoader(samples, 4))
    assert [e["epoch"] for e in callback.history] == [1, 2]
    assert all(e["num_splits"] for e in callback.history)
    decay, free = t.optimizers[0].param_groups
    assert (decay["weight_decay"], free["weight_decay"]) == (0.01, 0.0)
    names = {id(p): n for n, p in module.named_parameters()}
    assert all("bias" in names[id(p)] or "LayerNorm" in names[id(p)] for p in free["params"])
    assert len(decay["params"]) + len(free["params"]) == len(list(module.parameters()))
