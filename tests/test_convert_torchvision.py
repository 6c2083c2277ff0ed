"""torchvision's models, converted, beside themselves left eager."""

import pytest
import torch
from agreement import Calls
from converting import assert_same, assert_whole_model_agrees, kinds, reasons, results
from torch import nn

import fastres
from fastres.compat import import_torchvision
from fastres.memory import peak_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

torchvision = import_torchvision()
models = torchvision.models
Bottleneck = models.resnet.Bottleneck
MBConvConfig = models.efficientnet.MBConvConfig


BOTTLENECKS = {"conv_bn_relu": 33, "conv_bn_add_relu": 16, "conv_bn": 4}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", {"conv_bn_relu": 9, "conv_bn_add_relu": 8, "conv_bn": 3}),
        ("resnet50", BOTTLENECKS),
        ("resnext50_32x4d", BOTTLENECKS),
        ("wide_resnet50_2", BOTTLENECKS),
        ("resnet152", {"conv_bn_relu": 101, "conv_bn_add_relu": 50, "conv_bn": 4}),
    ],
)
def test_every_site_of_a_resnet_is_fused(name, expected):
    with torch.device("meta"):
        converted = fastres.convert(getattr(models, name)())
    assert kinds(converted) == expected and reasons(converted) == {}
    assert converted._fastres_entry == "always"


@pytest.mark.parametrize(
    "make",
    [
        lambda: models.resnet18(num_classes=10),
        lambda: models.resnet50(num_classes=10),
        # as resnext50_32x4d and wide_resnet50_2, with fewer blocks
        lambda: models.ResNet(Bottleneck, [1, 1, 1, 1], 10, groups=32, width_per_group=4),
        lambda: models.ResNet(Bottleneck, [1, 1, 1, 1], 10, width_per_group=128),
    ],
    ids=["resnet18", "resnet50", "resnext", "wide_resnet"],
)
def test_resnets(make):
    assert_whole_model_agrees(make(), torch.randn(2, 3, 33, 40))


def test_zero_initialised_residuals_and_dilation():
    model = models.ResNet(
        Bottleneck, [1, 1, 2, 1], 4, zero_init_residual=True,
        replace_stride_with_dilation=[False, True, True],
    )  # fmt: skip
    converted = assert_whole_model_agrees(model, torch.randn(2, 3, 33, 35))
    assert kinds(converted)["conv_bn_add_relu"] == 5


def segmenter(name: str) -> nn.Module:
    return getattr(models.segmentation, name)(
        weights=None, weights_backbone=None, num_classes=3, aux_loss=True
    )


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50"])
def test_every_site_of_a_segmenter_is_fused(name):
    with torch.device("meta"):
        converted = fastres.convert(segmenter(name))
    # 33 in the backbone, one in the auxiliary head, the head's (DeepLab: five branches and two)
    head = 1 if name.startswith("fcn") else 7
    expected = {"conv_bn_relu": 33 + 1 + head, "conv_bn_add_relu": 16, "conv_bn": 4, "conv": 2}
    assert kinds(converted) == expected and reasons(converted) == {}
    assert converted._fastres_entry == "in eval"  # its dropouts draw in memory order


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50"])
def test_segmentation(name):
    model = segmenter(name)
    for layer in ("layer1", "layer2", "layer3", "layer4"):  # the first blocks will do
        model.backbone[layer] = model.backbone[layer][:1]
    # the image branch of DeepLab normalises two values a channel: 1 / std amplifies
    converted = assert_whole_model_agrees(model, torch.randn(2, 3, 33, 40), scale=1e3)
    output = converted.eval()(torch.randn(1, 3, 33, 40).double())
    assert list(output) == ["out", "aux"]


def detector() -> nn.Module:
    frozen = torchvision.ops.misc.FrozenBatchNorm2d
    model = models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, norm_layer=frozen, num_classes=3, min_size=48,
        max_size=64,
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, frozen):
            module.running_var.uniform_(1.0, 2.0)
            module.running_mean.normal_(0, 0.1)
    return model.double()


def test_detection_backbone_with_frozen_batch_norms():
    model = detector()
    converted = fastres.convert(model, inplace=False)
    pyramid = {"conv": 9}  # 8 of the levels', and one of the region proposals' head
    assert kinds(converted) == {"conv_bn_relu": 33, "conv_bn_add_relu": 16, "conv_bn": 4} | pyramid
    x = torch.randn(1, 3, 33, 40).double()
    for training in (True, False):
        ours, eager = (
            results(m.backbone, [x], training, grad=training) for m in (converted, model)
        )
        assert_same(ours, eager)
    out = converted.backbone(x)
    assert list(out) == list(model.backbone(x)) and type(out) is type(model.backbone(x))


