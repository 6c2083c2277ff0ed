"""Stochastic depth: the linear decay, no work for a dropped block, the expectation in eval."""

import copy

import pytest
import torch
from agreement import Calls
from families import close, fill
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastres
from fastres.models import TeachingBlock, create, set_stochastic_depth
from fastres.nn import BasicBlock, Bottleneck
from fastres.residual import residual_blocks

FAMILIES = {
    "resnet18": {"stem": "cifar"},
    "resnet50": {},
    "cifar_resnet20": {},
    "cifar_resnetv2_11": {},
    "cifar_resnetv2_14": {},
    "resnext50_32x4d": {},
    "cifar_wide_resnet40_4": {},
    "teaching_resnet18": {},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_linear_decay(name):
    with torch.device("meta"):
        model = create(name, stochastic_depth=0.5, **FAMILIES[name])
    blocks = residual_blocks(model)
    for number, block in enumerate(blocks, 1):
        assert block.survival == pytest.approx(1 - number / len(blocks) * 0.5)
    set_stochastic_depth(model, 1)
    assert all(block.survival == 1 for block in blocks)


def blocks():
    def projection(inputs, outputs, stride):
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )

    yield BasicBlock(6, 6)
    yield BasicBlock(6, 8, 2, projection(6, 8, 2))
    yield BasicBlock(
        6, 6, 1, fastres.models.cifar_resnet(8, shortcut="scaling").layer1[0].downsample
    )
    yield Bottleneck(8, 2)
    yield Bottleneck(6, 2, 2, projection(6, 8, 2))
    yield fastres.models.PreActBlock(6, 6)
    yield fastres.models.PreActBottleneck(6, 2, 2, nn.Conv2d(6, 8, 1, 2, bias=False))
    yield TeachingBlock(6, 8, True, 2)


def parts(block, x):
    """``branch`` and ``shortcut`` of a block in eval, in PyTorch's own calls."""
    with fastres.backend("eager"):
        numbers = [n for n in "123" if hasattr(block, f"bn{n}")]
        down = block.conv3 if isinstance(block, TeachingBlock) else block.downsample
        out = x
        if hasattr(block, "branch"):
            for n in numbers:
                out = getattr(block, f"bn{n}")(out).relu()
                out = getattr(block, f"conv{n}")(out)
            return out, (x if down is None else down(block.bn1(x).relu()))
        for n in numbers:
            out = getattr(block, f"bn{n}")(getattr(block, f"conv{n}")(out))
            out = out.relu() if n != numbers[-1] else out
        shortcut = x if down is None else down(x)
        if isinstance(shortcut, tuple):
            return out * shortcut[1], shortcut[0]
        return out, shortcut


def finish(block, value):
    return value if hasattr(block, "branch") else value.relu()


@pytest.mark.parametrize("index", range(8))
def test_eval_multiplies_the_branch_by_its_survival(one_thread, index):
    block = fill(list(blocks())[index]).double().eval()
    x = torch.randn(2, block.conv1.in_channels, 6, 5, dtype=torch.float64).relu()
    branch, shortcut = parts(block, x)
    for survival in (1.0, 0.7, 0.3, 0.0):
        block.survival = survival
        expected = finish(block, survival * branch + shortcut)
        with torch.no_grad():
            close(block(x), expected, f"survival {survival}, without a graph")
        close(block(x).detach(), expected.detach(), f"survival {survival}")


def test_the_multiple_follows_its_parameters(one_thread):
    block, x = fill(BasicBlock(4, 4)).eval(), torch.randn(1, 4, 5, 5)
    block.survival = 0.5
    with torch.no_grad():
        block(x)
        for change in (
            lambda: block.bn2.weight.mul_(2), lambda: block.bn2.running_var.mul_(3),
            lambda: setattr(block.bn2, "weight", nn.Parameter(torch.randn(4))),
            lambda: setattr(block.bn2, "weight", nn.Parameter(torch.randn(4))),
            # which leaves the version as it was
            lambda: block.bn2.weight.data.mul_(2), lambda: block.bn2.bias.data.add_(1),
            lambda: setattr(block.bn2, "eps", 0.5),
            lambda: setattr(block.bn2, "running_mean", torch.randn(4)),
            lambda: setattr(block, "survival", 0.25), lambda: block.load_state_dict(
                {k: v + 0.5 for k, v in block.state_dict().items()}
            ),
        ):  # fmt: skip
            change()
            branch, shortcut = parts(block, x)
            expected = (block.survival * branch + shortcut).relu()
            torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
        with Calls() as calls:
            block(x)
    assert calls.names == ["conv_bn_relu"] * 2, "the scale is folded"
    assert not any("multiple" in name for name in (*block.state_dict(), *vars(block.bn2)))
    twin = copy.deepcopy(block)
    with torch.no_grad():
        assert torch.equal(twin(x), block(x))


class Convolutions(TorchDispatchMode):
    """Counts convolutions."""

    def __init__(self):
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name
        self.made += name in ("aten::convolution", "fastres::conv")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_resnetv2_29"])
def test_a_dropped_block_costs_nothing(one_thread, name):
    model = create(name)
    kept = {block: index % 2 for index, block in enumerate(residual_blocks(model))}
    for block, keep in kept.items():
        block.survival = float(keep)
    with Convolutions() as convolutions:
        output = model(torch.randn(2, 3, 16, 16))
    output.sum().backward()
    in_kept = sum(isinstance(m, nn.Conv2d) for b, k in kept.items() if k for m in b.modules())
    shortcuts = sum(isinstance(b.downsample, nn.Conv2d) for b, k in kept.items() if not k)
    assert convolutions.made == 1 + in_kept + shortcuts
    for block, keep in kept.items():
        for parameter in (block.conv1.weight, block.conv2.weight):
            assert (parameter.grad is not None) == bool(keep)


def test_blocks_survive_as_often_as_they_should(one_thread):
    block = BasicBlock(2, 2)
    block.survival = 0.7
    x = torch.rand(2, 2, 3, 3)
    with torch.no_grad():
        kept = sum(block(x) is not x for _ in range(600))
    assert 370 < kept < 470, "600 draws: 420 expected, deviation 11"
    torch.manual_seed(3)
    first = [block(x) is x for _ in range(20)]
    torch.manual_seed(3)
    assert first == [block(x) is x for _ in range(20)], "a seed repeats the draws"
