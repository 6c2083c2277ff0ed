"""Fused calls in a traced graph, in the place of what was matched."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch.fx import Graph, Node

from .. import sites, stems
from . import calls
from .heads import Head
from .match import Match
from .program import Name
from .trace import Trace

_RELU = Name("_relu")
# what the names written into a graph stand for, by plain strings: Dynamo compares them with those
NAMES = {str(_RELU): F.relu}


def fuse(traced: Trace, found: Sequence[Match | Head]) -> dict[Node, Node]:
    """Put one fused call in the place of each match; gives them by the matches' last nodes."""
    replaced: dict[Node, Node] = {}
    for each in found:
        call = _head_call if isinstance(each, Head) else _site_call
        last = each.nodes[-1]
        with traced.graph.inserting_before(last):
            replaced[last] = call(traced.graph, each, replaced)
        last.replace_all_uses_with(replaced[last])
        for node in reversed(each.nodes):
            traced.graph.erase_node(node)
    return replaced


def _site_call(graph: Graph, found: Match, replaced: dict[Node, Node]) -> Node:
    input = replaced.get(found.input, found.input)
    residual = replaced.get(found.residual, found.residual)

    def get(path: str | None) -> Node | None:
        return None if path is None else graph.create_node("get_attr", path)

    act = get(found.act) if isinstance(found.act, str) else found.act and _RELU
    rest = {"via": tuple(get(path) for path in found.via), "in_place": found.in_place}
    rest = {name: value for name, value in rest.items() if value}
    bn, added = get(found.bn), residual is not None
    if bn is None and found.conv is not None:
        return graph.call_function(sites.convolve, (input, get(found.conv)))
    if bn is None:
        return graph.call_function(calls.add_act, (input, residual, act), rest)
    if found.conv is None:
        target = calls.bn_add_act if added else sites.bn_act
        return graph.call_function(target, (input, bn, act, residual), rest)
    if found.pool is not None:
        arguments = (input, get(found.conv), bn, act, get(found.pool))
        return graph.call_function(stems.conv_bn_act_pool, arguments, rest)
    target = calls.conv_bn_add_act if added else sites.conv_bn_act
    return graph.call_function(target, (input, get(found.conv), bn, act, residual), rest)


def _head_call(graph: Graph, head: Head, replaced: dict[Node, Node]) -> Node:
    input = replaced.get(head.input, head.input)
    *pooling, fc = (graph.create_node("get_attr", path) for path in head.via)
    return graph.call_function(head.call(), (input, Name("self"), tuple(pooling), fc))


def join(graph: Graph, sites_calls: list[Node]) -> None:
    """Put one call of a branch in the place of its sites' last one."""
    *inner, last = sites_calls
    links = tuple(_link(call) for call in sites_calls)
    residual = last.args[4] if len(last.args) > 4 else None
    in_place = {"in_place": True} if last.kwargs.get("in_place") else {}
    with graph.inserting_before(last):
        call = graph.call_function(
            calls.branch, (sites_calls[0].args[0], links, residual), in_place
        )
    last.replace_all_uses_with(call)
    for each in (last, *reversed(inner)):
        graph.erase_node(each)


def _link(call: Node) -> tuple:
    """Convolution or None, batch norm, activation and identities of a site's call."""
    modules = call.args[1:4] if call.target is not sites.bn_act else (None, *call.args[1:3])
    return *modules, call.kwargs.get("via", ())
