"""What a converted module runs instead of its author's forward: one generated function per mode."""

import itertools
import linecache
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from .. import sites, stems
from ..backend import extension_serves
from . import calls, heads, match, region
from .effects import Effects
from .program import Name, program_of
from .purity import Refused, attribute_path, module_path
from .swap import is_plain_container, original_class
from .trace import Trace, trace, traces

_count = itertools.count()


_RELU = Name("_relu")


@dataclass(frozen=True)
class Site:
    """A fused call in a module's forward; paths are relative to that module."""

    kind: str
    conv: str | None
    bn: str | None
    via: tuple[str, ...]
    act: str | None
    pool: str | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        paths = (self.conv, self.bn, *self.via, self.act, self.pool)
        return tuple(path for path in paths if path is not None)


@dataclass(frozen=True)
class Mode:
    """One mode's half of a plan.

    ``holds`` tells whether what the trace burned in is still so; ``alone`` maps the path of a leaf,
    or a functional ReLU's name, to why it is in no site; ``inlined`` are containers looked into.
    """

    run: Callable
    holds: Callable[[nn.Module], bool] = lambda module: True
    sites: tuple[Site, ...] = ()
    alone: dict[str, str] = field(default_factory=dict)
    inlined: tuple[str, ...] = ()
    refusal: str = ""
    on_strides: str = ""  # why the forward depends on its values' strides
    rewritten: bool = False  # to depend on them no longer
    random: bool = False  # draws random numbers
    program: Callable | None = None  # the same as run, where `condition` holds
    condition: Callable[[nn.Module], bool] | None = None  # `holds`; None if nothing was burned in


@dataclass(frozen=True)
class Plan:
    """Both modes; holds no module, so that copies of a module share it."""

    train: Mode
    evaluate: Mode
    required: tuple[str, ...] = ()
    defaults: dict[str, object] = field(default_factory=dict)
    names: frozenset[str] = frozenset()

    def __post_init__(self):
        # flat, for the quick path of a call
        object.__setattr__(self, "arity", len(self.required))
        object.__setattr__(self, "run_train", self.train.run)
        object.__setattr__(self, "run_evaluate", self.evaluate.run)
        for name, mode in (("train", self.train), ("evaluate", self.evaluate)):  # for program.cpp
            object.__setattr__(self, f"program_{name}", mode.program)
            object.__setattr__(self, f"condition_{name}", mode.condition)

    @property
    def serves(self) -> bool:
        return bool(self.train.sites or self.evaluate.sites)

    @property
    def rewritten(self) -> bool:
        return self.train.rewritten or self.evaluate.rewritten

    def mode(self, training: bool) -> Mode:
        return self.train if training else self.evaluate

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        return _no_plan, ()  # generated code is made anew where it is loaded


def _no_plan() -> None:
    """What a pickled plan becomes: the module's next forward makes another."""


def build(module: nn.Module, known: dict) -> Plan:
    """Plan ``module``'s forward; a mode that cannot be planned runs the author's forward."""
    modes, found = [], []
    for training in (True, False):
        try:
            mode = Mode(original_class(module).forward)
            for traced, matches in _analyse(module, training, known):
                mode = _mode(module, traced, matches, known, otherwise=mode.run)
                found.append(traced)
            modes.append(mode)
        except Refused as refusal:
            modes.append(Mode(original_class(module).forward, refusal=str(refusal)))
    if not found:
        return Plan(*modes)
    names = frozenset().union(*(traced.names for traced in found))
    return Plan(*modes, found[0].required, found[0].defaults, names)


def _analyse(module: nn.Module, training: bool, known: dict) -> list[tuple[Trace, match.Matches]]:
    """Trace and match, as often as there are types that the arguments may have."""
    found = traces(module, original_class(module).forward, training, is_plain_container)
    return [_analysed(module, traced, known) for traced in found]


