"""The models by name: ``list_models()`` and ``create(name, **options)``."""

import difflib
import inspect
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from typing import NamedTuple

from torch import nn

from .stochastic_depth import set_stochastic_depth

Builder = Callable[..., nn.Module]


class _Model(NamedTuple):
    build: Builder
    options: tuple[str, ...]


_models: dict[str, _Model] = {}
_by_depth: dict[str, Builder] = {}


def register(name: str, build: Builder, *takers: Callable, fixed: Iterable[str] = ()) -> None:
    """Make ``build(**options)`` known as ``name``. Options are the named arguments of ``build`` and
    of ``takers`` (what it passes ``**options`` to), but for those in ``fixed``."""
    names = dict.fromkeys(
        parameter.name
        for taker in (build, *takers)
        for parameter in inspect.signature(taker).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    )
    _models[name] = _Model(build, tuple(n for n in names if n not in fixed))


def register_depths(family: str, build: Builder, depths: Iterable[int], *takers, fixed=()) -> None:
    """``family`` and a depth is a name: those of ``depths`` are listed, others are understood."""
    _by_depth[family] = build
    for depth in depths:
        register(f"{family}{depth}", _at_depth(build, depth), *takers, build, fixed=fixed)


def _at_depth(build: Builder, depth: int) -> Builder:
    def at_depth(**options) -> nn.Module:
        return build(depth, **options)

    return at_depth


def list_models(pattern: str = "*") -> list[str]:
    """The names that :func:`create` knows, sorted; ``pattern`` as a shell's (``"cifar_*"``).

    Depth is a part of the name: ``cifar_resnet26`` can be created too.
    """
    return sorted((n for n in _models if fnmatch(n, pattern)), key=_with_numbers)


def _with_numbers(name: str) -> list:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def create(name: str, *, stochastic_depth: float | None = None, **options) -> nn.Module:
    """The model called ``name``, with random weights.

    Args:
        name: one of :func:`list_models`, or a family and a depth that fits it.
        stochastic_depth: probability that the last residual block survives, p_L; blocks before it
            decay linearly towards it. See :func:`fastres.models.set_stochastic_depth`.
        options: those of the model's own function or class, such as ``num_classes``.

    Raises ``ValueError`` for an unknown name (with the nearest) or a depth that does not fit, and
    ``TypeError`` for an option that the model does not take.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a string, got {type(name).__name__}")
    model = _models.get(name) or _at_any_depth(name)
    for option in options:
        if option not in model.options:
            near = _nearest(option, model.options)
            raise TypeError(
                f"{name} takes no option {option!r}{near}; it takes "
                f"{', '.join((*model.options, 'stochastic_depth'))}"
            )
    built = model.build(**options)
    return built if stochastic_depth is None else set_stochastic_depth(built, stochastic_depth)


def _at_any_depth(name: str) -> _Model:
    family, depth = re.fullmatch(r"(.*?)(\d*)", name).groups()
    if depth and family in _by_depth:
        listed = next(n for n in _models if re.fullmatch(rf"{re.escape(family)}\d+", n))
        return _Model(_at_depth(_by_depth[family], int(depth)), _models[listed].options)
    raise ValueError(f"no model is called {name!r}{_nearest(name, _models)}")


def _nearest(name: str, names: Iterable[str]) -> str:
    names = sorted(names, key=_with_numbers)
    near = [n for n in names if n.startswith(name)][:3]
    near = near or difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else ""
