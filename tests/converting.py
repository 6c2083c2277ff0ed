"""Converted models beside deep copies left eager: shared by the test_convert_* files."""

import copy
from collections import Counter

import torch
from agreement import assert_close
from torch import Tensor, nn

import fastres


def kinds(model: nn.Module) -> dict[str, int]:
    """How many fused sites of each kind a model's summary has."""
    return dict(Counter(row.kind for row in fastres.summary(model).fused))


def reasons(model: nn.Module) -> dict[str, str]:
    """Why each module that is left alone is, by its path."""
    return {path: row.reason for row in fastres.summary(model).left_alone for path in row.modules}


def randomized(model: nn.Module) -> nn.Module:
    """Batch norms away from their initial values, so that none of their terms goes unnoticed."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("running_mean"):
                tensor.normal_(0, 0.2)
            elif tensor.dim() == 1 and name.endswith("weight"):
                tensor.uniform_(0.5, 1.5)
    return model


def images(channels: int = 8, size: int = 9) -> Tensor:
    return torch.randn(3, channels, size, size)


class Block(nn.Module):
    """A residual block whose forward the tests vary."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU()

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + x)


FUSED = {"conv_bn_relu": 1, "conv_bn_add_relu": 1}


def tensors(output) -> list[Tensor]:
    """The tensors in an output, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = output.values()
    return [tensor for item in output for tensor in tensors(item)]


def results(model: nn.Module, inputs, training: bool, call=None, grad: bool = True) -> dict:
    """Outputs, gradients of inputs and parameters, and buffers of one step from a fixed seed."""
    model.train(training)
    model.zero_grad()
    inputs = [x.detach().clone().requires_grad_(grad) for x in inputs]
    torch.manual_seed(3)
    with torch.set_grad_enabled(grad):
        # a leaf may not be changed in place, which some of the forwards do to their input
        outputs = tensors((call or model)(*(x * 1 for x in inputs)))
    found = {f"output {i}": tensor.detach() for i, tensor in enumerate(outputs)}
    if grad:
        weights = (torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape) for t in outputs)
        sum((w * t).sum() for w, t in zip(weights, outputs, strict=True)).backward()
        leaves = [(f"input {i}", x) for i, x in enumerate(inputs)] + [*model.named_parameters()]
        found |= {f"grad of {name}": x.grad for name, x in leaves if x.grad is not None}
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(ours: dict, eager: dict, rtol: float = 1e-9) -> None:
    """The same results up to fp64's rounding, relative to the largest value of all.

    Some gradients are zero but for rounding (a bias in front of a batch norm), hence "of all".
    """
    assert ours.keys() == eager.keys()
    largest = max(tensor.abs().max().item() for tensor in eager.values() if tensor.numel())
    for name, tensor in eager.items():
        torch.testing.assert_close(
            ours[name], tensor, rtol=0, atol=rtol * max(1, largest),
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


def formats(tensor: Tensor) -> tuple[bool, ...]:
    """Which memory formats a tensor is in; with one channel, or one pixel, it is in both."""
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.is_contiguous(), last


LAYOUTS = (torch.contiguous_format, torch.channels_last)


def assert_agrees(
    model: nn.Module, *inputs: Tensor, call: str = "forward", layouts=LAYOUTS, grad: bool = True
) -> nn.Module:
    """A converted copy of ``model`` gives what an eager copy gives; returns the converted copy.

    In fp64, where rounding hides nothing: outputs, all gradients and all buffers, in train and
    eval. In fp32: the outputs by the error rule, in both memory formats, which come out as eager's.
    """
    randomized(model)
    converted = fastres.convert(model, inplace=False)

    def caller(module):
        return module if call == "forward" else getattr(module, call)

    wide = [x.double() for x in inputs]
    for training in (False, True):
        ours, eager = (copy.deepcopy(m).double() for m in (converted, model))
        assert_same(
            results(ours, wide, training, caller(ours), grad),
            results(eager, wide, training, caller(eager), grad),
        )
        for layout in layouts:
            _assert_outputs_agree(converted, model, caller, inputs, training, layout)
    return converted


def _assert_outputs_agree(converted, model, caller, inputs, training: bool, layout) -> None:
    """In fp32, by the error rule, and in the memory format of eager's."""
    narrow = [x.float().contiguous(memory_format=layout) for x in inputs]

    def outputs(source: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        one = copy.deepcopy(source).to(dtype).train(training)
        torch.manual_seed(3)
        with torch.no_grad():
            return tensors(caller(one)(*(x.to(dtype, copy=True) for x in narrow)))

    ours, eager = (outputs(m, torch.float32) for m in (converted, model))
    truth = outputs(model, torch.float64)
    for index, (a, b, t) in enumerate(zip(ours, eager, truth, strict=True)):
        assert_close(a, b, t, f"output {index}, training={training}, {layout}", scale=16)
        if training or layout == torch.contiguous_format:
            assert formats(a) == formats(b)


def assert_whole_model_agrees(model: nn.Module, x: Tensor, scale: float = 1) -> nn.Module:
    """Everything a train step and an eval call give, in fp64; then fp32 in eval.

    In fp64 only: some fifty batch norms over few values amplify fp32's rounding (and flip ReLUs) so
    far that eager does not agree with itself in another memory format.
    """
    model = model.double()
    converted = fastres.convert(model, inplace=False)
    for training in (True, False):
        ours = results(converted, [x.double()], training, grad=training)
        eager = results(model, [x.double()], training, grad=training)
        assert_same(ours, eager, rtol=1e-9 * scale)
    truth = eager["output 0"]
    narrow = [
        results(copy.deepcopy(m).float(), [x], False, grad=False)["output 0"].double()
        for m in (converted, model)
    ]
    error, eager_error = ((y - truth).abs().max().item() for y in narrow)
    assert error <= 2 * eager_error + 1e-5 * truth.abs().max().item()
    return converted


def assert_exports_and_compiles(model: nn.Module, input: Tensor, operator: str) -> None:
    """A converted model in eval: once by ``operator`` where exported, and in one graph."""
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(input)
        exported = torch.export.export(model, (input,))
        targets = [str(node.target) for node in exported.graph.nodes]
        assert targets.count(f"fastres.{operator}.default") == 1
        torch.testing.assert_close(exported.module()(input), expected, rtol=1e-4, atol=1e-4)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(input), expected, rtol=1e-4, atol=1e-4)