def _analysed(module: nn.Module, traced: Trace, known: dict) -> tuple[Trace, match.Matches]:
    """The matches of a trace, made again to look into those containers only whose border a match
    crosses."""
    matches = match.find(traced, Effects(traced, known))
    crossed = set()
    for found in matches.found:
        within = {_container(node, traced) for node in found.nodes}
        if len(within) > 1:
            crossed.update(within)
    keep = {
        path
        for path in traced.inlined
        if any(f"{inner}.".startswith(f"{path}.") for inner in crossed)
    }
    if len(keep) < len(traced.inlined):
        kept = {traced.modules[path] for path in keep}
        forward, kind = original_class(module).forward, next(iter(traced.types.values()), None)
        traced = trace(module, forward, traced.training, kept.__contains__, kind)
        matches = match.find(traced, Effects(traced, known))
    return traced, matches


def _container(node: Node, traced: Trace) -> str:
    """Path of the inlined container that a node stands in, "" for the module's own forward."""
    parent = node.target.rpartition(".")[0] if node.op == "call_module" else ""
    return parent if parent in traced.inlined else ""


def _mode(
    module: nn.Module, traced: Trace, matches: match.Matches, known: dict, otherwise: Callable
) -> Mode:
    """What serves under what the trace holds under, and else ``otherwise``."""
    if not traced.required:
        raise Refused("forward has no required parameter")
    random = any(map(region.draws_random_numbers, traced.graph.nodes))
    on_strides, rewritten = region.for_any_strides(traced, Effects(traced, known))
    alone = {}
    for node, reason in matches.reasons.items():
        alone[node.target if node.op == "call_module" else node.name] = reason
    replaced: dict[Node, Node] = {}
    for found in matches.found:
        replace = _replace_head if isinstance(found, heads.Head) else _replace
        replace(traced, found, replaced)
    made = tuple(
        Site(m.kind, m.conv, m.bn, m.via, m.act if isinstance(m.act, str) else None, m.pool)
        for m in matches.found
    )
    program = program_of(traced, {_RELU: F.relu})
    for chain in matches.chains:  # the program's sites stay apart: a chain is no CPU's
        _join(traced.graph, [replaced[each.nodes[-1]] for each in chain])
    run, holds = _generate(module, traced, program, otherwise)
    return Mode(
        run, holds, made, alone, traced.inlined, on_strides=on_strides, rewritten=rewritten,
        random=random, program=None if traced.types else program,
        condition=holds if _conditions(traced) else None,
    )  # fmt: skip


def _replace(traced: Trace, found: match.Match, replaced: dict[Node, Node]) -> None:
    """Put one fused call in the place of a match's last node."""
    graph, last = traced.graph, found.nodes[-1]
    input = replaced.get(found.input, found.input)
    residual = replaced.get(found.residual, found.residual)
    with graph.inserting_before(last):

        def get(path: str | None) -> Node | None:
            return None if path is None else graph.create_node("get_attr", path)

        act = get(found.act) if isinstance(found.act, str) else found.act and _RELU
        rest = {"via": tuple(get(path) for path in found.via), "in_place": found.in_place}
        rest = {name: value for name, value in rest.items() if value}
        bn, added = get(found.bn), residual is not None
        if bn is None and found.conv is not None:
            call = graph.call_function(sites.convolve, (input, get(found.conv)))
        elif bn is None:
            call = graph.call_function(calls.add_act, (input, residual, act), rest)
        elif found.conv is None:
            target = calls.bn_add_act if added else sites.bn_act
            call = graph.call_function(target, (input, bn, act, residual), rest)
        elif found.pool is not None:
            arguments = (input, get(found.conv), bn, act, get(found.pool))
            call = graph.call_function(stems.conv_bn_act_pool, arguments, rest)
        else:
            target = calls.conv_bn_add_act if added else sites.conv_bn_act
            arguments = (input, get(found.conv), bn, act, residual)
            call = graph.call_function(target, arguments, rest)
    _put(graph, call, found, replaced)


