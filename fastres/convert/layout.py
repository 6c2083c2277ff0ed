"""channels_last inside, whatever the caller's format is.

Convolutions and the fused operators are fastest on CPU with the channels innermost. So the topmost
converted modules (*entries*) switch contiguous images to channels_last on the way in and give
contiguous results back. Only a region is entered whose code cannot tell: see :mod:`fastres.convert.region`.
"""

import weakref

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.utils.hooks import RemovableHandle

from ..backend import serving
from ..memory_format import has_channels_last_strides, to_channels_last

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

ALWAYS, IN_EVAL = "always", "in eval"  # what an entry's _fastres_entry says

# entry -> (number of hooks ever registered when it was looked at, whether any sees values)
_looked_at: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def run(function, module: nn.Module, args: tuple):
    """``function(module, *args)``, in channels_last if that serves."""
    if not _applies(module, args):
        return function(module, *args)
    images = [to_channels_last(arg) if _is_image(arg) else arg for arg in args]
    return _contiguous(function(module, *images))


def _applies(module: nn.Module, args: tuple) -> bool:
    for image in args:
        if _is_image(image):
            break
    else:
        return False
    return (
        image.is_contiguous()
        and not has_channels_last_strides(image)
        and image.numel() > 0
        and not (module.training and module._fastres_entry == IN_EVAL)
        and not torch.compiler.is_compiling()
        and serving("conv_bn_relu", image.device) == "cpu"
        and not _is_watched(module)
    )


def _is_image(value) -> bool:
    return (
        isinstance(value, Tensor) and value.dim() == 4 and value.is_cpu and value.dtype in _DTYPES
    )


def _contiguous(output):
    """The 4-d tensors in an output made contiguous, in the containers they come in."""
    if isinstance(output, Tensor):
        return output.contiguous() if _is_image(output) else output
    if type(output) in (list, tuple):
        return type(output)(_contiguous(item) for item in output)
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*(_contiguous(item) for item in output))
    if isinstance(output, dict):
        for key, value in output.items():
            output[key] = _contiguous(value)
    return output


def _is_watched(module: nn.Module) -> bool:
    """Whether a hook inside sees values; looked up again only when a hook was added somewhere."""
    stamp, watched = _looked_at.get(module, (None, False))
    if stamp != RemovableHandle.next_id:
        watched = bool(nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks)
        for inner in module.modules():
            if inner is not module and (inner._forward_hooks or inner._forward_pre_hooks):
                watched = True
        _looked_at[module] = (RemovableHandle.next_id, watched)
    return watched
