"""One module's own forward as a graph: ``torch.fx`` with every child module a leaf.

Plain ``nn.Sequential`` containers may be looked into, so that a pattern that crosses a container's
border is seen. A trace that :mod:`fastres.convert.purity` does not vouch for is refused.
"""

import contextlib
import gc
import inspect
import operator
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import Attribute
from torch.utils._python_dispatch import TorchDispatchMode

from .purity import Refused, Watch, attribute_path, is_authors

_lock = threading.RLock()
_IN_PLACE = (
    "iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul",
    "ior", "ipow", "irshift", "isub", "itruediv", "ixor",
)  # fmt: skip


@dataclass
class Trace:
    """A forward's graph and what it holds under.

    ``required`` are the parameters that became placeholders; ``defaults`` the others', burned in.
    ``guards`` maps expressions on ``self`` and the names in ``libraries`` to expected values,
    ``types`` the parameters that the forward asked for their type to the one it was told.
    """

    graph: Graph
    training: bool
    required: tuple[str, ...]
    defaults: dict[str, object]
    names: set[str]
    guards: dict[str, object]
    libraries: dict[str, object]
    inlined: tuple[str, ...]
    modules: dict[str, nn.Module]
    types: dict[str, type]

    def module(self, node: object) -> nn.Module | None:
        """The leaf that ``node`` calls; None for anything else."""
        if isinstance(node, Node) and node.op == "call_module":
            return self.modules[node.target]
        return None


class TypeAsked(Refused):
    """The forward asks for the type of an argument."""


def traces(
    module: nn.Module, forward: Callable, training: bool, inline: Callable[[nn.Module], bool]
) -> list[Trace]:
    """:func:`trace`; of a forward that asks for its arguments' type, as if they were tensors and as
    if they were lists of them (DenseNet's layers take either), those that can be traced."""
    try:
        return [trace(module, forward, training, inline)]
    except TypeAsked as refusal:
        found = []
        for kind in (Tensor, list):
            with contextlib.suppress(Refused):
                found.append(trace(module, forward, training, inline, kind))
        if not found:
            raise refusal from None
        return found


def trace(
    module: nn.Module, forward: Callable, training: bool, inline: Callable[[nn.Module], bool],
    kind: type | None = None,
) -> Trace:  # fmt: skip
    """Trace ``forward``, a function of ``module``'s class, as in train or eval mode.

    ``inline`` says which child modules to look into, ``kind`` what arguments are where that is
    asked. Raises :class:`Refused`.
    """
    required, defaults = _parameters(forward)
    with _lock:
        tracer = _Tracer(module, forward, training, len(required), inline, kind)
        try:
            graph = tracer.run()
        except Refused:
            raise
        except Exception as error:  # noqa: BLE001 - the author's code may raise anything
            message = tracer.failure or str(error).strip().split("\n")[0]
            raise tracer.refusal(f"forward could not be traced: {message}") from None
    if tracer.failure:  # and the forward swallowed the error, or only asked
        raise tracer.refusal(f"forward could not be traced: {tracer.failure}")
    if tracer.keeps_values():
        raise Refused("forward keeps a tensor beyond the call")
    for node in graph.nodes:
        if node.meta.get("is_wrapped"):  # nobody knows what it does with its arguments
            raise Refused(f"forward calls {node.target.__name__}, hidden by torch.fx.wrap")
    guards = {**tracer.watch.guards, **tracer.structure_guards()}
    modules = {path: m for m, path in tracer.paths.items()}
    return Trace(
        graph, training, required, defaults, tracer.watch.names, guards, tracer.watch.libraries,
        tuple(tracer.inlined), modules, tracer.types,
    )  # fmt: skip


def _parameters(forward: Callable) -> tuple[tuple[str, ...], dict[str, object]]:
    if not inspect.isfunction(forward) or hasattr(forward, "__wrapped__"):
        raise Refused("forward is not a plain function (decorated?)")
    required, defaults = [], {}
    for parameter in list(inspect.signature(forward).parameters.values())[1:]:
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            raise Refused(f"forward has the {parameter.kind.description} parameter {parameter}")
        if parameter.default is parameter.empty:
            required.append(parameter.name)
        elif isinstance(parameter.default, (bool, int, float, str, tuple, type(None))):
            defaults[parameter.name] = parameter.default
        else:
            raise Refused(f"forward has a default for {parameter.name} that may change")
    return tuple(required), defaults


