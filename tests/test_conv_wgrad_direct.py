"""The weight's gradient as a product over pixels: its numbers, when it serves, its limits."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from agreement import spread
from hypothesis import given, settings
from hypothesis import strategies as st
from wgrads import algorithm_of, assert_agrees, eager, wgrad

import fastres
from fastres import ops

pytestmark = pytest.mark.skipif(
    ops.extension is None or ops.extension.build_info()["cpu_capability"] == "DEFAULT",
    reason="needs the compiled extension and a processor with AVX2",
)
CAPABILITY = ops.extension and ops.extension.build_info()["cpu_capability"]
INTEL = "GenuineIntel" in Path("/proc/cpuinfo").read_text()

# N, C, H, W, K, filter, stride, padding
SHAPES = [
    (2, 64, 14, 14, 48, 1, 1, 0),
    (1, 16, 5, 7, 1, 1, 1, 0),  # one filter; fewer pixels than a vector has lanes
    (3, 48, 9, 11, 17, 1, 2, 0),  # half a panel; filters that fill no tile
    (1, 16, 1, 1, 3, 1, 1, 0),  # one pixel
    (2, 32, 13, 12, 70, 3, 2, 1),
    (1, 16, 8, 6, 20, 3, 1, 2),  # pixels that meet nothing but padding
    (1, 16, 9, 10, 33, 5, 3, 2),
    (1, 80, 7, 3, 300, 3, 1, 0),  # more tiles than are packed at a time
    (2, 16, 24, 23, 15, 3, 1, 1),  # more pixels than are packed at a time, an odd number of them
    (1, 16, 4, 4, 14, 1, 5, 0),
]
DTYPES = [torch.float32, torch.bfloat16]


def operands(shape, dtype=torch.float32, layout="channels_last"):
    """(grad_output, input, weight), (padding, stride)"""
    n, c, h, w, k, size, stride, padding = shape
    p, q = ((length + 2 * padding - size) // stride + 1 for length in (h, w))
    grad = spread((n, k, p, q), dtype, layout)
    tensors = grad, spread((n, c, h, w), dtype, layout), spread((k, c, size, size), dtype, layout)
    return tensors, (padding, stride)


def direct(tensors, padding, stride):
    return ops.extension.conv_wgrad_by("direct", *tensors, stride, padding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_eager(shape, dtype):
    tensors, geometry = operands(shape, dtype)
    ours = direct(tensors, *geometry)
    assert ours.dtype == dtype and ours.shape == tensors[2].shape
    assert_agrees(ours, *tensors, *geometry)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(
        st.integers(1, 3), st.sampled_from([16, 32, 48, 80]), st.integers(1, 20),
        st.integers(1, 20), st.integers(1, 60), st.sampled_from([1, 2, 3]), st.integers(1, 3),
        st.integers(0, 2),
    ).filter(lambda s: min(s[2], s[3]) + 2 * s[7] >= s[5]),
    st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_shape(shape, dtype):
    tensors, geometry = operands(shape, dtype)
    assert_agrees(direct(tensors, *geometry), *tensors, *geometry)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
def test_every_layout(layout, dtype):
    tensors, geometry = operands((4, 64, 12, 12, 40, 3, 2, 1), dtype, layout)
    assert_agrees(direct(tensors, *geometry), *tensors, *geometry)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads_now", [1, 2, 3, 8, 64])
def test_any_number_of_threads(threads_now, dtype, threads):
    """They share out filters, values and pixels, whichever are enough."""
    threads(threads_now)
    for shape in ((1, 16, 3, 3, 3, 1, 1, 0), (2, 64, 30, 30, 16, 1, 1, 0), SHAPES[4]):
        tensors, geometry = operands(shape, dtype)
        ours = direct(tensors, *geometry)
        assert torch.equal(ours, direct(tensors, *geometry))
        assert_agrees(ours, *tensors, *geometry)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_where_eager_has_it(bad):
    tensors, geometry = operands((2, 32, 12, 12, 32, 3, 2, 1))
    tensors[1][1, 5, 0, 0] = bad
    ours, expected = direct(tensors, *geometry), eager(*tensors, *geometry)
    assert 0 < expected.isfinite().sum() < expected.numel()
    torch.testing.assert_close(ours, expected, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_eight_callers_at_once():
    problems = [operands((n, 64, 20, 20, 48, 1, 1, 0)) for n in (1, 2, 4, 8)]
    expected = [direct(tensors, *geometry) for tensors, geometry in problems]
    with ThreadPoolExecutor(8) as pool:
        results = list(
            pool.map(lambda i: direct(problems[i % 4][0], *problems[i % 4][1]), range(32))
        )
    for i, result in enumerate(results):
        torch.testing.assert_close(result, expected[i % 4], rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(INTEL, reason="not measured on Intel's processors, and not used")
def test_serves_what_it_is_ahead_in():
    def chosen(shape, dtype=torch.float32):
        tensors, (padding, stride) = operands(shape, dtype)
        return algorithm_of(*tensors, padding, stride)

    one_tap = "direct" if CAPABILITY == "AVX512" else "aten"  # of many pixels
    assert chosen((8, 256, 28, 28, 64, 1, 1, 0)) == one_tap
    assert chosen((8, 256, 56, 56, 128, 1, 1, 0)) == one_tap
    assert chosen((8, 256, 28, 28, 512, 1, 2, 0)) == one_tap
    assert chosen((8, 128, 28, 28, 128, 3, 2, 1)) == "direct"
    assert chosen((8, 512, 7, 7, 2048, 1, 1, 0)) == "direct"
    assert chosen((8, 64, 28, 28, 256, 1, 1, 0)) == "aten"  # few values under a filter
    assert chosen((8, 3, 64, 64, 64, 7, 2, 3)) == "aten"
    with fastres.winograd("off"):
        assert chosen((8, 64, 28, 28, 64, 3, 1, 1)) == "direct"
    one = torch.ones(1, 64, 8, 8, dtype=torch.bfloat16)
    if (
        ops.extension.conv_algorithm(one, one[:, :, :1, :1], 1, 0, 1, False) == "direct_bf16"
    ):  # products of bfloat16, but no matrix unit
        assert chosen((8, 512, 28, 28, 128, 1, 1, 0), torch.bfloat16) == "direct"
        assert chosen((8, 1024, 14, 14, 256, 1, 1, 0), torch.bfloat16) == "aten"
        assert chosen((8, 512, 7, 7, 2048, 1, 1, 0), torch.bfloat16) == "product"


CHOOSE = """
import json, sys
from test_conv_wgrad_direct import algorithm_of, operands
chosen = []
for shape in json.loads(sys.argv[1]):
    tensors, (padding, stride) = operands(shape)
    chosen.append(algorithm_of(*tensors, padding, stride))
