"""What a forward does besides computing on its arguments.

A trace burns every Python-level decision in, so it may stand for a forward only if those decisions
cannot come out differently, unnoticed, at the next call. While a module is traced, a :class:`Watch`
follows the author's code (everything that is neither PyTorch nor fastres). It raises
:class:`Refused`, before it happens, at anything that has an effect besides the result or depends on
more than can be guarded; what can be guarded it notes as an expression to check at every call.
"""

import argparse
import builtins
import dataclasses
import dis
import enum
import functools
import gc
import keyword
import os
import pathlib
import random
import sys
import sysconfig
import threading
import types
from collections import OrderedDict

import torch
from torch import Tensor, nn

_TORCH = os.path.dirname(torch.__file__) + os.sep
_STDLIB = sysconfig.get_path("stdlib") + os.sep
_FASTRES = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep

_EFFECTS = {
    "STORE_ATTR": "sets the attribute {}",
    "DELETE_ATTR": "deletes the attribute {}",
    "STORE_GLOBAL": "sets the global {}",
    "DELETE_GLOBAL": "deletes the global {}",
    "IMPORT_NAME": "imports {}",
    # a handler could take another path when tracing fails; a context (no_grad) leaves no trace
    "PUSH_EXC_INFO": "has a 'try' or 'with' block",
    "SETUP_FINALLY": "has a 'try' or 'with' block",
    "SETUP_WITH": "has a 'try' or 'with' block",
}
_BUILTINS = frozenset({
    "abs", "all", "any", "bool", "dict", "divmod", "enumerate", "filter", "float", "frozenset",
    "getattr", "hasattr", "int", "isinstance", "issubclass", "iter", "len", "list", "map", "max",
    "min", "next", "pow", "range", "reversed", "round", "set", "slice", "sorted", "str", "sum",
    "super", "tuple", "zip",
})  # fmt: skip
_LIBRARIES = frozenset({
    "torch", "math", "operator", "_operator", "itertools", "collections", "_collections", "typing",
    "enum", "builtins",
})  # fmt: skip
# the Python files of PyTorch that a traced forward may call into
_TRACEABLE = frozenset({
    "nn/functional.py", "nn/modules/container.py", "functional.py", "_jit_internal.py",
    "overrides.py", "fx/proxy.py", "fx/_symbolic_trace.py", "utils/_device.py",
})  # fmt: skip
_LISTING = frozenset({
    "children", "named_children", "modules", "named_modules",
})  # fmt: skip
_CONSTANT = (
    bool, int, float, complex, str, bytes, type(None), type(Ellipsis), enum.Enum,
    torch.dtype, torch.device, torch.memory_format, torch.layout, pathlib.PurePath,
)  # fmt: skip


class Refused(BaseException):
    """This forward may not be replaced; the message says why.

    Not an ``Exception``, so that the code being traced cannot swallow it.
    """


def attribute_path(path: str) -> str:
    """``self`` and the dotted ``path`` as an expression: ``self.left._modules['0']``."""
    expression = "self"
    for name in filter(None, path.split(".")):
        plain = name.isidentifier() and not keyword.iskeyword(name)
        expression += f".{name}" if plain else f"._modules[{name!r}]"
    return expression


def module_path(path: str) -> str:
    """``self`` and the dotted ``path`` of a registered module as an expression."""
    return "self" + "".join(f"._modules[{name!r}]" for name in path.split("."))


def is_authors(code: types.CodeType) -> bool:
    """Whether code is neither PyTorch's nor fastres's nor Python's own."""
    file = code.co_filename
    if file.startswith((_TORCH, _FASTRES, "<frozen")):
        return False
    return not file.startswith(_STDLIB) or "site-packages" in file or "dist-packages" in file


