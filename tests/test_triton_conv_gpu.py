"""The Triton convolutions on a CUDA device: real shapes, streams, graphs, large tensors."""

import copy
import functools
import importlib

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_close, assert_rule, assert_same_bits

import fastres
from fastres import functional, launches, ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(launches.INTERPRETS, reason="TRITON_INTERPRET is set"),
]

# N, C, size, K, window, stride, padding, dilation, groups: ResNet-50's, then what others have
RESNET50 = {
    "stem": (16, 3, 224, 64, 7, 2, 3, 1, 1),
    "1x1 64 to 64": (32, 64, 56, 64, 1, 1, 0, 1, 1),
    "1x1 64 to 256": (32, 64, 56, 256, 1, 1, 0, 1, 1),
    "1x1 256 to 64": (32, 256, 56, 64, 1, 1, 0, 1, 1),
    "3x3 64": (32, 64, 56, 64, 3, 1, 1, 1, 1),
    "3x3 128 stride 2": (32, 128, 56, 128, 3, 2, 1, 1, 1),
    "1x1 256 to 512 stride 2": (32, 256, 56, 512, 1, 2, 0, 1, 1),
    "3x3 128": (32, 128, 28, 128, 3, 1, 1, 1, 1),
    "1x1 1024 to 256": (32, 1024, 14, 256, 1, 1, 0, 1, 1),
    "3x3 256": (32, 256, 14, 256, 3, 1, 1, 1, 1),
    "3x3 512": (32, 512, 7, 512, 3, 1, 1, 1, 1),
    "1x1 512 to 2048": (32, 512, 7, 2048, 1, 1, 0, 1, 1),
    "3x3 512, one image": (1, 512, 7, 512, 3, 1, 1, 1, 1),
    "3x3 256 stride 2, one image": (1, 256, 28, 256, 3, 2, 1, 1, 1),
    "1x1 2048 to 512, one image": (1, 2048, 7, 512, 1, 1, 0, 1, 1),
    "3x3 512, 8 images": (8, 512, 7, 512, 3, 1, 1, 1, 1),
}
OTHERS = {
    "ResNeXt 32x4": (16, 128, 56, 128, 3, 1, 1, 1, 32),
    "ResNeXt 32x8 stride 2": (16, 512, 28, 512, 3, 2, 1, 1, 32),
    "ResNeXt 32x16": (16, 512, 14, 512, 3, 1, 1, 1, 32),
    "dilated": (8, 256, 28, 256, 3, 1, 2, 2, 1),
    "odd": (3, 35, 19, 51, 3, 2, 1, 1, 1),
    "depthwise": (8, 96, 28, 96, 3, 1, 1, 1, 96),
}
SHAPES = RESNET50 | OTHERS
FEW = (
    "stem", "1x1 64 to 256", "3x3 128 stride 2", "3x3 512", "3x3 512, one image", "ResNeXt 32x4",
    "odd",
)  # fmt: skip
MARGIN = 0.1  # around zero, where another rounding flips the ReLU's mask


@pytest.fixture(autouse=True)
def served_by_triton(monkeypatch):
    """Every convolution, whatever the table of choices says; fp32 without TF32."""
    choice = importlib.import_module("fastres.kernels.conv_choice")
    serves = choice.serves

    def always(what, activation, *args, last, most_pixels, allow_tf32):
        served = last and activation.dtype != torch.float64 and most_pixels < choice.MOST_PIXELS
        assert served or not serves(
            what, activation, *args, last=last, most_pixels=most_pixels, allow_tf32=allow_tf32
        )
        return served

    monkeypatch.setattr(choice, "serves", always)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with fastres.backend("triton"):
        yield


