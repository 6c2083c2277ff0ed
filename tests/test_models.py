"""The model family: torchvision's state dicts both ways, and torchvision's outputs."""

import copy

import pytest
import torch
from agreement import assert_close
from torch import nn

import fastres
from fastres.nn import BasicBlock, Bottleneck

NAMES = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
OPTIONS = {
    "resnet18": {"num_classes": 10, "zero_init_residual": True},
    "resnet50": {"groups": 2, "width_per_group": 32},
    "resnet101": {"replace_stride_with_dilation": [False, True, True]},
}


def pair(torchvision, name, **options):
    return [getattr(module, name)(**options) for module in (fastres.models, torchvision.models)]


@pytest.mark.parametrize("name", NAMES)
def test_state_dicts_are_torchvisions(torchvision, name):
    for options in ({}, OPTIONS.get(name, {"norm_layer": lambda n: nn.GroupNorm(1, n)})):
        with torch.device("meta"):
            ours, theirs = pair(torchvision, name, **options)
        assert [(k, v.shape, v.dtype) for k, v in ours.state_dict().items()] == [
            (k, v.shape, v.dtype) for k, v in theirs.state_dict().items()
        ]
        theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)
        ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
        assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]


def filled_pair(torchvision, name, **options):
    """Both models in eval on the very same tensors, drawn so that activations stay finite."""
    with torch.device("meta"):
        ours, theirs = pair(torchvision, name, **options)
    theirs.to_empty(device="cpu")
    for key, value in theirs.state_dict().items():
        if value.dim() > 1:
            bound = (2 / value[0].numel()) ** 0.5
            value.uniform_(-1.7 * bound, 1.7 * bound)
        elif key.endswith(("mean", "bias")):
            value.uniform_(-0.2, 0.2)
        elif value.is_floating_point():
            value.uniform_(0.5, 1.0)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("name, options", [
    ("resnet18", {"num_classes": 10}),
    ("resnet50", {"num_classes": 10}),
    ("resnet50", {"groups": 4, "width_per_group": 8, "num_classes": 10}),
    ("resnet50", {"replace_stride_with_dilation": [False, False, True], "num_classes": 10}),
], ids=["18", "50", "next", "dilated"])  # fmt: skip
def test_outputs_are_torchvisions(torchvision, name, options):
    ours, theirs = filled_pair(torchvision, name, **options)
    images = torch.randn(2, 3, 61, 67)
    for dtype in (torch.float32, torch.bfloat16):
        for model in (ours, theirs):
            model.to(dtype)
        with torch.inference_mode():
            outputs = ours(images.to(dtype)), theirs(images.to(dtype))
            exact = copy.deepcopy(theirs).double()(images.to(dtype).double())
        # a chain of 20 to 50 rounded layers: errors add up differently, not more
        assert_close(*outputs, exact, name, dtype, scale=4)


def test_resnet34_101_and_152_run(torchvision):
    for name in ("resnet34", "resnet101", "resnet152"):
        ours, theirs = filled_pair(torchvision, name, num_classes=3)
        images = torch.randn(1, 3, 33, 33)
        with torch.inference_mode():
            torch.testing.assert_close(ours(images), theirs(images), rtol=1e-3, atol=1e-3)


def test_initialisation_has_torchvisions_scale(torchvision):
    torch.manual_seed(0)
    for ours, theirs in zip(*(m.parameters() for m in pair(torchvision, "resnet18")), strict=True):
        assert ours.requires_grad
        if ours.numel() > 5000:
            assert abs(ours.std() / theirs.std() - 1) < 0.1
    for block, last in ((BasicBlock, "bn2"), (Bottleneck, "bn3")):
        model = fastres.models.ResNet(block, [1, 1, 1, 1], zero_init_residual=True)
        for module in model.modules():
            if isinstance(module, block):
                assert not getattr(module, last).weight.any()


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="replace_stride_with_dilation: .*3.*got 2"):
        fastres.models.resnet50(replace_stride_with_dilation=[True, False])
    with pytest.raises(ValueError, match="groups, base_width"):
        fastres.models.resnet18(groups=2)