class Watch:
    """Follows one trace of ``root``, as if it and all inside in the same mode were ``training``;
    ``path_of`` gives a module's path.

    Attributes, filled while it is entered: ``names`` (attributes of root that the forward asked
    for), ``guards`` (expression -> value it must keep), ``libraries`` (modules by the names that
    guards use), ``containers`` (modules whose children were listed).
    """

    def __init__(self, root: nn.Module, training: bool, path_of):
        self._root, self._training, self._path_of = root, training, path_of
        self.names: set[str] = set()
        self.guards: dict[str, object] = {}
        self.libraries: dict[str, types.ModuleType] = {}
        self.containers: list[nn.Module] = []
        self.looked_up: set[tuple[nn.Module, str]] = set()  # (parent, name of attribute)
        self.asking = False  # inside hasattr
        self.parsing = False  # inside a function of PyTorch, which looks at its arguments' types
        self._inside: str = ""  # the function written in C that the author's code is in
        self._seen: set[types.CodeType] = set()
        self._inner: set[types.CodeType] = set()
        self._lent: list[tuple[object, object]] = []

    def __enter__(self):
        plain, thread = nn.Module.__getattribute__, threading.get_ident()

        def getattribute(module, name):
            if threading.get_ident() == thread and is_authors(sys._getframe(1).f_code):
                return self._read(module, name, plain)
            return plain(module, name)

        nn.Module.__getattribute__ = getattribute
        self._collecting = gc.isenabled()
        gc.disable()  # its callbacks and finalisers are not the forward's
        self._profile = sys.getprofile()
        sys.setprofile(self._event)
        return self

    def __exit__(self, *exception):
        followed = sys.getprofile() == self._event
        if hasattr(self._profile, "enable"):  # a cProfile.Profile is no function
            sys.setprofile(None)
            self._profile.enable()
        else:
            sys.setprofile(self._profile)
        del nn.Module.__getattribute__  # object's again
        if self._collecting:
            gc.enable()
        if not followed and exception == (None,) * 3:
            # Python stops calling a profile function that raised: in a finaliser, unnoticed
            raise Refused("forward could not be followed to its end")
        if any(lent != kept for lent, kept in self._lent) and exception == (None,) * 3:
            raise Refused("forward changes a list or dict of the module")

    # --- attributes of modules -------------------------------------------------------------------

    def _read(self, module: nn.Module, name: str, plain):
        """The author's code asks ``module`` for ``name``: guard what could change unnoticed.

        Lists and dicts are lent as copies, so that a trace leaves them alone.
        """
        self.looked_up.add((module, name))
        if module is self._root:
            self.names.add(name)
        if name in ("__class__", "__dict__"):
            raise Refused(f"forward looks at {name} of a module")
        value = plain(module, name)
        if name == "training" and value == self._root.training:
            value = self._training
        if isinstance(value, (nn.Module, types.MethodType)) or _is_code(value):
            return value
        if module is self._root and _is_constant(value):
            return value  # a converted module notices when it is set
        if isinstance(value, Tensor):
            raise Refused(f"forward uses {name}, a tensor that is no parameter or buffer")
        path = f"{attribute_path(self._path_of(module))}.{name}"
        return self._lend(value, path, f"forward uses {name}")

    def _lend(self, value, path: str, what: str):
        """A copy of ``value``, which must stay as it is at ``path``."""
        if not _is_record(value):
            kept, lent = _copy(value, what), _copy(value, what)
            self.guards[path] = kept
            self._lent.append((lent, kept))
            return lent
        cls = type(value)
        self.guards |= {f"type({path})": cls, f"(*vars({path}),)": (*vars(value),)}
        lent = cls.__new__(cls)
        for name, item in vars(value).items():
            lent.__dict__[name] = self._lend(item, f"{path}.{name}", what)
        return lent

    # --- code that runs --------------------------------------------------------------------------

    def _event(self, frame, event: str, argument) -> None:
        if event == "call":
            if is_authors(frame.f_code):
                self._check_code(frame)
            elif frame.f_back is not None and is_authors(frame.f_back.f_code):
                self._check_library(frame)
        elif event == "c_call" and is_authors(frame.f_code):
            _check_builtin(argument)
            self.asking, self._inside = argument is hasattr, argument.__name__
            self.parsing = _is_recorded(argument)
        elif event in ("c_return", "c_exception") and is_authors(frame.f_code):
            self.asking, self.parsing, self._inside = False, False, ""

    def _check_code(self, frame) -> None:
        code = frame.f_code
        if code not in self._inner:
            for name in code.co_freevars:
                value = frame.f_locals.get(name)
                if not (_is_constant(value) or _is_code(value) or isinstance(value, nn.Module)):
                    raise Refused(f"forward uses the outer variable {name}, which may change")
        if code in self._seen:
            return
        self._seen.add(code)
        self._inner.update(c for c in code.co_consts if isinstance(c, types.CodeType))
        if reason := _effect(code):
            raise Refused(f"forward {reason}")
        for name, attributes in _globals_of(code):
            self._check_global(frame.f_globals, name, attributes)

    def _check_global(self, namespace: dict, name: str, attributes: tuple[str, ...]) -> None:
        """``name.attribute...`` in the author's code: code is fine, a constant is guarded."""
        if name not in namespace:
            value = getattr(builtins, name, None)
            is_error = isinstance(value, type) and issubclass(value, BaseException)
            if name not in _BUILTINS and not is_error:
                raise Refused(f"forward uses {name}")
            return
        value, path, owner = namespace[name], name, sys.modules.get(namespace.get("__name__"))
        for attribute in attributes:
            if isinstance(value, types.ModuleType):
                if value.__name__.partition(".")[0] in ("numpy", "random"):  # draw unnoticed
                    raise Refused(f"forward uses the module {value.__name__}")
                owner, path = value, ""
            elif not isinstance(value, type):
                break
            value = getattr(value, attribute, None)
            path = f"{path}.{attribute}" if path else attribute
        if _is_code(value) or isinstance(value, (types.ModuleType, types.MethodType)):
            return
        if not _is_constant(value) or owner is None:
            raise Refused(f"forward uses the global {path}, which may change")
        library = owner.__name__.partition(".")[0]
        if library == "torch" and isinstance(value, (bool, int, str)):
            raise Refused(f"forward depends on {owner.__name__}.{path}")
        if library not in _LIBRARIES:
            alias = "_module_" + owner.__name__.replace(".", "_")
            self.libraries[alias] = owner
            self.guards[f"{alias}.{path}"] = value

    def _check_library(self, frame) -> None:
        """The author's code calls a Python function of PyTorch or of the standard library."""
        code, library = frame.f_code, frame.f_globals.get("__name__", "").partition(".")[0]
        if not code.co_filename.startswith(_TORCH):
            if library not in _LIBRARIES | {"fastres"}:
                raise Refused(f"forward calls {library}.{code.co_name}")
            return
        file = code.co_filename.removeprefix(_TORCH)
        if file == "nn/modules/container.py" or (
            file == "nn/modules/module.py" and code.co_name in _LISTING
        ):
            self.containers.append(frame.f_locals["self"])
        elif file not in _TRACEABLE and (file, code.co_name) != ("__init__.py", "_assert"):
            if self._inside:  # a computation that went on to the dispatcher
                raise Refused(f"forward computes torch.{self._inside} on what is not traced")
            name = file.removesuffix(".py").removesuffix("__init__").strip("/").replace("/", ".")
            raise Refused(f"forward calls {'.'.join(filter(None, ('torch', name, code.co_name)))}")


