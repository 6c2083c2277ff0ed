"""Chains: convolutions in training with batch norm and ReLU between them, as one autograd function.

The operators are Triton's under its interpreter and, on CPU tensors, the fallbacks behind those of
the CUDA backend.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from agreement import Calls, assert_rule, spread
from interpreting import interpreted

import fastres.chain as chains
from fastres import autograd, ops, reference
from fastres.chain import Convolution, Form, Norm, chain

LAST = "channels_last"
BACKENDS = ("triton", "cuda")
# channels, each convolution's (filters, kernel, stride, bias), norms at either end, residual, ReLU
FORMS = {
    "basic block": (8, [(16, 3, 2, False), (16, 3, 1, False)], (False, True), True, True),
    "bottleneck": (16, [(8, 1, 1, False), (8, 3, 2, True), (24, 1, 1, False)], (False, True), True,
                   True),
    "plain block": (8, [(8, 3, 1, True), (16, 3, 1, False)], (False, True), False, True),
    "pre-activation": (16, [(8, 3, 2, False), (8, 1, 1, True)], (True, False), False, False),
    "ends in batch norm": (8, [(8, 3, 1, False), (8, 1, 2, False)], (True, True), False, False),
}  # fmt: skip


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "triton":
        with interpreted():
            yield "triton"
    else:
        yield "cuda"


def operands_for(form, dtype=torch.float32, affine=True, layout=LAST):
    """Name to tensor."""
    channels, convolutions, (first, last), residual, _ = FORMS[form]
    size, named = (7, 6), {"input": spread((3, channels, 7, 6), dtype, layout)}

    def norm(name, width):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        named[f"{name} running_mean"] = torch.randn(width, dtype=wide)
        named[f"{name} running_var"] = torch.rand(width, dtype=wide) + 0.5
        named[f"{name} weight"] = torch.randn(width, dtype=wide) if affine else None
        named[f"{name} bias"] = torch.randn(width, dtype=wide) if affine else None

    if first:
        norm("norm 0", channels)
    for i, (filters, kernel, stride, bias) in enumerate(convolutions):
        fan = channels * kernel**2
        named[f"conv {i} weight"] = spread(
            (filters, channels, kernel, kernel), dtype, layout, std=fan**-0.5
        )
        named[f"conv {i} bias"] = torch.randn(filters).to(dtype) if bias else None
        if last or i + 1 < len(convolutions):
            norm(f"norm {i + 1}", filters)
        channels, size = filters, tuple((s - 1) // stride + 1 for s in size)
    named["residual"] = spread((3, channels, *size), dtype, layout) if residual else None
    return named


def parts_of(form, named):
    _, convolutions, *_ = FORMS[form]
    windows = [((s, s), (k // 2, k // 2), (1, 1), 1) for _, k, s, _ in convolutions]
    convs = [
        Convolution(named[f"conv {i} weight"], named[f"conv {i} bias"], window)
        for i, window in enumerate(windows)
    ]
    vectors = ("running_mean", "running_var", "weight", "bias")
    norms = [
        Norm(*(named[f"norm {i} {vector}"] for vector in vectors), 0.3, 1e-5)
        if f"norm {i} weight" in named
        else None
        for i in range(len(convs) + 1)
    ]
    return convs, norms, FORMS[form][4]


def chained(form, backend, named):
    convs, norms, relu = parts_of(form, named)
    return chain(named["input"], named["residual"], convs, norms, relu, backend)


def masks_of(form, backend, named) -> list:
    """What each ReLU lets pass, before the first convolution, between them and at the end."""
    named = {name: t if t is None else t.clone() for name, t in named.items()}
    convs, norms, relu = parts_of(form, named)
    numbers = tuple(norm and norm[4:] for norm in norms)
    shape = Form(tuple(conv.geometry for conv in convs), numbers, relu, backend)
    tensors = chains._flat(convs, norms)
    with torch.no_grad():
        output, *found = chains._forward(named["input"], named["residual"], shape, tensors)
    inner = [
        norm and reference.bn_relu_apply(value, None, *moments, norm.weight, norm.bias, False) > 0
        for value, moments, norm in zip(*found, norms, strict=True)
    ]
    return [*inner[:-1], output > 0 if relu else None]


def eager(form, masks, named):
    """With ReLUs that let pass what ``masks`` say: near zero another rounding would flip a mask."""
    convs, norms, _ = parts_of(form, named)
    value = named["input"]
    for i, (norm, mask) in enumerate(zip(norms, masks, strict=True)):
        if i > 0:
            value = F.conv2d(value, convs[i - 1].weight, convs[i - 1].bias, *convs[i - 1].geometry)
        if norm is not None:
            value = F.batch_norm(value, *norm[:4], True, norm.momentum, norm.eps)
        if i == len(convs) and named["residual"] is not None:
            value = value + named["residual"]
        value = value if mask is None else torch.where(mask, value, 0)
    return value


def outcome(call, named, grad=None) -> dict:
    """Output, running statistics, and with ``grad`` every gradient."""
    named = {
        name: t if t is None else t.clone() if "running" in name else t.detach().requires_grad_()
        for name, t in named.items()
    }
    output = call(named)
    found = {"output": output.detach()}
    found |= {name: t for name, t in named.items() if "running" in name}
    wanted = {name: t for name, t in named.items() if t is not None and t.requires_grad}
    if grad is not None:
        gradients = torch.autograd.grad(output, list(wanted.values()), grad.to(output.dtype))
        found |= {f"grad of {n}": g for n, g in zip(wanted, gradients, strict=True)}
    # in front of a batch norm a bias has no gradient but rounding
    return {name: t for name, t in found.items() if "conv" not in name or "bias" not in name}


def check(form, backend, dtype, **options):
    named = operands_for(form, dtype, **options)
    wide = {name: t if t is None else t.double() for name, t in named.items()}
    masks = masks_of(form, backend, named)
    with torch.no_grad():
        grad = spread(eager(form, masks, wide).shape, dtype, LAST)
    ours = outcome(functools.partial(chained, form, backend), named, grad)
    theirs = outcome(functools.partial(eager, form, masks), named, grad)
    truth = outcome(functools.partial(eager, form, masks), wide, grad)
    assert_rule(ours, theirs, truth, atol_dtype=dtype, scale=2)


@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_eager(form, backend):
    """Output, running statistics, every gradient."""
    check(form, backend, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_agrees_with_eager_in_other_dtypes(dtype, backend):
    """Of Triton's, PyTorch's own convolution serves all but fp16 here."""
    check("bottleneck", backend, dtype)


def test_without_weights_and_biases(backend):
    check("pre-activation", backend, torch.float32, affine=False)


def test_contiguous(backend):
    check("basic block", backend, torch.float32, layout="contiguous")


def one_by_one(form, named):
    """The same sites as functions of their own."""
    convs, norms, relu = parts_of(form, named)
    value = named["input"]
    if (first := norms[0]) is not None:
        value = autograd.bn_relu(value, None, *first[:4], True, *first[4:], True, "cuda")
    for i, (conv, norm) in enumerate(zip(convs, norms[1:], strict=True)):
        last = i + 1 == len(convs)
        if norm is None:
            return autograd.conv(value, *conv, "cuda")
        value = autograd.conv_bn_relu_training(
            value, *conv[:2], named["residual"] if last else None, *norm[:4], conv.geometry,
            *norm[4:], relu if last else True, "cuda",
        )  # fmt: skip
    return value


@pytest.mark.parametrize("implementation", ["fallback"], indirect=True)
@pytest.mark.parametrize("form", FORMS)
def test_fallbacks_give_the_bits_of_the_sites_one_by_one(form, implementation):
    named = operands_for(form, torch.bfloat16)
    with torch.no_grad():
        grad = torch.randn_like(chained(form, "cuda", operands_for(form, torch.bfloat16)))
    together = outcome(functools.partial(chained, form, "cuda"), named, grad)
    apart = outcome(functools.partial(one_by_one, form), named, grad)
    assert together.keys() == apart.keys()
    for name, value in together.items():
        assert torch.equal(value, apart[name]), name


@pytest.mark.parametrize("form", ["basic block", "pre-activation", "plain block"])
def test_second_derivatives(form):
    """A graph of the backward is spelled in PyTorch's own operators."""
    named = operands_for(form, torch.float64)
    leaves = [name for name, t in named.items() if t is not None and "running" not in name]

    def call(*tensors):
        return chained(form, "cuda", named | dict(zip(leaves, tensors, strict=True)))

    tensors = [named[name].requires_grad_() for name in leaves]
    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
