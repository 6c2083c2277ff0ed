"""Which parts of a model cannot tell in which memory format their values are."""

import dis
import types

import torch
from torch import nn
from torch.fx import Node

from .effects import Effects
from .layout import ALWAYS, IN_EVAL
from .purity import Refused
from .swap import is_plain_container, original_class
from .trace import Trace, traces

# same numbers, but for any strides
_FOR_ANY_STRIDES = {"view": "reshape", "view_as": "reshape_as"}
_ON_STRIDES = frozenset({
    "as_strided", "as_strided_", "stride", "is_contiguous", "data_ptr", "storage",
    "untyped_storage", "storage_offset", "set_", "resize_", "resize_as_", "to_mkldnn",
})  # fmt: skip
_RANDOM = frozenset({
    "dropout", "alpha_dropout", "feature_alpha_dropout", "rand", "rand_like", "randn", "randn_like",
    "bernoulli", "bernoulli_", "uniform_", "normal_", "random_", "rrelu", "multinomial", "randperm",
    "randint",
})  # fmt: skip
_RANDOM_MODULES = (nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU)


def for_any_strides(traced: Trace, effects: Effects) -> tuple[str, bool]:
    """Make a traced forward independent of its values' strides: ``view`` becomes ``reshape``.

    Returns why that cannot be done (or ""), and whether there was anything to do.
    """
    reason, views = "", []
    for node in traced.graph.nodes:
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        if name in _ON_STRIDES:
            reason = f"{name} depends on strides"
        elif node.op == "call_method" and name in _FOR_ANY_STRIDES:
            views.append(node)
    changed = frozenset().union(*(effects.changed(node) for node in traced.graph.nodes))
    for node in views:
        if not changed.isdisjoint(effects.roots[node]):
            reason = "a view is changed in place"  # a copy would not share the change
        elif any(isinstance(argument, torch.dtype) for argument in node.args):
            reason = "view as another dtype depends on strides"
        else:
            node.target = _FOR_ANY_STRIDES[node.target]
    return reason, bool(views)


def draws_random_numbers(node: Node) -> bool:
    """Random numbers are drawn in memory order, so the format decides which value gets which."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return name in _RANDOM and not (name == "dropout" and node.kwargs.get("p") == 0)


def entries(model: nn.Module, plans: dict, known: dict) -> dict[nn.Module, str]:
    """The topmost modules that may switch to channels_last: module -> ALWAYS or IN_EVAL.

    Everything inside an entry must be independent of strides, and the entry must neither change nor
    return its arguments' memory. Where random numbers are drawn, training keeps the caller's
    format, so that a seed means the same as in eager.
    """
    found: dict[nn.Module, str] = {}

    def visit(module: nn.Module) -> None:
        if _convolutions_served(module, plans) < 2 or module in found:
            return
        if module in plans and _may_enter(module, plans, known):
            random = any(_is_random(m, plans) for m in module.modules())
            found[module] = IN_EVAL if random else ALWAYS
            return
        for child in module.children():
            visit(child)

    visit(model)
    return found


def _convolutions_served(module: nn.Module, plans: dict) -> int:
    sites = (site for m in module.modules() if m in plans for site in plans[m].evaluate.sites)
    return sum(site.conv is not None for site in sites)


def _may_enter(module: nn.Module, plans: dict, known: dict) -> bool:
    plan = plans[module]
    if not plan.required or plan.train.refusal or plan.evaluate.refusal:
        return False
    if not all(_is_free_of_strides(m, plans) for m in module.modules()):
        return False
    for training in (True, False):
        try:
            forward = original_class(module).forward
            found = traces(module, forward, training, is_plain_container)
        except Refused:
            return False
        if any(any(Effects(traced, known).on_arguments()) for traced in found):
            return False
    return True


def _is_free_of_strides(module: nn.Module, plans: dict) -> bool:
    plan = plans.get(module)
    if plan is not None and not (plan.train.refusal or plan.evaluate.refusal):
        return not (plan.train.on_strides or plan.evaluate.on_strides)
    if isinstance(module, torch.jit.ScriptModule):  # nobody can read its code
        return False
    cls = original_class(module)
    if cls.__module__.startswith(("torch.nn.", "fastres.")) and "forward" not in module.__dict__:
        return True
    return not _names_in(module) & (_ON_STRIDES | _FOR_ANY_STRIDES.keys() | {"setattr"})


def _is_random(module: nn.Module, plans: dict) -> bool:
    if isinstance(module, _RANDOM_MODULES):
        return getattr(module, "p", 1) > 0
    plan = plans.get(module)
    if plan is not None and not plan.train.refusal:
        return plan.train.random
    if original_class(module).__module__.startswith(("torch.nn.", "fastres.")):
        return False
    return bool(_names_in(module) & _RANDOM)


def _names_in(module: nn.Module) -> set[str]:
    """All names in the code that a module's forward can reach, plus "setattr" if it stores any."""
    cls, names, seen = original_class(module), set(), set()
    pending = [module.__dict__.get("forward", cls.forward)]
    while pending:
        function = pending.pop()
        if isinstance(function, type):
            pending += [f for f in vars(function).values() if isinstance(f, types.FunctionType)]
            continue
        function = getattr(function, "__func__", function)
        function = getattr(function, "__wrapped__", function)
        code = getattr(function, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        for inner in _with_inner(code):
            names.update(inner.co_names)
            if any(i.opname == "STORE_ATTR" for i in dis.get_instructions(inner)):
                names.add("setattr")
            for name in inner.co_names:
                found = getattr(cls, name, None) or function.__globals__.get(name)
                library = (getattr(found, "__module__", None) or "").partition(".")[0]
                if library != "torch" and isinstance(found, (types.FunctionType, type)):
                    pending.append(found)
    return names


def _with_inner(code: types.CodeType):
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_inner(constant)