def _check_builtin(function) -> None:
    """The author's code calls a function written in C."""
    name, owner = getattr(function, "__name__", "?"), getattr(function, "__self__", None)
    if owner is builtins:
        if name not in _BUILTINS:
            raise Refused(f"forward calls {name}")
    elif owner is None or isinstance(owner, types.ModuleType):
        library = (getattr(function, "__module__", None) or "builtins").partition(".")[0]
        if library not in _LIBRARIES or (library == "torch" and not _is_recorded(function)):
            raise Refused(f"forward calls {library}.{name}")
    elif isinstance(owner, type):
        if owner.__module__.partition(".")[0] not in _LIBRARIES:
            raise Refused(f"forward calls {owner.__module__}.{owner.__name__}.{name}")
    elif isinstance(owner, random.Random) or type(owner).__module__.startswith("numpy"):
        raise Refused(f"forward calls {type(owner).__module__}.{name}")


def _is_recorded(function) -> bool:
    """Whether a tracer sees this function of PyTorch being called."""
    return getattr(torch._C._VariableFunctions, function.__name__, None) is function or (
        function in _overridable()
    )


@functools.cache
def _overridable() -> frozenset:
    return frozenset(torch.overrides.get_testing_overrides())


@functools.lru_cache(maxsize=1024)
def _effect(code: types.CodeType) -> str:
    """What running ``code`` may do besides computing, "" if nothing."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in _EFFECTS:
            return _EFFECTS[instruction.opname].format(instruction.argval)
        if instruction.opname == "STORE_DEREF" and instruction.argval in code.co_freevars:
            return f"sets the outer variable {instruction.argval}"
    return ""


@functools.lru_cache(maxsize=1024)
def _globals_of(code: types.CodeType) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The globals that ``code`` names, each with the attributes it follows from there."""
    found, instructions = {}, [i for i in dis.get_instructions(code) if i.opname != "CACHE"]
    for index, instruction in enumerate(instructions):
        if instruction.opname == "LOAD_GLOBAL":
            attributes = []
            for following in instructions[index + 1 :]:
                if following.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                    break
                attributes.append(following.argval)
            found[instruction.argval, tuple(attributes)] = None
    return tuple(found)