def test_only_the_gradients_that_are_needed(form):
    """Each alone is what it is among all; nothing in front of it is computed."""
    named = operands_for(form, torch.float32)
    leaves = [name for name, t in named.items() if t is not None and "running" not in name]
    output = chained(form, "cuda", {n: t.requires_grad_() if n in leaves else t for n, t in named.items()})  # fmt: skip
    grad = torch.randn_like(output)
    every = torch.autograd.grad(output, [named[name] for name in leaves], grad)
    for name, expected in zip(leaves, every, strict=True):
        for other in leaves:
            named[other].requires_grad_(other == name)
        with Calls() as calls:
            (found,) = torch.autograd.grad(chained(form, "cuda", named), named[name], grad)
        assert torch.equal(found, expected), name
        behind = [kind for kind, _ in calls.made].count("bn_relu_conv_backward")
        where = int(name.split()[1]) if name[-1] != "l" and " " in name else 0
        first = 0 if FORMS[form][2][0] else 1  # the first convolution behind a batch norm
        at = 0 if name == "residual" else len(FORMS[form][1]) - max(where, first)
        assert behind == at, name


def test_what_is_kept_for_backward():
    """Raw outputs, and no normalised activation between convolutions: 5 maps instead of 7."""
    kept = {}
    for call in (functools.partial(chained, "bottleneck", "cuda"),
                 functools.partial(one_by_one, "bottleneck")):  # fmt: skip
        named = operands_for("bottleneck", torch.float32)
        named = {
            n: t if t is None or "running" in n else t.requires_grad_() for n, t in named.items()
        }
        maps = set()

        def keep(tensor, maps=maps):
            if tensor.dim() == 4 and tensor.shape[0] == 3:
                maps.add(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = call(named)
        kept[call.func.__name__] = len(maps)
        del output
    assert kept == {"chained": 5, "one_by_one": 7}


def test_nothing_is_recorded_that_needs_no_graph(backend):
    named = operands_for("basic block", torch.float32)
    before = {name: t.clone() for name, t in named.items() if "running" in name}
    assert chained("basic block", backend, named).grad_fn is None
    assert all(not torch.equal(named[name], t) for name, t in before.items())


def operator_calls():
    """Each operator of a chain, with arguments; name to them."""
    x, w = spread((2, 8, 6, 5), torch.float32, LAST), spread((4, 8, 3, 3), torch.float32, LAST)
    vectors = [torch.rand(8) + 0.5 for _ in range(4)]
    running = [torch.zeros(4), torch.ones(4)]
    window = ([2, 2], [1, 1], [1, 1], 1)
    dy = spread((2, 4, 3, 3), torch.float32, LAST)
    return {
        "bn_relu_moments": (x, *vectors[:2], 0.1, 1e-5),
        "bn_relu_apply": (x, x.flip(0), *vectors, True),
        "bn_relu_conv": (x, *vectors, w, torch.randn(4), *running, *window, 0.1, 1e-5, True),
        "bn_relu_conv alone": (x, *(None,) * 4, w, None, None, None, *window, 0.0, 0.0, False),
        "bn_relu_conv_backward": (dy, x, *vectors, w, *window, [True, True, True, False]),
    }


@pytest.mark.parametrize("name", operator_calls())
def test_opcheck(name, backend):
    operator = getattr(ops.OPERATORS[backend], name.split()[0])
    torch.library.opcheck(operator, operator_calls()[name])


def test_operators_refuse_what_does_not_fit(backend):
    operators, calls = ops.OPERATORS[backend], operator_calls()
    x, mean, invstd, *rest = calls["bn_relu_conv"]
    with pytest.raises(RuntimeError, match=r"mean: expected shape \(8,\), got \(3,\)"):
        operators.bn_relu_conv(x, mean[:3], invstd, *rest)
    with pytest.raises(RuntimeError, match="invstd: expected float32, got float64"):
        operators.bn_relu_conv(x, mean, invstd.double(), *rest)
    with pytest.raises(RuntimeError, match="residual: expected .*shape"):
        operators.bn_relu_apply(x, x[:1], *calls["bn_relu_apply"][2:])
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        operators.bn_relu_moments(x[:1, :, :1, :1], None, None, 0.1, 1e-5)


def test_nothing_to_convolve(backend):
    operators, calls = ops.OPERATORS[backend], operator_calls()
    x, *rest = calls["bn_relu_conv alone"]
    assert operators.bn_relu_conv(x[:0], *rest)[0].shape == (0, 4, 3, 3)
    dy, x, *rest = calls["bn_relu_conv_backward"]
    found = operators.bn_relu_conv_backward(dy[:0], x[:0], *rest)
    assert [tuple(t.shape) for t in found] == [(0, 8, 6, 5), (8,), (8,), (4, 8, 3, 3), (0,)]
