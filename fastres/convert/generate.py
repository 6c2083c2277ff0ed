"""A traced and rewritten graph as a Python function, behind a check of what the trace holds under."""

import itertools
import linecache
import re
import weakref
from collections.abc import Callable

from torch import Tensor, nn

from ..backend import extension_serves
from .purity import attribute_path, module_path
from .rewrite import NAMES
from .swap import is_plain_container, original_class
from .trace import Trace

_count = itertools.count()


def generated(
    module: nn.Module, traced: Trace, program, otherwise: Callable
) -> tuple[Callable, Callable]:
    """The graph as a function of ``self`` and the arguments, and the check it stands behind.

    Where the extension serves, its program takes the function's place.
    """
    code = traced.graph.python_code("self")
    namespace = {
        **code.globals, **traced.libraries, **NAMES, "_program": program,
        "_expected": (*traced.guards.values(),), "_is_plain_container": is_plain_container,
        "_extension_serves": extension_serves,
    }  # fmt: skip
    conditions = conditions_of(traced)
    definition, body = code.src.lstrip().split("\n", 1)
    source = f"def holds(self):\n    return {' and '.join(conditions) or True}\n\n\n{definition}\n"
    arguments = definition[definition.index("(") : definition.index(")") + 1]
    conditions = [f"_is_as_traced({name}, _types[{name!r}])" for name in traced.types]
    conditions += ["holds(self)"] if conditions_of(traced) else []
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


def conditions_of(traced: Trace) -> list[str]:
    """What has to hold for a trace, as expressions; ``_expected`` are the guards' values."""
    conditions = [
        # a compiler of PyTorch 2.11 compares classes by the __eq__ of their instances
        f"({each}) {'is' if isinstance(value, type) else '=='} _expected[{i}]"
        for i, (each, value) in enumerate(traced.guards.items())
    ]
    return conditions + [f"_is_plain_container({attribute_path(p)})" for p in traced.inlined]


def _is_as_traced(argument, kind: type) -> bool:
    """Whether an argument is a tensor or a list of tensors, whichever; what stands for a tensor while
    somebody traces the model is none."""
    if kind is list and type(argument) is not list:
        return False
    tensors = argument if kind is list else (argument,)
    return all(type(tensor) is Tensor for tensor in tensors)


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