def _is_code(value) -> bool:
    """Functions and classes: their own code is checked when it runs."""
    if isinstance(value, type):
        return value is not type
    if isinstance(value, types.BuiltinFunctionType):
        return not isinstance(value.__self__, random.Random)
    return isinstance(value, (types.FunctionType, torch._ops._OpNamespace, torch._ops._Ops))


def _is_constant(value) -> bool:
    """Whether ``value`` can never change: numbers, strings, dtypes and tuples of such."""
    if type(value) in (tuple, torch.Size):
        return all(map(_is_constant, value))
    return isinstance(value, _CONSTANT)


def _copy(value, what: str):
    """A copy of nested plain containers; constants, code and modules inside stay what they are."""
    if _is_constant(value) or _is_code(value) or isinstance(value, nn.Module):
        return value
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(_copy(item, what) for item in value)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _copy(item, what)) for key, item in value.items())
    raise Refused(f"{what}, a {type(value).__name__} that may change")


# A compiler reads the guards, too, and that of PyTorch 2.11 cannot list an object's attributes.
GUARDS_RECORDS = torch.__version__ >= "2.13"


def _is_record(value) -> bool:
    """Whether ``value`` is its attributes and nothing else: a namespace, or a plain dataclass."""
    if not GUARDS_RECORDS:
        return False
    cls, held = type(value), getattr(value, "__dict__", None)
    if held is None or not all(
        name.isidentifier() and not keyword.iskeyword(name) for name in held
    ):
        return False
    if cls in (argparse.Namespace, types.SimpleNamespace):
        return True
    if not dataclasses.is_dataclass(cls):
        return False
    shared = {k: v for base in cls.__mro__[:-1] for k, v in vars(base).items() if k not in held}
    if shared.keys() & {"__getattr__", "__getattribute__"}:
        return False
    return all(
        isinstance(item, (types.FunctionType, property, staticmethod, classmethod))
        for name, item in shared.items()
        if not (name.startswith("__") and name.endswith("__"))
    )
