"""Argument checks of the fused operators: each message names the argument, what was expected and
what came. They run before any kernel, so a refused call changes nothing.

Errors are of the kind PyTorch raises for the same mistake where it has one.
"""

import torch
from torch import Tensor

from .arguments import accumulation_dtype, compute_dtype, conv_output_size, pair, resolve_padding

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def add_relu(input: Tensor, residual: Tensor) -> None:
    _activation(input)
    _residual(residual, input.shape, input.dtype, input.device)


def bn_relu(
    input: Tensor, residual: Tensor | None, running_mean, running_var, weight, bias,
    training: bool, eps: float,
) -> None:  # fmt: skip
    _activation(input)
    _batch_norm(
        input.shape, input.dtype, input.device, running_mean, running_var, weight, bias, training,
        eps, names=("weight", "bias"),
    )  # fmt: skip
    if residual is not None:
        _residual(residual, input.shape, input.dtype, input.device)


def bn_relu_apply(input: Tensor, residual: Tensor | None, mean, invstd, weight, bias) -> None:
    """Statistics that were taken before, in the dtype that accumulates."""
    bn_relu(input, residual, None, None, weight, bias, True, 1.0)
    for name, vector in (("mean", mean), ("invstd", invstd)):
        _vector(name, vector, input.shape[1], input.device)
        _same_dtype(name, vector.dtype, accumulation_dtype(input.dtype))


def conv_bn_relu(
    input: Tensor, weight: Tensor, bias, residual, running_mean, running_var, bn_weight, bn_bias,
    stride, padding, dilation, groups: int, training: bool, eps: float,
) -> None:  # fmt: skip
    """Whether trained or folded; the geometry in any of the forms that F.conv2d takes."""
    size = conv(input, weight, bias, stride, padding, dilation, groups)
    dtype = compute_dtype(input)
    _batch_norm(
        size, dtype, input.device, running_mean, running_var, bn_weight, bn_bias, training,
        eps, names=("bn_weight", "bn_bias"),
    )  # fmt: skip
    if residual is not None:
        _residual(residual, size, dtype, input.device)


def mean_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _activation(input)
    tensor("weight", weight)
    if weight.dim() != 2 or weight.shape[1] != input.shape[1]:
        raise RuntimeError(
            f"weight: expected shape (K, {input.shape[1]}) for input {_shape(input)}, "
            f"got {_shape(weight)}"
        )
    _same_device("weight", weight, input.device)
    _same_dtype("weight", compute_dtype(weight), compute_dtype(input))
    if bias is not None:
        _vector("bias", bias, weight.shape[0], input.device)
        _same_dtype("bias", compute_dtype(bias), compute_dtype(input))


def conv(input: Tensor, weight: Tensor, bias, stride, padding, dilation, groups: int) -> tuple:
    """Gives the output's size."""
    _activation(input)
    stride, dilation = pair("stride", stride), pair("dilation", dilation)
    padding = resolve_padding(padding, weight, stride, dilation)
    _convolution(input, weight, bias, stride, padding, dilation, groups)
    size = conv_output_size(input.shape, weight.shape, stride, padding, dilation)
    _output_map(size, weight.shape[2:], padding)
    dtype = compute_dtype(input)
    _same_dtype("weight", compute_dtype(weight), dtype)
    if bias is not None:
        _same_dtype("bias", compute_dtype(bias), dtype)
    return size


def tensor(name: str, value) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")


def _activation(input: Tensor) -> None:
    """A floating-point tensor of shape (N, C, H, W)."""
    tensor("input", input)
    if input.dtype not in _DTYPES:
        raise TypeError(
            f"input: expected float32, bfloat16, float16 or float64, got {_dtype(input)}"
        )
    if input.dim() != 4:
        raise ValueError(
            f"input: expected 4 dimensions (N, C, H, W), got {input.dim()}: {_shape(input)}"
        )


