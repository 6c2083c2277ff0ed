"""The head of a classifier in a traced forward: global average pooling, flattening, a linear layer,
and before that a dropout, which is none in eval.

However its author wrote them: modules, ``x.mean((2, 3))``, ``F.adaptive_avg_pool2d(x, 1)``,
``torch.flatten(x, 1)``, ``x.view(x.size(0), -1)``. What stands before the linear layer is kept as a
function of its own, for the calls that the fused operator leaves alone.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from .. import heads
from .trace import Trace

_MAP = {2, 3}  # the dimensions that are averaged


@dataclass
class Head:
    """One fused call, like :class:`fastres.convert.match.Match`; ``via`` are its modules' paths,
    the linear layer's last."""

    nodes: list[Node]
    input: Node
    via: tuple[str, ...]
    kind: ClassVar[str] = heads.KIND
    conv: ClassVar[None] = None
    bn: ClassVar[None] = None
    act: ClassVar[None] = None
    pool: ClassVar[None] = None
    residual: ClassVar[None] = None

    @property
    def modules(self) -> tuple[str, ...]:
        return self.via

    def call(self) -> Callable:
        """``call(input, module, pooling, fc)``, whose ``module`` holds the others."""
        author = self._before_the_layer()

        def mean_linear(input, module, pooling, fc):
            output = heads.mean_linear(input, pooling, fc)
            return fc(author(module, input)) if output is None else output

        mean_linear.site = heads.KIND  # for fastres.convert.program
        return mean_linear

    def _before_the_layer(self) -> Callable:
        """What the author has before the linear layer, of the module and the map."""
        graph = Graph()
        # the input itself may have been replaced since
        copies = {self.nodes[0].args[0]: graph.placeholder("input")}
        for node in self.nodes[:-1]:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(copies[self.nodes[-2]])
        code = graph.python_code("self")
        namespace = dict(code.globals)
        exec(code.src, namespace)  # noqa: S102
        return namespace["forward"]


def ending_in(node: Node, traced: Trace):
    """The head whose linear layer ``node`` calls, if there is one."""
    module = traced.module(node)
    if traced.training or module is None or not heads.is_linear(module):
        return
    value, dropping = _undropped(_argument(node), traced)
    pooled, flattening = _unflattened(value, traced)
    if not isinstance(pooled, Node):
        return
    dimensions = _pooled_dimensions(pooled, traced)
    if dimensions == 0 or (dimensions == 4 and not flattening):
        return
    nodes = [pooled, *flattening, *dropping, node]
    if not all(set(nodes).issuperset(inner.users) for inner in nodes[:-1]):
        return
    paths = tuple(each.target for each in nodes if each.op == "call_module")
    yield Head(nodes, pooled.args[0], paths)


def _argument(node: Node) -> Node | None:
    """The only argument of a call."""
    single = len(node.args) == 1 and isinstance(node.args[0], Node) and not node.kwargs
    return node.args[0] if single else None


def _undropped(value: Node | None, traced: Trace) -> tuple[Node | None, list[Node]]:
    """What stands before a dropout that drops nothing, and the dropout; itself if there is none.

    A module's mode is looked at in every call: in a model in eval it may be in training.
    """
    if (module := traced.module(value)) is not None:
        return (_argument(value), [value]) if heads.is_dropout(module) else (value, [])
    if value is None or value.target is not F.dropout:
        return value, []
    before, *positional = value.args
    given = dict(zip(("p", "training"), positional, strict=False)) | value.kwargs
    drops = given.get("training", True) and given.get("p", 0.5) != 0
    return (value, []) if drops else (before, [value])


def _unflattened(value: Node | None, traced: Trace) -> tuple[Node | None, list[Node]]:
    """What ``value`` is made of by flattening, and the nodes that do it; itself if by none."""
    module = traced.module(value)
    if module is not None:
        return (_argument(value), [value]) if heads.is_flatten(module) else (value, [])
    if value is None or not value.args:
        return value, []
    before, *arguments = value.args
    if value.target in (torch.flatten, "flatten"):
        rest = tuple(arguments) + tuple(value.kwargs.values())
        return (before, [value]) if rest in ((1,), (1, -1)) else (value, [])
    if value.target in ("view", "reshape") and not value.kwargs:
        sizes = arguments[0] if len(arguments) == 1 else arguments
        if isinstance(sizes, (list, tuple)) and len(sizes) == 2 and sizes[1] == -1:
            counting = _counting(sizes[0], before)
            return (before, [*counting, value]) if counting else (value, [])
    return value, []


def _counting(size, value: Node) -> list[Node]:
    """The nodes that make ``size`` the number of rows of ``value``; none where it is another."""
    if not isinstance(size, Node) or size.op == "call_module":
        return []
    if size.target == "size":
        return [size] if size.args == (value, 0) and not size.kwargs else []
    if size.target is operator.getitem and size.args[1] == 0:
        shape = size.args[0]
        if isinstance(shape, Node) and shape.args in ((value,), (value, "shape")):
            return [shape, size] if shape.target in ("size", getattr) else []
    return []


def _pooled_dimensions(node: Node, traced: Trace) -> int:
    """2 or 4 where ``node`` is a global average pooling, see heads.pooled_dimensions; else 0."""
    module = traced.module(node)
    if module is not None:
        return heads.pooled_dimensions(module) if _argument(node) is not None else 0
    if node.target is F.adaptive_avg_pool2d:
        return 4 if node.args[1:] in ((1,), ((1, 1),), ([1, 1],)) and not node.kwargs else 0
    if node.target in (torch.mean, "mean"):
        given = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | node.kwargs
        over, keep = given.pop("dim", None), given.pop("keepdim", False)
        if isinstance(over, (list, tuple)) and not given and {d % 4 for d in over} == _MAP:
            return 4 if keep else 2
    return 0
