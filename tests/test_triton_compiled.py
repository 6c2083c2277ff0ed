"""The elementwise Triton kernels compiled ahead of time, and what a compiled graph sees of them."""

import functools

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from fastres import arguments, launches, ops

aot = pytest.importorskip("aot", reason="Triton is not installed")

pytestmark = pytest.mark.skipif(launches.INTERPRETS, reason="TRITON_INTERPRET is set")

# kernels that see activations, as against those that merge a few statistics
WIDE = {
    "add_relu_kernel",
    "add_relu_backward_kernel",
    "moments_kernel",
    "apply_kernel",
    "backward_sums_kernel",
    "backward_apply_kernel",
}
NARROW = {"finish_moments_kernel", "frozen_moments_kernel", "finish_sums_kernel"}


def recorded_launches(shape, dtype, layout) -> list:
    """Of every kernel in every form in which a residual network trains and serves."""
    x = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=layout)
    v = torch.empty(shape[1], device="meta", dtype=arguments.accumulation_dtype(dtype))
    add_relu, add_relu_backward = map(launches.launcher, ("add_relu", "add_relu_backward"))
    bn_relu, bn_relu_backward = map(launches.launcher, ("bn_relu", "bn_relu_backward"))
    with aot.recorded() as made:
        add_relu(x, x)
        add_relu_backward(x, x)
        for residual in (x, None):
            bn_relu(x, residual, v, v, v, v, True, 0.1, 1e-5, True)
            bn_relu(x, residual, v, v, v, v, False, 0.1, 1e-5, True)
            for training in (True, False):
                mask = [True, residual is not None, training]
                bn_relu_backward(x, x, residual, v, v, v, v, training, True, mask)
    return made


@functools.cache
def binaries(shape, dtype, layout, architecture) -> list:
    """``(kernel's name, binary)``; equal launches are compiled once."""
    unique = {}
    for launch in recorded_launches(shape, dtype, layout):
        name = launch.kernel.fn.__name__
        present = tuple(argument is not None for argument in launch.arguments)
        unique.setdefault((name, present, str(launch.keywords)), launch)
    return [(key[0], aot.compile_launch(launch, architecture)) for key, launch in unique.items()]


RESNET = (256, 64, 56, 56)


@pytest.mark.parametrize("architecture, dtype, layout", [
    *((a, torch.bfloat16, torch.channels_last) for a in aot.ARCHITECTURES),
    (90, torch.float32, torch.channels_last),
    (90, torch.bfloat16, torch.contiguous_format),
], ids=str)  # fmt: skip
def test_no_spills_and_16_byte_accesses(architecture, dtype, layout):
    found = binaries(RESNET, dtype, layout, architecture)
    assert {name for name, _ in found} == WIDE | NARROW
    for name, binary in found:
        what = f"{name} on sm_{architecture}: {binary.registers} registers"
        assert binary.stack == binary.spills == 0, what
        # at least 16 warps of a multiprocessor's 65536 registers
        assert binary.registers <= 128, what
        if name not in WIDE:
            continue
        assert binary.count("LDG.128"), what
        if name not in ("moments_kernel", "backward_sums_kernel"):  # they store a few sums
            assert binary.count("STG.128") == binary.count("STG"), what
        if layout == torch.channels_last:
            assert binary.count("LDG.128") == binary.count("LDG"), what


@pytest.mark.parametrize("shape, dtype", [
    ((1, 1, 1, 1), torch.float64),
    ((1, 1, 1, 5), torch.float32),
    ((2, 3, 5, 7), torch.float16),
], ids=str)  # fmt: skip
def test_odd_shapes_compile(shape, dtype):
    """Sizes of 1 become constants of the kernel, which have no methods of a tensor."""
    for name, binary in binaries(shape, dtype, torch.contiguous_format, 90):
        assert binary.spills == 0, name


class _Seen(Exception):
    pass


