"""torchvision's classification models: a small member of every family, and all of them as they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from benchmarks import zoo
from lightning_split import trace
from torch import nn
from torchvision import models
from torchvision.models import efficientnet, inception, maxvit, mobilenetv3, regnet, resnet
from torchvision.models import swin_transformer as swin
from torchvision.models.googlenet import BasicConv2d, Inception

from exactness import assert_splits_exactly, depends_on_every_group, moved_by_rounding, randomise

CLASSES = 5


def _headed(build: Callable[[], nn.Module], features: int) -> nn.Module:
    """The same with a head that is not 4096 neurons wide, which are slow in float64."""
    with torch.device("meta"):
        model = build()
    model.classifier = nn.Sequential(
        nn.Linear(features, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, CLASSES)
    )
    return model.to_empty(device="cpu") if any(p.is_meta for p in model.parameters()) else model


def _vgg() -> nn.Module:
    features = models.vgg.make_layers([4, "M", 8, "M", 8], True)
    return _headed(lambda: models.VGG(features, init_weights=False), 8 * 7 * 7)


def _two_stages(**kind: Any) -> nn.Module:
    """A ResNet without its wider half."""
    model = models.ResNet(resnet.Bottleneck, [1, 2, 1, 1], CLASSES, **kind)
    model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(512, CLASSES)
    return model


def _narrow(conv: type[nn.Module], factor: int) -> Callable[..., nn.Module]:
    """The convolution of an Inception network with a fraction of the channels."""
    return lambda inputs, outputs, **kwargs: conv(
        inputs if inputs == 3 else inputs // factor, outputs // factor, **kwargs
    )


def _googlenet() -> nn.Module:
    conv = _narrow(BasicConv2d, 8)
    blocks = [conv, partial(Inception, conv_block=conv), nn.Identity]
    model = models.GoogLeNet(CLASSES, aux_logits=False, init_weights=False, blocks=blocks)
    model.fc = nn.Linear(1024 // 8, CLASSES)
    return model


def _inception() -> nn.Module:
    conv = _narrow(inception.BasicConv2d, 16)
    kinds = [getattr(inception, f"Inception{letter}") for letter in "ABCDE"]
    blocks = [conv, *(partial(kind, conv_block=conv) for kind in kinds), nn.Identity]
    model = models.Inception3(CLASSES, aux_logits=False, init_weights=False, inception_blocks=blocks)
    model.fc = nn.Linear(2048 // 16, CLASSES)
    return model


def _regnet(se_ratio: float | None) -> nn.Module:
    params = regnet.BlockParams.from_init_params(
        depth=6, w_0=24, w_a=24, w_m=2.0, group_width=8, se_ratio=se_ratio
    )
    return models.RegNet(params, CLASSES, stem_width=8)


def _mobilenet_v3() -> nn.Module:
    block = mobilenetv3.InvertedResidualConfig
    rows = [
        (8, 3, 8, 8, True, "RE", 2, 1),
        (8, 3, 24, 16, False, "RE", 2, 1),
        (16, 5, 40, 16, True, "HS", 1, 1),
    ]
    return models.MobileNetV3([block(*row, width_mult=1.0) for row in rows], 24, CLASSES)


def _efficientnet(fused: bool) -> nn.Module:
    first: Any = (
        efficientnet.FusedMBConvConfig(1, 3, 1, 8, 8, 2)
        if fused
        else efficientnet.MBConvConfig(1, 3, 1, 8, 8, 2)
    )
    rows = [first, efficientnet.MBConvConfig(4, 5, 2, 8, 16, 2)]
    return models.EfficientNet(rows, 0.0, num_classes=CLASSES, last_channel=24)


def _swin(version: int) -> nn.Module:
    kind: dict[str, Any] = {}
    if version == 2:
        kind = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
    return models.SwinTransformer([4, 4], 8, [2, 1], [2, 4], [2, 2], num_classes=CLASSES, **kind)


def _convnext() -> nn.Module:
    block = models.convnext.CNBlockConfig
    return models.ConvNeXt([block(8, 16, 1), block(16, None, 1)], num_classes=CLASSES)


def _maxvit() -> nn.Module:
    return maxvit.MaxVit((32, 32), 8, 2, [8, 16], [1, 1], 4, 0.0, num_classes=CLASSES)


# A small member of each family, the size of its images, and the share of hidden channels that can be split.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], int, float]] = {
    # 3 x 3 maps, resampled to 6 x 6: a flattened neuron is not constant in space
    "alexnet": (lambda: _headed(models.AlexNet, 256 * 6 * 6), 127, 1.0),
    "vgg": (_vgg, 32, 1.0),
    "resnet": (lambda: models.ResNet(resnet.BasicBlock, [1, 2, 1, 1], CLASSES), 32, 1.0),
    "wide_resnet": (lambda: _two_stages(width_per_group=128), 32, 1.0),
    "resnext": (lambda: _two_stages(groups=4, width_per_group=4), 32, 1.0),
    "densenet": (lambda: models.DenseNet(4, (2, 2, 2), 8, num_classes=CLASSES), 32, 1.0),
    "squeezenet": (lambda: models.SqueezeNet("1_1", CLASSES), 32, 1.0),
    "googlenet": (_googlenet, 64, 1.0),
    "inception": (_inception, 96, 1.0),
    "mnasnet": (lambda: models.MNASNet(0.2, CLASSES), 64, 1.0),
    "mobilenet_v2": (
        lambda: models.MobileNetV2(CLASSES, inverted_residual_setting=[[1, 8, 1, 1], [3, 8, 2, 2]]),
        32,
        1.0,
    ),
    "mobilenet_v3": (_mobilenet_v3, 32, 1.0),
    "efficientnet": (lambda: _efficientnet(False), 32, 1.0),
    "efficientnet_v2": (lambda: _efficientnet(True), 32, 1.0),
    "shufflenet": (lambda: models.ShuffleNetV2([2, 3, 2], [8, 16, 24, 32, 32], CLASSES), 64, 1.0),
    "regnet_x": (lambda: _regnet(None), 32, 1.0),
    "regnet_y": (lambda: _regnet(0.25), 32, 1.0),
    "vit": (lambda: models.VisionTransformer(32, 8, 2, 4, 24, 40, num_classes=CLASSES), 32, 0.4),
    "swin": (lambda: _swin(1), 32, 0.4),
    "swin_v2": (lambda: _swin(2), 32, 0.3),
    "convnext": (_convnext, 32, 0.5),
    "maxvit": (_maxvit, 32, 0.5),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("double")
def test_a_member_of_each_family_splits_exactly(family: str) -> None:
    """Rule 2 on every group, and how much of the model those groups are."""
    build, size, share = FAMILIES[family]
    model, x = build().double(), torch.randn(2, 3, size, size)
    randomise(model, x)
    arch = assert_splits_exactly(model, x)
    found, hidden = zoo.share(arch)
    assert found >= share * hidden, str(arch)


@pytest.mark.parametrize("family", ["efficientnet", "mnasnet", "regnet_y", "resnet"])
@pytest.mark.usefixtures("double")
def test_rounding_lies_far_below_what_is_asked_for_and_a_mistake_far_above(family: str) -> None:
    """The control of the tests here: the randomised networks neither amplify rounding nor hide neurons."""
    build, size, _ = FAMILIES[family]
    model, x = build().double(), torch.randn(2, 3, size, size)
    randomise(model, x)
    assert moved_by_rounding(model, x) < 1e-11
    arch = trace(model, x)
    silent = depends_on_every_group(model, x, arch, visible=1e-6)
    assert len(silent) <= len(arch.groups) // 10, silent  # one neuron of each is moved, and ReLUs may be dead


@pytest.mark.usefixtures("double")
def test_a_stage_of_more_shuffles_than_halvings_is_refused_with_the_reason() -> None:
    """A half of 6 channels can be halved once, and three shuffles are cut into halves but for the last."""
    model, x = models.ShuffleNetV2([2, 3, 2], [8, 8, 12, 32, 32], CLASSES), torch.randn(2, 3, 64, 64)
    randomise(model, x)
    refused = {u.name: u.reason for u in assert_splits_exactly(model, x).unsplittable}
    assert refused.keys() == {"stage3.0.branch1.2", "fc"}
    assert "repeated channel shuffles" in refused["stage3.0.branch1.2"]


@pytest.mark.slow
@pytest.mark.xdist_group("zoo")  # one after the other: the largest models take 10 GB
@pytest.mark.parametrize("name", zoo.names())
def test_every_classification_model_splits_exactly(name: str) -> None:
    """Rule 2 on the models as they are, each in a process that gives its memory back."""
    assert zoo.in_process("deviation", name) < 1e-9
