"""Fusable patterns in a traced forward, and why the rest is none.

The patterns are ``[convolution ->] batch norm [-> identities] [-> addition] [-> ReLU]``,
``addition -> ReLU`` and the convolutions that are left; in eval also ``convolution ... ReLU ->
max-pool`` and those of :mod:`.heads`.
A fused call stands where its last node stood; it computes the same only if every value inside is
used once, and if nothing in between changes what the call reads.
"""

import operator
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from .. import fusable, stems
from . import heads
from .effects import Effects
from .swap import original_class
from .trace import IN_PLACE_OPERATORS, Trace

_RELU_FUNCTIONS = frozenset({F.relu, F.relu_, torch.relu, torch.relu_})
_RELU_METHODS = frozenset({"relu", "relu_"})
_ADD_FUNCTIONS = frozenset({operator.add, IN_PLACE_OPERATORS["iadd"], torch.add})
_ADD_METHODS = frozenset({"add", "add_"})
_FUNCTIONAL = ("conv2d", "batch_norm")
_SHARED = "value used by someone else too"


@dataclass
class Match:
    """One fused call: its nodes, in order, the last of which it replaces; all else are node paths.

    ``act`` is the path of an activation module, ``F.relu`` for a functional one, None for none;
    ``in_place`` says that the addition is one.
    """

    nodes: list[Node]
    input: Node
    conv: str | None = None
    bn: str | None = None
    via: tuple[str, ...] = ()
    residual: Node | None = None
    act: object = None
    bn_has_relu: bool = False
    in_place: bool = False
    pool: str | None = None

    @property
    def has_relu(self) -> bool:
        return self.act is not None or self.bn_has_relu

    @property
    def kind(self) -> str:
        parts = {"conv": self.conv, "bn": self.bn, "add": self.residual, "relu": self.has_relu}
        return "_".join(name for name, there in (parts | {"pool": self.pool}).items() if there)

    @property
    def modules(self) -> tuple[str, ...]:
        acts = (self.act,) if isinstance(self.act, str) else ()
        paths = (self.conv, self.bn, *self.via, *acts, self.pool)
        return tuple(path for path in paths if path is not None)


@dataclass
class Matches:
    found: list[Match] = field(default_factory=list)
    reasons: dict[Node, str] = field(default_factory=dict)  # why a node is in no match
    chains: list[list[Match]] = field(default_factory=list)  # of found ones, in training


def find(traced: Trace, effects: Effects) -> Matches:
    """All matches in a trace, the longest first at each ReLU, then what is left at batch norms, at
    last bare convolutions."""
    return _Finder(traced, effects).run()