def kernels_in_the_graph_of(call, operands, dynamic: bool) -> list[str]:
    """What a compiler gets to see of ``call``, which runs no operator of fastres by name."""
    kernels = []

    def see(graph, _):
        for node in graph.graph.nodes:
            if "triton_kernel_wrapper" in str(node.target):
                table = torch._higher_order_ops.triton_kernel_wrap.kernel_side_table
                kernels.append(table.get_kernel(node.kwargs["kernel_idx"]).fn.__name__)
            assert "fastres" not in str(node.target)
        raise _Seen

    torch._dynamo.reset()
    seeing = aot_autograd(fw_compiler=see)
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=seeing)
    with pytest.raises(Exception, match="_Seen"), torch.no_grad():
        compiled(*operands)
    torch._dynamo.reset()
    return kernels


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_graph_sees_the_kernels(dynamic):
    """torch.compile gets the launches, not an operator that it cannot look into."""

    def call(x, v, w, mean, var):
        operators = ops.OPERATORS["triton"]
        output, *_ = operators.bn_relu(x, None, mean, var, v, w, True, 0.1, 1e-5, True)
        return operators.add_relu(output, x)

    operands = torch.randn(2, 3, 5, 7), *(torch.rand(3) for _ in range(4))
    kernels = kernels_in_the_graph_of(call, operands, dynamic)
    known = torch._library.triton.get_triton_kernels_for_op("fastres::triton_bn_relu")
    assert {*kernels[:3]} <= {kernel.fn.__name__ for kernel in known}, "not in the cache's key"
    assert kernels == ["moments_kernel", "finish_moments_kernel", "apply_kernel", "add_relu_kernel"]


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_graph_sees_the_convolutions(dynamic, groups):
    """Forward in both modes and the gradients, whose launches write parts of their outputs."""
    window = ([2, 2], [1, 1], [1, 1], groups)
    operators = ops.OPERATORS["triton"]

    def call(x, w, v):
        bn = (v.clone(), v.clone(), v, v)
        y, *_ = operators.conv_bn_relu_training(x, w, None, None, *bn, *window, 0.1, 1e-5, True)
        z = operators.conv_bn_relu(x, w, None, y, *bn, *window, 1e-5, True)
        dw, _ = operators.conv_wgrad(z, x, w, *window, [True, False])
        return operators.conv_dgrad(z, x, w, *window), dw

    x, w = (
        torch.randn(size).to(memory_format=torch.channels_last)
        for size in ((2, 16, 6, 8), (32, 16 // groups, 3, 3))
    )
    kernels = kernels_in_the_graph_of(call, (x, w, torch.rand(32)), dynamic)
    assert kernels == [
        "fprop_kernel", "finish_moments_kernel", "apply_kernel", "fprop_kernel", "wgrad_kernel",
        *["dgrad_kernel"] * 4,
    ]  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_graph_sees_a_split_convolution(dynamic):
    """Of few pixels and a long depth: its parts, and what finishes them, in eval and training."""
    window = ([1, 1], [1, 1], [1, 1], 1)
    operators = ops.OPERATORS["triton"]

    def call(x, w, v):
        bn = (v.clone(), v.clone(), v, v)
        y, *_ = operators.conv_bn_relu_training(x, w, None, None, *bn, *window, 0.1, 1e-5, True)
        return operators.conv_bn_relu(x, w, None, y, *bn, *window, 1e-5, True)

    x, w = (
        torch.randn(size).to(memory_format=torch.channels_last)
        for size in ((2, 1040, 3, 2), (32, 1040, 3, 3))
    )
    kernels = kernels_in_the_graph_of(call, (x, w, torch.rand(32)), dynamic)
    known = torch._library.triton.get_triton_kernels_for_op("fastres::triton_conv_bn_relu")
    assert "finish_parts_kernel" in {kernel.fn.__name__ for kernel in known}
    parts = ["fprop_kernel", "finish_parts_kernel"]
    assert kernels == [*parts, "finish_moments_kernel", "apply_kernel", *parts]