def _join(graph, sites_calls: list[Node]) -> None:
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


def _replace_head(traced: Trace, head: heads.Head, replaced: dict[Node, Node]) -> None:
    graph, input = traced.graph, replaced.get(head.input, head.input)
    with graph.inserting_before(head.nodes[-1]):
        *pooling, fc = (graph.create_node("get_attr", path) for path in head.via)
        call = graph.call_function(head.call(), (input, Name("self"), tuple(pooling), fc))
    _put(graph, call, head, replaced)


def _put(graph, call: Node, found: match.Match | heads.Head, replaced: dict[Node, Node]) -> None:
    last = found.nodes[-1]
    replaced[last] = call
    last.replace_all_uses_with(call)
    for node in reversed(found.nodes):
        graph.erase_node(node)


def _with_modules_looked_up(body: str, traced: Trace) -> str:
    """``self._modules['conv1']`` in the place of ``self.conv1``: nn.Module has its sub-modules found
    by a function in Python, which for a bottleneck's nine took 6.4 us and this 0.2."""
    for node in traced.graph.nodes:
        if node.op == "get_attr" and node.target in traced.modules:
            slow, quick = (
                f"{node.name} = {attribute_path(node.target)}",
                f"{node.name} = {module_path(node.target)}",
            )
            body = re.sub(rf"^(\s+){re.escape(slow)}$", rf"\g<1>{quick}", body, flags=re.MULTILINE)
    return body


def _conditions(traced: Trace) -> list[str]:
    """What has to hold for a trace, as expressions; ``_expected`` are the guards' values."""
    conditions = [f"({each}) == _expected[{i}]" for i, each in enumerate(traced.guards)]
    return conditions + [f"_is_plain_container({attribute_path(p)})" for p in traced.inlined]


def _is_as_traced(argument, kind: type) -> bool:
    """Whether an argument is a tensor or a list of tensors, whichever; what stands for a tensor while
    somebody traces the model is none."""
    if kind is list and type(argument) is not list:
        return False
    tensors = argument if kind is list else (argument,)
    return all(type(tensor) is Tensor for tensor in tensors)


def _generate(
    module: nn.Module, traced: Trace, program, otherwise: Callable
) -> tuple[Callable, Callable]:
    """The graph as a function of ``self`` and the arguments, and the check it stands behind.

    Where the extension serves, its program takes the function's place.
    """
    code = traced.graph.python_code("self")
    namespace = {
        **code.globals, **traced.libraries, str(_RELU): F.relu, "_program": program,
        "_expected": (*traced.guards.values(),), "_is_plain_container": is_plain_container,
        "_extension_serves": extension_serves,
    }  # fmt: skip
    conditions = _conditions(traced)
    definition, body = code.src.lstrip().split("\n", 1)
    source = f"def holds(self):\n    return {' and '.join(conditions) or True}\n\n\n{definition}\n"
    arguments = definition[definition.index("(") : definition.index(")") + 1]
    conditions = [f"_is_as_traced({name}, _types[{name!r}])" for name in traced.types]
    conditions += ["holds(self)"] if _conditions(traced) else []
    if conditions:
        namespace |= {"_otherwise": otherwise, "_types": traced.types}
        namespace["_is_as_traced"] = _is_as_traced
        source += (
            f"    if not ({' and '.join(conditions)}):\n        return _otherwise{arguments}\n"
        )
    if program is not None:
        source += f'    if _extension_serves("conv_bn_relu"):\n        return _program{arguments}\n'
    file = f"<fastres {original_class(module).__name__} {next(_count)}>"
    source += _with_modules_looked_up(body, traced)
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), namespace)  # noqa: S102
    weakref.finalize(namespace["forward"], linecache.cache.pop, file, None)
    return namespace["forward"], namespace["holds"]