def _residual(residual: Tensor, shape, dtype: torch.dtype, device: torch.device) -> None:
    """The shape, dtype and device of what it is added to."""
    tensor("residual", residual)
    if residual.shape != shape:
        raise RuntimeError(f"residual: expected shape {tuple(shape)}, got {_shape(residual)}")
    if residual.dtype != dtype:
        raise TypeError(f"residual: expected {str(dtype)[6:]}, got {_dtype(residual)}")
    _same_device("residual", residual, device)


def _convolution(input: Tensor, weight: Tensor, bias, stride, padding, dilation, groups) -> None:
    """``weight`` (K, C / groups, R, S) and the geometry of F.conv2d, as pairs."""
    tensor("weight", weight)
    if weight.dim() != 4:
        raise RuntimeError(
            f"weight: expected 4 dimensions (K, C / groups, R, S), got {_shape(weight)}"
        )
    for name, values, least in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if values[0] < least or values[1] < least:
            raise RuntimeError(f"{name}: expected at least {least}, got {tuple(values)}")
    channels, filters = input.shape[1], weight.shape[0]
    if groups < 1 or channels % groups or filters % groups:
        raise RuntimeError(
            f"groups: expected a divisor of the {channels} input and {filters} output channels, "
            f"got {groups}"
        )
    if weight.shape[1] * groups != channels:
        raise RuntimeError(
            f"input: expected {weight.shape[1] * groups} channels for weight {_shape(weight)} "
            f"with groups={groups}, got {_shape(input)}"
        )
    _same_device("weight", weight, input.device)
    if bias is not None:
        _vector("bias", bias, filters, input.device)


def _output_map(size, kernel, padding) -> None:
    """A convolution's output must have at least one row and column."""
    if size[2] < 1 or size[3] < 1:
        raise RuntimeError(
            f"weight: kernel {tuple(kernel)} does not fit the input padded by {tuple(padding)}; "
            f"the output would be {tuple(size[2:])}"
        )


def _batch_norm(
    shape, dtype, device, running_mean, running_var, weight, bias, training, eps,
    names,
) -> None:  # fmt: skip
    """The parameters and statistics of F.batch_norm, vectors of C values, on a map of ``shape``."""
    if training and shape[0] * shape[2] * shape[3] == 1:
        raise ValueError(
            "input: expected more than 1 value per channel when training, "
            f"got input size {tuple(shape)}"
        )
    if eps < 0 or (training and eps == 0):
        raise ValueError(
            f"eps: expected a {'positive' if training else 'non-negative'} number, got {eps}"
        )
    if not training and (running_mean is None or running_var is None):
        name = "running_mean" if running_mean is None else "running_var"
        raise RuntimeError(f"{name}: expected a Tensor when training=False, got None")
    for name, vector in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        (names[0], weight),
        (names[1], bias),
    ):
        if vector is not None:
            _vector(name, vector, shape[1], device)
            # as eager: the activations' dtype, or fp32 beside narrower activations
            if vector.dtype != dtype and (vector.dtype != torch.float32 or dtype == torch.float64):
                raise RuntimeError(
                    f"{name}: expected {str(dtype)[6:]} (or float32 beside a narrower input), "
                    f"got {_dtype(vector)}"
                )
    if (running_mean is None) != (running_var is None):
        name = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"{name}: expected a Tensor beside the other running statistic, got None")


def _same_dtype(name: str, given: torch.dtype, expected: torch.dtype) -> None:
    """A convolution's operands have one dtype (that of autocast, where it applies)."""
    if given != expected:
        raise RuntimeError(f"{name}: expected {str(expected)[6:]}, got {str(given)[6:]}")


def _vector(name: str, vector: Tensor, length: int, device: torch.device) -> None:
    tensor(name, vector)
    if vector.dim() != 1 or vector.shape[0] != length:
        raise RuntimeError(f"{name}: expected shape ({length},), got {_shape(vector)}")
    _same_device(name, vector, device)


def _same_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise RuntimeError(f"{name}: expected device {device}, got {tensor.device}")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
