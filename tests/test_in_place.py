"""``conv_bn_relu_``: the output in the residual's place, and when a converted model may ask for it."""

import copy

import pytest
import torch
from agreement import assert_close
from converting import randomized
from torch import nn

import fastres
from fastres import ops

pytestmark = pytest.mark.skipif(ops.extension is None, reason="the extension runs programs")

# images, channels in and out, side of the maps, filter
CASES = {
    "product": (2, 24, 40, 32, 1),
    "few pixels": (1, 24, 40, 8, 1),
    "winograd": (1, 16, 16, 36, 3),
    "vectors cut off": (1, 17, 35, 33, 1),
}


def arguments(case: str, dtype=torch.float32, memory_format=torch.channels_last) -> list:
    n, c, k, side, filter = CASES[case]

    def maps(channels):
        return torch.randn(n, channels, side, side).to(dtype).to(memory_format=memory_format)

    weight = (torch.randn(k, c, filter, filter) / (c * filter**2) ** 0.5).to(dtype)
    padding = filter // 2
    vectors = [torch.randn(k), torch.rand(k) + 0.5, torch.rand(k) + 0.5, torch.randn(k)]
    if dtype == torch.float64:
        vectors = [v.double() for v in vectors]
    return [
        maps(c), weight, None, maps(k), *vectors, [1, 1], [padding] * 2, [1, 1], 1, 1e-5, True
    ]  # fmt: skip


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_output_in_the_residuals_place(case, dtype, memory_format):
    given = arguments(case, dtype, memory_format)
    residual = given[3]
    expected = ops.conv_bn_relu(*given)
    address, stride = residual.data_ptr(), residual.stride()
    ops.conv_bn_relu_(*given)
    assert residual.data_ptr() == address and residual.stride() == stride
    assert torch.equal(residual, expected)


def test_the_residual_is_the_input():
    given = arguments("product")
    given[1] = given[1].new_ones(24, 24, 1, 1)
    given[4:8] = [v[:24] for v in given[4:8]]
    given[3] = given[0].clone(memory_format=torch.preserve_format)
    expected = ops.conv_bn_relu(*given)
    given[3] = given[0]
    ops.conv_bn_relu_(*given)
    assert torch.equal(given[0], expected)


def test_filters_that_were_changed_unseen():
    """They are found before the residual is gone."""
    given = arguments("product")
    for _ in range(3):
        ops.conv_bn_relu_(*given[:3], given[3].clone(), *given[4:])
    given[1].data[0] = 3.0
    expected = ops.conv_bn_relu(*given[:1], given[1].clone(), *given[2:])
    ops.conv_bn_relu_(*given)
    assert torch.equal(given[3], expected)


def test_mistakes():
    given = arguments("product")
    with pytest.raises((RuntimeError, ValueError), match="^residual: expected the shape"):
        ops.conv_bn_relu_(*given[:3], given[3][:1], *given[4:])


def test_opcheck():
    torch.library.opcheck(ops.conv_bn_relu_, tuple(arguments("product")))
    torch.library.opcheck(ops.conv_bn_relu_, tuple(arguments("winograd")))


# --- models --------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.conv3, self.bn3 = nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.relu = nn.ReLU()

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + x)


class Net(nn.Module):
    def __init__(self, blocks=3):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 32, 3, 1, 1), nn.BatchNorm2d(32)
        self.blocks = nn.Sequential(*(Bottleneck() for _ in range(blocks)))

    def forward(self, x):
        return self.blocks(torch.relu(self.bn(self.stem(x))))


@pytest.fixture
def pair():
    """A net, and what was converted of it."""
    torch.manual_seed(0)
    net = randomized(Net()).eval().to(memory_format=torch.channels_last)
    return net, fastres.convert(net)


def expect_like_eager(ours, eager, x) -> None:
    truth = copy.deepcopy(eager).double()
    assert_close(ours, eager(x), truth(x.double()))


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)


def in_place(call) -> int:
    """How many convolutions of a call wrote where the residual was."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return sum(event.name == "fastres::conv_bn_relu_" for event in profile.events())


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_blocks_write_where_their_input_was(pair, grad):
    eager, converted = pair
    x = images()
    with grad():
        expect_like_eager(converted(x), eager, x)
        assert in_place(lambda: converted(x)) == 3


def test_an_input_that_somebody_has_is_left_alone(pair):
    eager, converted = pair
    with torch.inference_mode():
        x = converted(images())
        kept = x.clone()
        y = converted.blocks(x)
        assert torch.equal(x, kept)
        expect_like_eager(y, eager.blocks, kept)
        # called alone, a Sequential's loop in Python has what passes between its blocks
        assert in_place(lambda: converted.blocks(x)) == 0
        assert in_place(lambda: converted.blocks[0](converted(images()))) == 3
        assert torch.equal(x, kept)


def test_a_hook_keeps_what_it_sees(pair):
    _, converted = pair
    seen = []
    converted.blocks[1].register_forward_hook(lambda module, args, output: seen.append(output))
    converted.blocks[2].register_forward_pre_hook(lambda module, args: seen.append(args[0][:1]))
    x = images()
    with torch.inference_mode():
        converted(x)
        kept = [value.clone() for value in seen]
        converted(x)
    assert len(seen) == 4
    for i, value in enumerate(seen):
        assert torch.equal(value, kept[i % 2])
    assert torch.equal(kept[0][:1], kept[1])


def test_where_a_gradient_is_wanted_nothing_is_overwritten(pair):
    _, converted = pair
    assert in_place(lambda: converted(images())) == 0
