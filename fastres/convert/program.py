"""A traced forward as a program of the extension's, which runs it without Python's interpreter.

Step by step it does what the generated function does (:mod:`fastres.convert.generate`), and calls the
same Python functions wherever the extension leaves a site to them; ``csrc/program.h`` runs it.
"""

from torch.fx import Node

from .. import ops, sites, stems
from . import calls
from .trace import Trace

_SITES = {
    sites.conv_bn_act: "conv_bn_act",
    calls.conv_bn_add_act: "conv_bn_act",
    sites.bn_act: "bn_act",
    sites.convolve: "convolve",
    stems.conv_bn_act_pool: "conv_bn_act_pool",
}

MOST_OPERANDS = 16  # that csrc/program.cpp gives a call


class Name(str):
    """A name that generated code writes as it stands."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def program_of(traced: Trace, names: dict[Name, object]):
    """The ``Program``; None without the extension, or where a step is no call of a function or module.

    ``names`` says what the graph's :class:`Name`s stand for; ``self`` is the module.
    """
    if ops.extension is None:
        return None
    try:
        return _Writer(traced, names).write()
    except _Unwritable:
        return None


class _Unwritable(Exception):
    pass


class _Writer:
    def __init__(self, traced: Trace, names: dict[Name, object]):
        self.traced, self.names = traced, names
        self.slots: dict[Node, int] = {}
        self.steps: list[tuple] = []

    def write(self):
        nodes = list(self.traced.graph.nodes)
        last = {argument: node for node in nodes for argument in node.all_input_nodes}
        output = nodes[-1].args[0]
        for node in nodes[:-1]:
            if node.op == "placeholder":
                self.slots[node] = len(self.slots)
            elif node.op != "get_attr":
                self.step(node, [each for each in node.all_input_nodes if last[each] is node])
        if output not in self.slots:
            raise _Unwritable
        return ops.extension.Program(self.steps, len(self.slots), self.slots[output])

    def step(self, node: Node, over: list[Node]) -> None:
        function, kind = node.target, ""
        operands = [self.operand(argument) for argument in node.args]
        operands += [self.operand(argument) for argument in node.kwargs.values()]
        if node.op == "call_module":
            if len(node.args) != 1 or node.kwargs:
                raise _Unwritable
            function, operands = None, [_module(node.target), *operands]
        elif node.op == "call_function":
            kind = _SITES.get(function) or getattr(function, "site", "")
        else:
            raise _Unwritable
        if len(operands) > MOST_OPERANDS:
            raise _Unwritable
        finished = [self.slots[each] for each in over if each in self.slots]
        self.slots[node] = len(self.slots)
        self.steps.append((kind, function, operands, (*node.kwargs,), self.slots[node], finished))

    def operand(self, argument) -> tuple:
        if isinstance(argument, Node):
            if argument in self.slots:
                return "value", self.slots[argument]
            if argument.target not in self.traced.modules:
                raise _Unwritable  # a parameter, or a buffer
            return _module(argument.target)
        if isinstance(argument, Name):
            return ("constant", self.names[argument]) if argument != "self" else _module("")
        if isinstance(argument, tuple):
            return "tuple", [self.operand(item) for item in argument]
        if isinstance(argument, (list, dict, slice)):
            raise _Unwritable  # made anew in every call
        return "constant", argument


def _module(path: str) -> tuple:
    return "module", tuple(path.split(".")) if path else ()
