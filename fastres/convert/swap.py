"""Converted modules: the author's instance under a sub-class that runs a plan.

``module.__class__`` becomes a sub-class made once for each class, so the module, its names,
parameters, buffers and hooks stay what they are, and so does ``isinstance``.
"""

import functools
import threading
import types

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .. import fusable
from . import layout

_lock = threading.Lock()
_STATE = ("_fastres_plan", "_fastres_entry")


class Converted:
    """Mixin of converted modules. ``_fastres_original`` is the author's class; by
    ``_fastres_class`` and ``_fastres_forward`` csrc/program.cpp knows that neither was overridden.

    ``_fastres_plan`` (in the instance's ``__dict__``) is None when it must be made again;
    ``_fastres_entry`` says whether the module switches to channels_last.
    """

    _fastres_original: type

    def __setattr__(self, name, value):
        self._fastres_touch(name, value)
        super().__setattr__(name, value)

    def __delattr__(self, name):
        self._fastres_touch(name, None)
        super().__delattr__(name)

    def add_module(self, name, module):
        self._fastres_touch(name, module)
        super().add_module(name, module)

    def _fastres_touch(self, name: str, value) -> None:
        """Drop the plan if it may depend on the attribute ``name``, about to become ``value``."""
        state = self.__dict__
        plan = state.get("_fastres_plan")
        if plan is None or name == "training":
            return
        if isinstance(value, nn.Module) or name in self._modules:
            stale = self._modules.get(name) is not value
        elif isinstance(value, Tensor):
            held = self._parameters.get(name, self._buffers.get(name))
            stale = held is None and name in plan.names
        else:
            stale = name in plan.names
        if stale:
            state["_fastres_plan"] = None

    def _replicate_for_data_parallel(self):
        """nn.DataParallel's replicas run the author's forward."""
        replica = super()._replicate_for_data_parallel()
        restore_class(replica)
        return replica

    def __reduce_ex__(self, protocol):
        """As the author's class does it, then converted again; the plan is made anew."""
        function, arguments, *rest = super().__reduce_ex__(protocol)
        own, author = type(self), self._fastres_original
        arguments = tuple(author if argument is own else argument for argument in arguments)
        return _rebuild, (author if function is own else function, arguments), *rest


def _rebuild(function, arguments):
    module = function(*arguments)
    swap_class(module)
    return module


def _forward_of(cls: type):
    """A ``forward`` with a code object of its own: torch.compile caches by code object."""

    def forward(self, *args, **kwargs):
        plan = self._fastres_plan
        if plan is None or kwargs or len(args) != plan.arity or isinstance(args[0], Proxy):
            return _call(self, args, kwargs)
        run = plan.run_train if self.training else plan.run_evaluate
        if self._fastres_entry:
            return layout.run(run, self, args)
        return run(self, *args)

    own = types.FunctionType(
        forward.__code__.replace(co_name="forward"), globals(), "forward", None, None
    )
    own.__doc__, own.__wrapped__ = cls.forward.__doc__, cls.forward  # inspect shows the author's
    return own


def _call(module: Converted, args: tuple, kwargs: dict):
    """A call that the quick path leaves: a stale plan, arguments by name, defaults given."""
    author = module._fastres_original.forward
    if any(isinstance(value, Proxy) for value in (*args, *kwargs.values())):
        return author(module, *args, **kwargs)  # somebody traces the model
    plan = module._fastres_plan
    if plan is None:
        if torch.compiler.is_compiling():
            return author(module, *args, **kwargs)
        plan = refresh(module)
    required = _bind(plan, args, kwargs)
    if required is None:
        return author(module, *args, **kwargs)
    run = plan.run_train if module.training else plan.run_evaluate
    if module._fastres_entry:
        return layout.run(run, module, required)
    return run(module, *required)


def _bind(plan, args: tuple, kwargs: dict) -> list | None:
    """The required arguments in order; None if anything else is given a value of its own."""
    names = (*plan.required, *plan.defaults)
    if not plan.required or len(args) > len(names):
        return None
    given = dict(zip(names, args, strict=False))
    if any(name in given for name in kwargs):  # torch.compile does not know dict.keys().isdisjoint
        return None
    given.update(kwargs)
    required = [given.pop(name) for name in plan.required if name in given]
    if len(required) < plan.arity:
        return None
    for name, value in given.items():
        default = plan.defaults.get(name, plan)
        if value is not default and not (type(value) is type(default) is int and value == default):
            return None
    return required


def refresh(module: Converted):
    """Make the plan again."""
    from .plan import build

    plan = build(module, {})
    module.__dict__["_fastres_plan"] = plan
    return plan


# --- classes -------------------------------------------------------------------------------------


def original_class(module: nn.Module) -> type:
    """The author's class of a module, converted or not."""
    return getattr(type(module), "_fastres_original", type(module))


def is_converted(module: nn.Module) -> bool:
    return isinstance(module, Converted)


def is_candidate(module: nn.Module) -> bool:
    """Whether a module's forward is its author's, to be looked at."""
    cls = original_class(module)
    if "forward" in module.__dict__ or isinstance(module, torch.jit.ScriptModule):
        return False
    if cls.__module__.startswith("torch.nn."):
        return cls is nn.Sequential
    return not (cls.__module__.startswith("fastres.") or fusable.is_bn(module))


def is_plain_container(module: nn.Module) -> bool:
    """Exactly an ``nn.Sequential``, without hooks or a patched forward."""
    if original_class(module) is not nn.Sequential:
        return False
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


@functools.cache
def _converted_class(cls: type) -> type:
    forward = _forward_of(cls)
    names = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_fastres_original": cls,
        "forward": forward,
        "_fastres_forward": forward,
    }
    own = types.new_class(cls.__name__, (Converted, cls), exec_body=lambda ns: ns.update(names))
    own._fastres_class = own
    return own


def swap_class(module: nn.Module, plan=None, entry: str = "") -> None:
    """Convert ``module``; without a plan, its next forward makes one."""
    if not is_converted(module):
        with _lock:
            module.__class__ = _converted_class(type(module))
    module.__dict__["_fastres_plan"] = plan
    module.__dict__["_fastres_entry"] = entry


def restore_class(module: nn.Module) -> None:
    """Undo :func:`swap_class`.

    Raises ``RuntimeError`` where another tool has sub-classed the converted class since.
    """
    if not is_converted(module):
        return
    if type(module) is not _converted_class(module._fastres_original):
        raise RuntimeError(
            f"model: a {type(module).__name__} inside was given another class after conversion; "
            "undo that first"
        )
    for name in _STATE:
        module.__dict__.pop(name, None)
    module.__class__ = module._fastres_original