print(json.dumps(chosen))
"""


@pytest.mark.skipif(INTEL, reason="not measured on Intel's processors, and not used")
def test_avx2_leaves_many_pixels_under_one_tap_to_onednn():
    expected = {
        (8, 256, 56, 56, 128, 1, 1, 0): "aten",
        (8, 512, 28, 28, 1024, 1, 2, 0): "aten",
        (8, 512, 7, 7, 2048, 1, 1, 0): "direct",
        (8, 128, 56, 56, 128, 3, 2, 1): "direct",
    }
    run = subprocess.run(
        [sys.executable, "-c", CHOOSE, json.dumps([*expected])],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2"},
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == [*expected.values()]


def test_refusals():
    tensors, _ = operands((2, 17, 8, 8, 32, 1, 1, 0))
    with pytest.raises(ValueError, match="algorithm: direct does not compute"):
        direct(tensors, 0, 1)  # 17 channels fill no vectors
    tensors, _ = operands((2, 32, 8, 8, 32, 1, 1, 0))
    with pytest.raises(ValueError, match="grad_output: expected the shape"):
        direct((tensors[0][..., 1:], *tensors[1:]), 0, 1)
    with pytest.raises(RuntimeError):  # PyTorch's
        wgrad(tensors[0][..., 1:], *tensors[1:], 0)