class Case:
    def __init__(self, name, dtype, residual=True):
        n, c, size, k, taps, stride, padding, dilation, groups = SHAPES[name]
        self.window = (stride, padding, dilation, groups)
        last = {"dtype": dtype, "memory_format": torch.channels_last, "device": "cuda"}
        std = (c // groups * taps * taps) ** -0.5
        self.operands = {
            "input": (torch.randn(n, c, size, size) + 0.3).to(**last),
            "weight": (torch.randn(k, c // groups, taps, taps) * std).to(**last),
            "running_mean": torch.randn(k, device="cuda"),
            "running_var": torch.rand(k, device="cuda") + 0.5,
            "bn_weight": torch.randn(k, device="cuda"),
            "bn_bias": torch.randn(k, device="cuda"),
            "residual": None,
        }
        if residual:
            with fastres.backend("eager"):
                size = F.conv2d(self.operands["input"], self.operands["weight"], None, *self.window)
            self.operands["residual"] = torch.randn_like(size)

    def exact(self):
        return {name: None if t is None else t.double() for name, t in self.operands.items()}

    def ours(self, training, input, weight, residual, relu=True, **bn):
        call, operands = functional.conv_bn_relu, (input,)
        if residual is not None:
            call, operands = functional.conv_bn_add_relu, (input, residual)
        return call(*operands, weight, None, *self.window, **bn, training=training)

    def eager(self, training, input, weight, residual, running_mean, running_var, relu=True, **bn):
        output = F.conv2d(input, weight, None, *self.window)
        output = F.batch_norm(
            output, running_mean, running_var, bn["bn_weight"], bn["bn_bias"], training
        )
        output = output if residual is None else output + residual
        return F.relu(output) if relu else output


def outcome(call, operands, grad=None):
    """Output, buffers and, with ``grad``, the gradients; the operands stay as they are."""
    leaves = {
        name: None
        if t is None
        else t.clone().requires_grad_(grad is not None and "run" not in name)
        for name, t in operands.items()
    }
    output = call(**leaves)
    found = {"output": output.detach()}
    if grad is not None:
        output.backward(grad.to(output.dtype))
        found |= {n: t.grad for n, t in leaves.items() if t is not None and t.requires_grad}
    return found | {n: t.detach() for n, t in leaves.items() if "run" in n}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "name, dtype",
    [(name, torch.bfloat16) for name in SHAPES]
    + [(name, dtype) for dtype in (torch.float16, torch.float32) for name in FEW],
    ids=str,
)
def test_agrees_with_eager(name, dtype, training):
    """Output, running statistics and every gradient, by the error rule."""
    case = Case(name, dtype)
    exact, grad = case.exact(), None
    if training:
        before = case.eager(True, **{n: t if "run" not in n else t.clone() for n, t in exact.items()}, relu=False)  # fmt: skip
        grad = torch.where(before.abs() < MARGIN, 0, torch.randn_like(before)).to(dtype)
    results = [
        outcome(functools.partial(call, training), operands, grad)
        for call, operands in (
            (case.ours, case.operands), (case.eager, case.operands), (case.eager, exact),
        )
    ]  # fmt: skip
    # parameters stay fp32, but what they are computed from was rounded to dtype;
    # fp32 sums of a million values in another order than eager's
    assert_rule(*results, atol_dtype=dtype, scale=8 if dtype == torch.float32 else 1)


@pytest.mark.parametrize("name", SHAPES)
def test_two_runs_give_the_same_bits(name):
    case = Case(name, torch.bfloat16)
    grad = torch.randn_like(case.operands["residual"])
    run = functools.partial(outcome, functools.partial(case.ours, True), case.operands, grad)
    first = run()
    assert_same_bits(first, run())
    assert_same_bits(first, run())


@pytest.mark.parametrize("name", ["1x1 64 to 256", "3x3 128 stride 2", "stem"])
def test_prologue_and_masked_epilogue(name):
    """What no operator uses yet: batch norm and ReLU of what is loaded, and their gradient's sums."""
    launch = importlib.import_module("interpreting").launchers()
    case = Case(name, torch.bfloat16)
    x, w = case.operands["input"], case.operands["weight"]
    pairs = [(s, s) for s in case.window[:3]]
    vectors = [torch.randn(x.shape[1], device="cuda") for _ in range(3)]
    mean, scale, shift = (v.view(1, -1, 1, 1) for v in vectors)
    affine = launch.Affine(*vectors)
    moved = (x.double() - mean) * scale + shift
    x = torch.where(moved.abs() < MARGIN, x + 0.5, x)
    moved = (x.double() - mean) * scale + shift
    y, moments = launch.fprop(x, w, *pairs, prologue=affine, statistics=True)
    activated = ((x.float() - mean) * scale + shift).relu().to(x.dtype)
    truth = F.conv2d(moved.relu(), w.double(), None, *case.window)
    assert_close(y, F.conv2d(activated, w, None, *case.window), truth)
    assert moments.means.isfinite().all() and (moments.squares >= 0).all()
    dy = torch.randn_like(y)
    g, sums, sums_x = launch.dgrad(dy, w, x.shape, *pairs, behind=launch.Behind(x, affine))

    def gradient(dy, w):
        window = ((s, s) for s in case.window[:3])
        stride, padding, dilation = window
        whole = torch.ops.aten.convolution_backward(
            dy, x.to(dy.dtype), w, None, stride, padding, dilation, False, [0, 0], 1,
            [True, False, False],
        )[0]  # fmt: skip
        return torch.where(moved <= 0, 0, whole)

    certain = moved.abs() > 0.02
    truth = gradient(dy.double(), w.double())
    found, eager, exact = (torch.where(certain, t, 0) for t in (g, gradient(dy, w), truth))
    assert_close(found, eager, exact)
    for ours, wide in ((sums, g.double()), (sums_x, g.double() * (x.double() - mean))):
        expected = wide.sum((0, 2, 3))
        error = (ours.double().sum(0) - expected).abs().max()
        assert error <= 1e-2 * wide.square().sum((0, 2, 3)).sqrt().max()


def test_another_stream():
    """Launched on the current stream: a slow producer there must be waited for."""
    case = Case("3x3 128", torch.bfloat16)
    expected = outcome(functools.partial(case.ours, True), case.operands)["output"]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = {name: t.clone() for name, t in case.operands.items()}
        late["input"].zero_()
        torch.cuda._sleep(50_000_000)
        late["input"].copy_(case.operands["input"])
        found = case.ours(True, **late)
    stream.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", ["3x3 128 stride 2", "3x3 512, one image"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_cuda_graph(training, shape):
    """Captured with its backward, replayed on new data: running statistics move once a replay."""
    case, fresh = (Case(shape, torch.bfloat16) for _ in "ab")
    static = {n: t.clone().requires_grad_("run" not in n) for n, t in case.operands.items()}
    wanted = [t for n, t in static.items() if "run" not in n]

    def step():
        if not training:
            with torch.no_grad():
                return [case.ours(False, **static)]
        output = case.ours(True, **static)
        return [output, *torch.autograd.grad(output, wanted, torch.ones_like(output))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile before the capture
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        for name, tensor in static.items():
            tensor.copy_(fresh.operands[name])
    graph.replay()
    buffers = {n: static[n].clone() for n in ("running_mean", "running_var")}
    found = [t.clone() for t in results]
    with torch.no_grad():
        for name in buffers:
            static[name].copy_(fresh.operands[name])
    for one, other in zip(found, step(), strict=True):
        assert torch.equal(one, other)
    for name, value in buffers.items():
        assert torch.equal(value, static[name])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device only")
def test_another_device():
    case = Case("3x3 128", torch.bfloat16)
    expected = outcome(functools.partial(case.ours, True), case.operands)
    there = {name: t.to("cuda:1") for name, t in case.operands.items()}
    assert torch.cuda.current_device() == 0
    found = outcome(functools.partial(case.ours, True), there)
    assert found["output"].device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    assert_same_bits(
        {n: t.cpu() for n, t in found.items()}, {n: t.cpu() for n, t in expected.items()}
    )


@pytest.mark.parametrize("wide", ["input", "output"])
def test_beyond_2_to_the_31_elements(wide):
    """Forward and both gradients, the last pixels too."""
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of free memory")
    c, k = (1024, 16) if wide == "input" else (16, 1024)
    n, h, w = 16, 363, 364
    last = {"device": "cuda", "dtype": torch.bfloat16, "memory_format": torch.channels_last}
    x = torch.empty(n, c, h, w, **last).uniform_(-1, 1).requires_grad_()
    weight = torch.empty(k, c, 1, 1, **last).normal_(std=c**-0.5).requires_grad_()
    assert n * h * w * max(c, k) > 2**31
    conv = ops.OPERATORS["triton"]
    window = ((1, 1), (0, 0), (1, 1), 1)
    y = conv.conv(x.detach(), weight.detach(), None, *window)
    dx = conv.conv_dgrad(y, x.detach(), weight.detach(), *window)
    dw, _ = conv.conv_wgrad(y, x.detach(), weight.detach(), *window, [True, False])
    matrix = weight.detach().double().flatten(1)
    total = torch.zeros_like(matrix)
    for image in range(n):
        rows = x.detach()[image].permute(1, 2, 0).flatten(0, 1)
        found = y[image].permute(1, 2, 0).flatten(0, 1)
        total += found.double().T @ rows.double()
        if image in (0, n - 1):
            expected = rows.double() @ matrix.T
            torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=2e-2)
            back = dx[image].permute(1, 2, 0).flatten(0, 1).double()
            torch.testing.assert_close(back, found.double() @ matrix, rtol=1e-2, atol=4e-2)
    scale = total.abs().max()
    torch.testing.assert_close(dw.double().flatten(1) / scale, total / scale, rtol=1e-2, atol=1e-2)


def test_out_of_memory_leaves_everything_usable():
    case = Case("1x1 64 to 256", torch.bfloat16, residual=False)
    expected = outcome(functools.partial(case.ours, True), case.operands)
    operands = {name: None if t is None else t.clone() for name, t in case.operands.items()}
    torch.cuda.empty_cache()
    used = torch.cuda.memory_reserved() + 2**20
    # room for the raw convolution, not for what is made of it
    room = expected["output"].numel() * 2 * 1.5
    torch.cuda.set_per_process_memory_fraction(
        min(1.0, (used + room) / torch.cuda.get_device_properties(0).total_memory)
    )
    try:
        with pytest.raises(torch.OutOfMemoryError):
            case.ours(True, **operands)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    for name in ("running_mean", "running_var"):
        assert torch.equal(operands[name], case.operands[name])
    assert_same_bits(outcome(functools.partial(case.ours, True), operands), expected)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_inductor(training):
    """The kernels inside the compiled graph: one graph, equal numbers, buffers updated once."""
    torch._dynamo.reset()
    case = Case("3x3 128 stride 2", torch.bfloat16)
    grad = torch.randn_like(case.operands["residual"]) if training else None
    call = functools.partial(case.ours, training)
    found = outcome(torch.compile(call, fullgraph=True), case.operands, grad)
    for name, value in outcome(call, case.operands, grad).items():
        torch.testing.assert_close(
            found[name], value, msg=lambda text, name=name: f"{name}: {text}"
        )
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["1x1 64 to 256", "3x3 128"])
def test_autotuned(name, monkeypatch):
    """Measured on outputs of its own; whichever kernel wins gives the same numbers."""
    case = Case(name, torch.bfloat16)
    shipped = outcome(functools.partial(case.ours, True), case.operands)
    tuning = importlib.import_module("fastres.kernels.tuning")
    monkeypatch.setattr(tuning, "_measured", {})
    monkeypatch.setenv("FASTRES_AUTOTUNE", "1")
    tuned = outcome(functools.partial(case.ours, True), case.operands)
    assert len(tuning._measured) == 1
    for key, value in shipped.items():
        torch.testing.assert_close(tuned[key], value, rtol=1e-2, atol=1e-2)


SMALL = [name for name in SHAPES if "image" in name] + ["odd", "ResNeXt 32x16", "dilated"]


@pytest.mark.parametrize("parts", [1, 2, 7, 40], ids=lambda parts: f"in {parts}")
@pytest.mark.parametrize("name", SMALL)
def test_small_tiles_and_parts(name, parts):
    """Every tile of a whole depth or of a split one, with the epilogues of eval and of training; of
    40 parts some are empty."""
    launch = importlib.import_module("interpreting").launchers()
    configs = importlib.import_module("fastres.kernels.configs")
    case = Case(name, torch.bfloat16)
    x, w, residual = (case.operands[key] for key in ("input", "weight", "residual"))
    *sizes, groups = case.window
    window = (*((size, size) for size in sizes), groups)
    truth, eager = F.conv2d(x.double(), w.double(), None, *window), F.conv2d(x, w, None, *window)
    variance, mean = torch.var_mean(truth, (0, 2, 3), correction=0)
    kinds = configs.TILES[configs.architecture(x.device)]
    for tile in kinds["plain"] if parts == 1 else kinds["parts"]:
        run = functools.partial(
            launch.fprop, x, w, *window, residual=residual, relu=True,
            tile=tile._replace(parts=parts),
        )  # fmt: skip
        found, _ = run()
        assert_close(found, (eager + residual).relu(), (truth + residual).relu())
        assert torch.equal(found, run()[0])
        if parts == 1:
            continue
        found, moments = launch.fprop(
            x, w, *window, statistics=True, tile=tile._replace(parts=parts)
        )
        assert_close(found, eager, truth)
        means, squares, counts = (t.double() for t in moments)
        whole = (counts[:, None] * means).sum(0) / counts.sum()
        spread = (squares + counts[:, None] * (means - whole).square()).sum(0) / counts.sum()
        torch.testing.assert_close(whole, mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(spread, variance, rtol=1e-4, atol=1e-4)


def test_a_single_image_is_split():
    """On this device too: more programs than tiles of a long depth."""
    configs = importlib.import_module("fastres.kernels.configs")
    x = torch.empty(1, 512, 7, 7, device="cuda", dtype=torch.bfloat16)
    problem = configs.problem("plain", x, False, 1, 49, 512, 512, 9)
    tiles = configs.candidates(problem) + configs.split_candidates(problem)
    assert configs.shipped(problem, tiles).parts > 4


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] not in (9, 10),
    reason="no tensor descriptors",
)
@pytest.mark.parametrize("name", [n for n in RESNET50 if n != "stem"])
def test_descriptors(name):
    launch = importlib.import_module("interpreting").launchers()
    configs = importlib.import_module("fastres.kernels.configs")
    case = Case(name, torch.bfloat16, residual=False)
    x, w = case.operands["input"], case.operands["weight"]
    *sizes, groups = case.window
    window = (*((size, size) for size in sizes), groups)
    truth, eager = F.conv2d(x.double(), w.double(), None, *window), F.conv2d(x, w, None, *window)
    dy = torch.randn_like(eager)

    def gradient(dy, x, w):
        sizes = (*window[:3], False, [0, 0], groups, [True, False, False])
        return torch.ops.aten.convolution_backward(dy, x, w, None, *sizes)[0]

    for tile in configs.TILES[configs.architecture(x.device)]["descriptors"]:
        found, moments = launch.fprop(x, w, *window, statistics=True, tile=tile)
        assert_close(found, eager, truth)
        again, _ = launch.fprop(x, w, *window, statistics=True, tile=tile)
        assert torch.equal(found, again) and moments.means.isfinite().all()
        if name.startswith("1x1") and "stride" in name:  # leaves pixels without a tap
            continue
        found, *_ = launch.dgrad(dy, w, x.shape, *window, tile=tile)
        assert_close(found, gradient(dy, x, w), gradient(*(t.double() for t in (dy, x, w))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_twenty_training_steps_beside_eager(dtype):
    """ResNet-50 under autocast: losses are as near to fp32's as eager's are."""
    torch.manual_seed(0)
    plain = fastres.models.resnet50(num_classes=10).cuda().to(memory_format=torch.channels_last)
    images = torch.randn(32, 3, 128, 128, device="cuda").to(memory_format=torch.channels_last)
    target = torch.arange(32, device="cuda") % 10
    losses = {}
    for name, backend, autocast in (
        ("fp32", "eager", False), ("eager", "eager", True), ("ours", "triton", True),
    ):  # fmt: skip
        net = copy.deepcopy(plain)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
        scaler = torch.amp.GradScaler("cuda", enabled=autocast and dtype == torch.float16)
        losses[name] = []
        with fastres.backend(backend):
            for _ in range(20):
                optimizer.zero_grad()
                with torch.autocast("cuda", dtype, enabled=autocast):
                    loss = F.cross_entropy(net(images).float(), target)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                losses[name].append(loss.detach())
    fp32, eager, ours = (torch.stack(losses[name]) for name in ("fp32", "eager", "ours"))
    assert ours[-1] < 0.5 * ours[0]
    error, allowed = (ours - fp32).abs(), 2 * (eager - fp32).abs().max() + 0.05
    assert error.max() <= allowed, f"{error.max():.3f} > {allowed:.3f} at step {error.argmax()}"
