"""What the nodes of a traced forward may do to tensors: alias them, change them in place.

Everything that is not known to be harmless is taken to alias and to change all it is given.
"""

import inspect
import operator
import types

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from .. import fusable
from .purity import Refused
from .swap import is_plain_container, original_class
from .trace import IN_PLACE_OPERATORS, Trace, traces

_FRESH_FUNCTIONS = frozenset({
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg,
    torch.add, torch.sub, torch.mul, torch.div, torch.cat, torch.relu, torch.sigmoid, torch.tanh,
    F.relu, F.conv2d, F.batch_norm, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.linear,
    F.sigmoid, F.hardsigmoid,
})  # fmt: skip
_FRESH_METHODS = frozenset({
    "add", "sub", "mul", "div", "relu", "sigmoid", "tanh", "mean", "sum", "clone", "size", "dim",
})  # fmt: skip
_FACTS = frozenset({"shape", "ndim", "dtype", "device"})
# modules whose output never shares memory with their input (unless they work in place)
_FRESH_MODULES = (
    nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.Linear,
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU, nn.Hardswish,
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip


class Effects:
    """Answers for the nodes of one trace; ``known`` remembers the modules already looked at."""

    def __init__(self, traced: Trace, known: dict):
        self.traced, self.known = traced, known
        self.roots: dict[Node, frozenset[Node]] = {}
        for node in traced.graph.nodes:
            inherited = frozenset()
            if node.op != "output" and self._aliases(node):
                inherited = inherited.union(*(self.roots[n] for n in node.all_input_nodes))
            self.roots[node] = inherited | {node}

    def changed(self, node: Node) -> frozenset[Node]:
        """Whose memory ``node`` may write to: roots of the values it is given."""
        if node.op in ("placeholder", "get_attr", "output") or not self._changes(node):
            return frozenset()
        return frozenset().union(*(self.roots[n] for n in node.all_input_nodes))

    def alike(self, a: Node, b: Node) -> bool:
        """Whether the two values may share memory."""
        return not self.roots[a].isdisjoint(self.roots[b])

    def invisible(self, target: Node, at: Node) -> bool:
        """Whether nobody could tell if ``at`` changes ``target`` or makes a new value instead."""
        if any(root.op in ("placeholder", "get_attr") for root in self.roots[target]):
            return False
        nodes = list(self.traced.graph.nodes)
        after = set(nodes[nodes.index(at) + 1 :])
        sharing = (n for n in nodes if n is not at and n not in after and self.alike(n, target))
        return all(after.isdisjoint(n.users) for n in sharing)

    def on_arguments(self) -> tuple[bool, bool]:
        """Whether the forward may (return memory it was given or holds, change its arguments)."""
        nodes = list(self.traced.graph.nodes)
        arguments = {node for node in nodes if node.op == "placeholder"}
        held = {node for node in nodes if node.op == "get_attr"}
        returned = frozenset().union(*(self.roots[n] for n in nodes[-1].all_input_nodes))
        changes = any(not arguments.isdisjoint(self.changed(node)) for node in nodes)
        return not returned.isdisjoint(arguments | held), changes

    def _aliases(self, node: Node) -> bool:
        if node.op == "call_module":
            return self._of(self.traced.module(node))[0]
        if node.op == "call_function":
            if node.target is getattr and node.args[1] in _FACTS:
                return False
            return node.target not in _FRESH_FUNCTIONS or self._changes(node)
        return node.op == "call_method" and node.target not in _FRESH_METHODS

    def _changes(self, node: Node) -> bool:
        if node.op == "call_module":
            return self._of(self.traced.module(node))[1]
        return _works_in_place(node)

    def _of(self, module: nn.Module) -> tuple[bool, bool]:
        """Whether a module may (return memory it was given, change what it was given)."""
        key = (module, self.traced.training)
        if key not in self.known:
            self.known[key] = (True, True)  # what a module inside itself must assume
            self.known[key] = self._look(module)
        return self.known[key]

    def _look(self, module: nn.Module) -> tuple[bool, bool]:
        if fusable.is_bn(module):
            return False, False
        if isinstance(module, torch.jit.ScriptModule):
            return True, True
        cls = original_class(module)
        if cls.__module__.startswith("torch.nn.") and not is_plain_container(module):
            changes = bool(getattr(module, "inplace", False))
            return changes or cls not in _FRESH, changes
        try:
            inner = traces(module, cls.forward, self.traced.training, is_plain_container)
        except Refused:
            return True, True
        effects = [Effects(each, self.known).on_arguments() for each in inner]
        return tuple(map(any, zip(*effects, strict=True)))


def _works_in_place(node: Node) -> bool:
    """A call that names its own target as output: ``relu_``, ``inplace=True``, ``out=``."""
    if "out" in node.kwargs or node.kwargs.get("inplace"):
        return True
    if node.op == "call_method":
        return _is_in_place_name(node.target)
    if node.target in _IN_PLACE or _is_in_place_name(getattr(node.target, "__name__", "_")):
        return True
    if isinstance(node.target, types.FunctionType) and len(node.args) > 1:
        arguments = inspect.signature(node.target).bind_partial(*node.args, **node.kwargs).arguments
        return bool(arguments.get("inplace"))
    return False


def _is_in_place_name(name: str) -> bool:
    return name in ("setitem", "__setitem__") or (name.endswith("_") and not name.endswith("__"))


def _with_subclasses(classes: tuple[type, ...]) -> frozenset[type]:
    """The classes and their descendants in torch.nn."""
    found = set(classes)
    for cls in classes:
        inner = tuple(c for c in cls.__subclasses__() if c.__module__.startswith("torch.nn."))
        found |= _with_subclasses(inner)
    return frozenset(found)


_IN_PLACE = frozenset(IN_PLACE_OPERATORS.values())
_FRESH = _with_subclasses(_FRESH_MODULES)
