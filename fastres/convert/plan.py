"""What a converted module runs instead of its author's forward: one generated function per mode."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn
from torch.fx import Node

from . import match, region, rewrite
from .effects import Effects
from .generate import conditions_of, generated
from .program import program_of
from .purity import Refused
from .swap import is_plain_container, original_class
from .trace import Trace, trace, traces


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
    replaced = rewrite.fuse(traced, matches.found)
    made = tuple(
        Site(m.kind, m.conv, m.bn, m.via, m.act if isinstance(m.act, str) else None, m.pool)
        for m in matches.found
    )
    program = program_of(traced, rewrite.NAMES)
    for chain in matches.chains:  # the program's sites stay apart: a chain is no CPU's
        rewrite.join(traced.graph, [replaced[each.nodes[-1]] for each in chain])
    run, holds = generated(module, traced, program, otherwise)
    return Mode(
        run, holds, made, alone, traced.inlined, on_strides=on_strides, rewritten=rewritten,
        random=random, program=None if traced.types else program,
        condition=holds if conditions_of(traced) else None,
    )  # fmt: skip