class _NoTensors(TorchDispatchMode):
    """Only traced values may be computed with: a real tensor would be burned in."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        raise Refused(f"forward computes {function} on tensors that are not its arguments")


class _Tracer(torch.fx.Tracer):
    proxy_buffer_attributes = True
    traced_func_name = "__call__"  # any function will do, see create_args_for_root

    def __init__(self, module, forward, training: bool, arity: int, inline, kind: type | None):
        super().__init__(autowrap_modules=())
        self.module, self.forward, self.arity, self.inline = module, forward, arity, inline
        self.paths: dict[nn.Module, str] = {m: path for path, m in module.named_modules()}
        self.inlined: dict[str, nn.Module] = {}
        self.failure = ""
        self.kind = kind
        self.types: dict[str, type] = {}
        self.refusal = Refused
        self.watch = Watch(module, training, self.path_of_module)
        self._thread = threading.get_ident()
        self._values: list[weakref.ref] = []
        self._parameters: dict[str, Proxy] = {}

    def run(self) -> Graph:
        with _NoTensors():
            graph = self.trace(self.module)
        self._parameters.clear()
        return graph

    # torch.fx patches nn.Module for the whole process: other threads go on as before

    def call_module(self, m, forward, args, kwargs):
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        if threading.get_ident() != self._thread:
            return attr_val
        # torch.fx's own cache is part of a reference cycle and would outlive the trace
        return super().getattr(attr, attr_val, self._parameters)

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        values = [
            self.create_proxy("placeholder", name, (), {})
            for name in list(inspect.signature(self.forward).parameters)[1 : 1 + self.arity]
        ]

        def watched(*args):
            with self.watch:
                return self.forward(*args)

        return watched, [self.module, *values]

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        if not self.inline(module):
            return True
        self.inlined[path] = module
        return False

    def path_of_module(self, module: nn.Module) -> str:
        if module not in self.paths:
            raise Refused(f"forward calls a {type(module).__name__} that is no sub-module")
        return self.paths[module]

    def proxy(self, node: Node) -> Proxy:
        return self._remember(_Value(node, self))

    def _remember(self, value: Proxy) -> Proxy:
        self._values.append(weakref.ref(value))
        return value

    def create_arg(self, a):
        if type(a) is OrderedDict:
            items = [(key, value) for key, value in a.items()]
            return self.create_node("call_function", OrderedDict, (self.create_arg(items),), {})
        if isinstance(a, dict) and type(a) is not dict:
            raise Refused(f"forward builds a {type(a).__name__}")
        return super().create_arg(a)

    def to_bool(self, obj):
        self.failure = "a decision depends on a tensor"
        return super().to_bool(obj)

    def iter(self, obj):
        self.failure = "it iterates over a tensor"
        return super().iter(obj)

    def type_of(self, value: Proxy) -> type:
        """What the author's code is told of a traced value's type."""
        if value.node.op != "placeholder":
            self.asked("a value's type")
        elif self.kind is None:
            self.asked("an argument's type")
            self.refusal = TypeAsked
        else:
            return self.types.setdefault(value.node.target, self.kind)
        return type(value)

    def asked(self, what: str) -> None:
        """The author's code asks what a traced value is, which is not what it will be."""
        self.failure = self.failure or f"a decision depends on {what}"

    def keeps_values(self) -> bool:
        """Whether a traced value outlived the trace: somebody stored it.

        Or it is in a cycle, as whatever was unpacked (``a, b = x.chunk(2, 1)``) is. That is young,
        and found without a look at every object of the process, which takes long.
        """
        for generation in (1, 2):
            if all(value() is None for value in self._values):
                return False
            gc.collect(generation)
        return any(value() is not None for value in self._values)

    def structure_guards(self) -> dict[str, object]:
        """What must stay as it is: listed containers' keys, and which names are one module."""
        guards, listed = {}, []
        containers = {*self.watch.containers, *self.inlined.values()}
        if self.forward is nn.Sequential.forward:
            containers.add(self.module)
        for container in containers:
            path = self.paths.get(container)
            if path is None:
                raise Refused("forward lists the children of a module that is no sub-module")
            guards[f"(*{attribute_path(path)}._modules,)"] = tuple(container._modules)
            listed += [(container, name) for name in container._modules]
        for parent, name in {*self.watch.looked_up, *listed}:
            child = parent._modules.get(name)
            path = ".".join(filter(None, (self.paths[parent], name)))
            if child is not None and self.paths[child] != path:
                guards[f"{attribute_path(path)} is {attribute_path(self.paths[child])}"] = True
        return guards


class _Value(Proxy):
    """A traced value that knows in-place operators apart and tells when it is asked for its type."""

    def __getattr__(self, name: str):
        if name == "data":  # a change through it has no version: what is made again would miss it
            raise Refused("forward uses .data of a value")
        if self.tracer.watch.asking:
            self.tracer.asked(f"whether a value has {name}")
        return self.tracer._remember(_Attribute(self, name))

    @property
    def __class__(self):
        if is_authors(sys._getframe(1).f_code) and not self.tracer.watch.parsing:
            return self.tracer.type_of(self)
        return type(self)


class _Attribute(Attribute, _Value):
    pass


def _in_place(name: str) -> Callable:
    """The operator under another name: torch.fx would write ``a += b``, which rebinds a number."""
    function = getattr(operator, name)

    def apply(a, b):
        return function(a, b)

    apply.__name__ = apply.__qualname__ = name
    return apply


IN_PLACE_OPERATORS = {name: _in_place(name) for name in _IN_PLACE}


def _define_in_place(name: str) -> None:
    def method(self, other):
        return self.tracer.create_proxy(
            "call_function", IN_PLACE_OPERATORS[name], (self, other), {}
        )

    setattr(_Value, f"__{name}__", method)


for _name in _IN_PLACE:
    _define_in_place(_name)
