"""timm's models, converted, beside themselves left eager."""

from collections import Counter

import pytest
import torch
from converting import (
    assert_same,
    assert_whole_model_agrees,
    kinds,
    randomized,
    reasons,
    results,
)

import fastres
from fastres.compat import import_timm

pytestmark = pytest.mark.usefixtures("one_thread")

timm = import_timm()

BOTTLENECKS = {"conv_bn_relu": 33, "conv_bn_add_relu": 16, "conv_bn": 4}
# Attention stands between the last batch norm and the addition: a block's addition is fused with
# its projection's batch norm, where it has one, or with the ReLU alone.
ATTENTION = {"conv_bn_relu": 33, "conv_bn": 16, "conv_bn_add_relu": 4, "add_relu": 12}
SQUEEZE = {"conv": 32}
SITES = {
    "resnet18": {"conv_bn_relu": 9, "conv_bn_add_relu": 8, "conv_bn": 3},
    "resnet50": BOTTLENECKS,
    # the deep stem's last convolution meets its batch norm in the parent: 3 instead of 1
    "resnet50d": {**BOTTLENECKS, "conv_bn_relu": 35},
    "resnet26t": {"conv_bn_relu": 19, "conv_bn_add_relu": 8, "conv_bn": 4},
    "wide_resnet50_2": BOTTLENECKS,
    "resnext50_32x4d": BOTTLENECKS,
    "seresnet50": ATTENTION | SQUEEZE,
    "ecaresnet50d": {**ATTENTION, "conv_bn_relu": 35},
    "resnetv2_50": {"bn_relu": 17, "conv_bn_relu": 32, "conv": 22},
    "densenet121": {"conv_bn_relu": 59, "bn_relu": 62, "conv": 61},
}


@pytest.mark.parametrize("name", SITES)
def test_every_site_is_fused(name):
    with torch.device("meta"):
        converted = fastres.convert(timm.create_model(name, pretrained=False))
    assert kinds(converted) == SITES[name]
    assert converted._fastres_entry == "always"


@pytest.mark.parametrize("name", SITES)
def test_timm_model(name):
    layers = {"layers": [2, 1, 1, 1]}  # enough to have each site
    if name == "resnet18":
        layers = {}
    elif name.startswith("densenet"):
        layers = {"block_config": (2, 2, 1, 1)}
    model = timm.create_model(name, pretrained=False, num_classes=10, **layers)
    for module in model.modules():  # timm starts residual branches at zero: errors would hide
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    converted = assert_whole_model_agrees(model, torch.randn(2, 3, 33, 40))
    assert kinds(converted.train()).keys() == SITES[name].keys()
    has_linear = name != "resnetv2_50"  # whose last layer is a convolution
    assert ("mean_linear" in kinds(converted.eval())) == has_linear


def test_what_does_not_fit_is_kept_with_the_reason():
    with torch.device("meta"):
        preactivated = timm.create_model("resnetv2_50", pretrained=False)
        standardised = timm.create_model("resnetv2_50x1_bit", pretrained=False)
    assert reasons(fastres.convert(preactivated)) == {}
    why = Counter(reasons(fastres.convert(standardised)).values())
    assert why["StdConv2d is not nn.Conv2d"] == 53


def test_other_activations_inside_a_batch_norm():
    model = timm.create_model("test_efficientnet", pretrained=False, num_classes=10)
    converted = assert_whole_model_agrees(randomized(model), torch.randn(2, 3, 33, 40))
    assert kinds(converted) == {"conv_bn": 13, "conv": 4, "mean_linear": 1}
    assert reasons(converted) == {}
    for m in (converted, model):  # the activation is called as it was
        act = m.blocks[1][0].bn1.act
        act.register_forward_hook(lambda module, inputs, output: output * 2)
    x = torch.randn(2, 3, 33, 40).double()
    assert_same(results(converted, [x], True), results(model, [x], True))
    assert reasons(converted) == {}


@pytest.mark.parametrize(
    "options",
    [
        {"drop_path_rate": 0.5}, {"aa_layer": timm.layers.BlurPool2d}, {"drop_block_rate": 0.2},
        {"act_layer": torch.nn.SiLU}, {"drop_rate": 0.3},
    ],
    ids=str,
)  # fmt: skip
def test_regularised_variants(options):
    model = timm.create_model("resnet26", layers=[1, 1, 1, 1], num_classes=7, **options).double()
    converted = fastres.convert(model, inplace=False)
    x = torch.randn(2, 3, 40, 40).double()
    for training in (True, False):
        ours, eager = (results(m, [x], training) for m in (converted, model))
        assert_same(ours, eager)
    assert sum(kinds(converted).values()) > 0


def test_features_and_checkpointing_switched_on_later():
    model = timm.create_model("resnet18", pretrained=False).double()
    converted = fastres.convert(model, inplace=False)
    x = torch.randn(2, 3, 40, 40).double()
    ours, eager = (m.eval().forward_features(x) for m in (converted, model))
    torch.testing.assert_close(ours, eager)
    for m in (converted, model):
        m.set_grad_checkpointing()
    ours, eager = (results(m, [x], True) for m in (converted, model))
    # without reentry a checkpoint's second run ends before ours counts its last batch
    for found in (ours, eager):
        for name in [name for name in found if name.endswith("num_batches_tracked")]:
            del found[name]
    assert_same(ours, eager)
    for m in (converted, model):
        for name, buffer in m.named_buffers():
            if name.endswith("num_batches_tracked"):
                buffer.zero_()
        m.set_grad_checkpointing(False)
        torch.manual_seed(1)
        m.reset_classifier(3)
        m.double()
    assert_same(results(converted, [x], False), results(model, [x], False))
    assert kinds(converted)["conv_bn_add_relu"] == 8


def test_feature_lists():
    model = timm.create_model("resnet18", pretrained=False, features_only=True).double()
    converted = fastres.convert(model, inplace=False)
    x = torch.randn(2, 3, 40, 40).double()
    assert_same(results(converted, [x], True), results(model, [x], True))
    assert kinds(converted)["conv_bn_add_relu"] == 8