def test_detector_up_to_its_regions():
    """The whole detector needs nms, which no CPU-only installation need have."""
    model = detector().eval()
    converted = fastres.convert(model, inplace=False)
    image = torch.rand(3, 48, 64).double()
    found = []
    for m in (converted, model):
        images, _ = m.transform([image])
        with torch.no_grad():
            features = m.backbone(images.tensors)
            objectness, deltas = m.rpn.head(list(features.values()))
        found.append([*features.values(), *objectness, *deltas])
    for ours, eager in zip(*found, strict=True):
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, eager)


def _small_efficientnet():
    """Its stochastic depth is a function that torch.fx.wrap hides from a trace."""
    stages = [
        MBConvConfig(1, 3, 1, 16, 16, 2, 1.0, 1.0),
        MBConvConfig(4, 3, 2, 16, 24, 1, 1.0, 1.0),
    ]
    return models.EfficientNet(
        stages, dropout=0.2, stochastic_depth_prob=0.5, last_channel=32, num_classes=5
    )


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda: models.vgg11_bn(num_classes=5).features,
            {"conv_bn_relu": 3, "conv_bn_relu_pool": 5},
        ),
        (lambda: models.mobilenet_v2(width_mult=0.25), {"conv_bn": 52, "mean_linear": 1}),
        (
            lambda: models.DenseNet(8, (2, 2, 2, 2)),
            # of each of 8 layers and 3 transitions, and the norm behind all
            {
                "conv_bn_relu_pool": 1,
                "bn_relu": 12,
                "conv_bn_relu": 8,
                "conv": 11,
                "mean_linear": 1,
            },
        ),
        (_small_efficientnet, {"conv_bn": 9, "conv": 6, "mean_linear": 1}),
    ],
    ids=["vgg", "mobilenet", "densenet", "efficientnet"],
)
def test_other_families_are_right_too(make, expected):
    model = make().double()
    converted = fastres.convert(model, inplace=False)
    x = torch.randn(2, 3, 40, 40).double()
    for training in (True, False):
        ours, eager = (results(m, [x], training, grad=False) for m in (converted, model))
        assert_same(ours, eager)
    assert kinds(converted) == expected


def test_densenets_layers_take_a_list_or_a_tensor():
    """They ask which of the two their argument is."""
    layer = models.densenet._DenseLayer(8, 4, 2, 0.0).double()
    converted = fastres.convert(layer, inplace=False)
    assert kinds(converted) == {"bn_relu": 1, "conv_bn_relu": 1, "conv": 1}
    x = torch.randn(2, 8, 5, 7).double()
    for training in (True, False):
        layer.train(training)
        converted.train(training)
        for argument in (x, [x[:, :3], x[:, 3:]]):
            with Calls() as calls:
                ours = converted(argument)
            assert "bn_relu" in calls.names
            torch.testing.assert_close(ours, layer(argument))
    with Calls() as calls:  # a tuple is neither
        torch.testing.assert_close(converted((x,)), layer((x,)))
    assert "bn_relu" not in calls.names


def test_densenets_layers_that_checkpoint_are_left_to_eager():
    layer = models.densenet._DenseLayer(8, 4, 2, 0.0, memory_efficient=True)
    converted = fastres.convert(layer, inplace=False)
    assert kinds(converted) == {} and "it iterates over" in reasons(converted)["conv1"]


def test_a_densenet_trains_in_less_memory():
    """Between batch norm and convolution nothing is kept: see test_recompute.py."""
    model = models.DenseNet(8, (4, 4), 16).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)

    def peak(net):
        def step():
            net(x).sum().backward()

        step()  # what stays
        return peak_bytes(step, torch.device("cpu"))

    assert peak(fastres.convert(model, inplace=False)) < 0.85 * peak(model)


def test_feature_extraction_from_a_converted_model():
    from torchvision.models.feature_extraction import create_feature_extractor

    model = models.resnet18(weights=None).eval()
    converted = fastres.convert(model, inplace=False)
    x = torch.randn(1, 3, 64, 64)
    nodes = {"layer2": "two", "layer4.1.bn2": "four"}
    ours = create_feature_extractor(converted, nodes)(x)
    eager = create_feature_extractor(model, nodes)(x)
    for name in ("two", "four"):
        torch.testing.assert_close(ours[name], eager[name], rtol=1e-4, atol=1e-4)


def test_children_in_a_new_sequential():
    """The usual way to take the head off."""
    model = models.resnet18(weights=None).eval()
    body = nn.Sequential(*list(fastres.convert(model, inplace=False).children())[:-1])
    x = torch.randn(2, 3, 64, 64)
    expected = nn.Sequential(*list(model.children())[:-1])(x)
    torch.testing.assert_close(body(x), expected, rtol=1e-4, atol=1e-4)
    # the stem's modules belong to no forward of an author; the blocks do, and stay converted
    assert kinds(body) == {"conv_bn_relu": 8, "conv_bn_add_relu": 8, "conv_bn": 3}
    assert kinds(fastres.convert(body))["conv_bn_relu"] == 9
    torch.testing.assert_close(body(x), expected, rtol=1e-4, atol=1e-4)