class _Finder:
    def __init__(self, traced: Trace, effects: Effects):
        self.traced, self.effects = traced, effects
        self.nodes = list(traced.graph.nodes)
        self.place = {node: index for index, node in enumerate(self.nodes)}
        self.result = Matches()
        self.taken: set[Node] = set()

    def run(self) -> Matches:
        for node in self.nodes:
            if self.is_relu(node):
                self.first_safe(node, self.ending_in_relu(node))
        for node in self.nodes:
            if node not in self.taken and self.is_bn(node):
                self.first_safe(node, self.chains(node))
        for node in self.nodes:
            self.first_safe(node, self.acting_apart(node))
        if not self.traced.training:
            self.result.found = [self.with_pool(match) for match in self.result.found]
        for node in self.nodes:
            self.first_safe(node, heads.ending_in(node, self.traced))
        for node in self.nodes:
            if node not in self.taken and self.is_conv(node):
                self.first_safe(node, [Match([node], node.args[0], node.target)])
        self.result.found.sort(key=lambda match: self.place[match.nodes[-1]])
        if self.traced.training:
            self.result.chains = self.chained()
        for node in self.nodes:
            if node not in self.taken and (reason := self.why_alone(node)):
                self.result.reasons[node] = reason
        return self.result

    def first_safe(self, node: Node, candidates) -> None:
        for match in candidates:
            if self.is_safe(match):
                self.result.found.append(match)
                self.taken.update(match.nodes)
                return

    def chained(self) -> list[list[Match]]:
        """Matches of which each convolves what the one before gives to nobody else."""
        finished: list[list[Match]] = []
        chain_to: dict[Node, list[Match]] = {}  # by the last one's last node
        for match in self.result.found:
            if match.bn is None or match.pool is not None:
                continue
            chain = [match]
            before = chain_to.get(match.input)
            if match.conv is not None and before and self.is_safe(*before, match):
                chain = [*chain_to.pop(match.input), match]
            if match.has_relu and match.residual is None and _used_once(match.nodes[-1]):
                chain_to[match.nodes[-1]] = chain
            else:
                finished.append(chain)
        return [chain for chain in (*finished, *chain_to.values()) if len(chain) > 1]

    # --- kinds of nodes --------------------------------------------------------------------------

    def is_relu(self, node: Node) -> bool:
        if module := self.traced.module(node):
            return type(module) is nn.ReLU and not fusable.why_not_act(module) and _unary(node)
        if node.op == "call_function":
            return node.target in _RELU_FUNCTIONS
        return node.op == "call_method" and node.target in _RELU_METHODS

    def is_conv(self, node: Node) -> bool:
        module = self.traced.module(node)
        return isinstance(module, nn.Conv2d) and not fusable.why_not_conv(module) and _unary(node)

    def is_bn(self, node) -> bool:
        module = self.traced.module(node)
        return module is not None and fusable.is_bn(module) and not self.why_not_bn(node)

    def why_not_bn(self, node: Node) -> str:
        return fusable.why_not_bn(self.traced.module(node)) or _why_not_unary(node)

    def is_add(self, node) -> bool:
        if not isinstance(node, Node) or len(node.args) != 2 or node.kwargs:
            return False
        if not all(isinstance(operand, Node) for operand in node.args):
            return False
        if node.op == "call_function":
            return node.target in _ADD_FUNCTIONS
        return node.op == "call_method" and node.target in _ADD_METHODS

    # --- patterns --------------------------------------------------------------------------------

    def ending_in_relu(self, relu: Node):
        """Candidates for the pattern that ends in ``relu``, the longest first."""
        before = relu.args[0] if relu.args else None
        act = relu.target if relu.op == "call_module" else F.relu
        if not isinstance(before, Node) or not _used_once(before):
            return
        if self.is_add(before):
            yield from self.ending_in_add(before, relu, act)
        else:
            for match in self.chains(before, stretch=True):
                if not match.bn_has_relu:
                    match.nodes.append(relu)
                    match.act = act
                    yield match

    def ending_in_add(self, add: Node, relu: Node, act):
        first, second = add.args
        in_place = add.target in (IN_PLACE_OPERATORS["iadd"], "add_")
        for operand, residual in ((first, second), (second, first)):
            if in_place and operand is second and not self.effects.invisible(first, add):
                continue
            if operand is residual or not _used_once(operand):
                continue
            for match in self.chains(operand, stretch=True):
                if not match.bn_has_relu:
                    match.nodes += [add, relu]
                    match.act, match.residual, match.in_place = act, residual, in_place
                    yield match
        if not in_place or self.effects.invisible(first, add):
            yield Match([add, relu], first, residual=second, act=act, in_place=in_place)

    def chains(self, end, stretch: bool = False):
        """``conv -> bn -> identities`` and ``bn -> identities`` that end in ``end``."""
        via = []
        while stretch and isinstance(module := self.traced.module(end), nn.Identity):
            if fusable.why_not_via(module) or not _unary(end) or not _used_once(end.args[0]):
                return
            via.insert(0, end)
            end = end.args[0]
        if end in self.taken or not self.is_bn(end):
            return
        input, has_relu = end.args[0], fusable.has_relu(self.traced.module(end))
        paths = tuple(node.target for node in via)
        conv = self.traced.module(input)
        if isinstance(conv, nn.Conv2d) and not self.why_not_conv(input):
            yield Match(
                [input, end, *via], input.args[0], input.target, end.target, paths,
                bn_has_relu=has_relu,
            )  # fmt: skip
        if stretch or has_relu:
            yield Match([end, *via], input, None, end.target, paths, bn_has_relu=has_relu)

    def acting_apart(self, bn: Node):
        """``conv -> bn`` where timm's batch norm has another activation inside than ReLU."""
        module = self.traced.module(bn)
        if module is None or not fusable.acts_apart(module) or not _unary(bn):
            return
        conv = bn.args[0]
        if isinstance(self.traced.module(conv), nn.Conv2d) and not self.why_not_conv(conv):
            yield Match([conv, bn], conv.args[0], conv.target, bn.target)

    def with_pool(self, match: Match) -> Match:
        """A stem with the max-pool behind it, where that is its only user."""
        last = match.nodes[-1]
        if match.conv is None or match.residual is not None or not match.has_relu:
            return match
        for pool in last.users if _used_once(last) else ():
            module = self.traced.module(pool)
            if module is not None and not stems.why_not_pool(module) and _unary(pool):
                longer = replace(match, nodes=[*match.nodes, pool], pool=pool.target)
                return longer if self.is_safe(longer) else match
        return match

    def why_not_conv(self, node: Node) -> str:
        reason = fusable.why_not_conv(self.traced.module(node)) or _why_not_unary(node)
        return reason or ("" if _used_once(node) else _SHARED)

    # --- safety ----------------------------------------------------------------------------------

    def is_safe(self, *matches: Match) -> bool:
        """Whether the inputs, read by the fused call at its last node, are still the same there;
        several matches are a chain, each the input of the next."""
        nodes = [node for match in matches for node in match.nodes]
        paths = [path for match in matches for path in match.modules]
        first, last = self.place[nodes[0]], self.place[nodes[-1]]
        inputs = [(matches[0].input, first)]
        if matches[-1].residual is not None:
            inputs.append((matches[-1].residual, self.place[nodes[-2]]))
        mine = {self.traced.modules[path] for path in paths}
        for node in self.nodes[first + 1 : last]:
            if node in nodes:
                continue
            changed = self.effects.changed(node)
            for value, read in inputs:
                if self.place[node] > read and not changed.isdisjoint(self.effects.roots[value]):
                    return False
            module = self.traced.module(node)
            if module is not None and not mine.isdisjoint(module.modules()):
                return False  # it runs, and may change, a module of this match
            if node.op == "get_attr" and node.target.rpartition(".")[0] in paths:
                return False
        return True

    # --- reasons ---------------------------------------------------------------------------------

    def why_alone(self, node: Node) -> str:
        module = self.traced.module(node)
        if isinstance(module, nn.Conv2d):
            return fusable.why_not_conv(module) or _why_not_unary(node)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or (
            module and fusable.is_bn(module)
        ):
            return self.why_not_bn(node) or self.why_bn_alone(node)
        if isinstance(module, nn.ReLU) or (module is None and self.is_relu(node)):
            act = module if module is not None else F.relu
            return fusable.why_not_act(act) or self.why_relu_alone(node)
        if node.op == "call_function" and _plain_name(node) in _FUNCTIONAL:
            return f"{_plain_name(node)} is a function here, not a module"
        return ""

    def why_bn_alone(self, bn: Node) -> str:
        if not _used_once(bn):
            return _SHARED
        user = next(iter(bn.users))
        module = self.traced.module(user)
        if module is not None and fusable.why_not_act(module) and _is_activation(module):
            return fusable.why_not_act(module)
        return f"neither a convolution before it nor a ReLU behind it, but {self.name(user)}"

    def why_relu_alone(self, relu: Node) -> str:
        before = relu.args[0] if relu.args else None
        if not isinstance(before, Node):
            return "its argument is passed by name"
        if not _used_once(before):
            return _SHARED
        if self.is_add(before):
            return "the addition changes its operand in place"
        return f"no batch norm or addition before it, but {self.name(before)}"

    def name(self, node: Node) -> str:
        if module := self.traced.module(node):
            return f"{original_class(module).__name__} {node.target}"
        if node.op == "placeholder":
            return "the module's input"
        return "the module's output" if node.op == "output" else str(node.name)


def _plain_name(node: Node) -> str:
    """Of the function that a node calls; an operator's is ``conv2d.default``."""
    return getattr(node.target, "__name__", "").partition(".")[0]


def _used_once(node: Node) -> bool:
    return len(node.users) == 1


def _unary(node: Node) -> bool:
    return len(node.args) == 1 and isinstance(node.args[0], Node) and not node.kwargs


def _why_not_unary(node: Node) -> str:
    return "" if _unary(node) else "called with more than one value"


def _is_activation(module: nn.Module) -> bool:
    return type(module).__module__ == "torch.nn.modules.activation"
