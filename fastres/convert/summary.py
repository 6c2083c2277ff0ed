"""Every convolution, batch norm and ReLU of a model: what serves it, or why it is left alone."""

from dataclasses import dataclass

import torch
from torch import nn

from .. import fusable, heads, stems
from ..backend import serving
from ..choice import Convolution
from .plan import Mode, Plan, Site, build
from .swap import is_candidate, is_converted, original_class, refresh

NOT_CONVERTED = "not converted"
_KINDS = (
    ("conv", nn.modules.conv._ConvNd),
    ("bn", nn.modules.batchnorm._NormBase),
    ("relu", nn.ReLU),
)


@dataclass(frozen=True)
class Row:
    """One site.

    Attributes: ``path`` of the module whose forward holds it ("" for the model itself); ``kind``,
    such as "conv_bn_add_relu" or "mean_linear" or, for a module on its own, "conv", "bn" or "relu";
    the paths of the ``modules`` that take part; ``served_by``, a backend's name; ``reason`` why it
    is left alone, "" where it is fused.
    """

    path: str
    kind: str
    modules: tuple[str, ...]
    served_by: str
    reason: str = ""

    @property
    def fused(self) -> bool:
        return not self.reason


class Summary(list):
    """A list of :class:`Row` that prints as a table."""

    @property
    def fused(self) -> list[Row]:
        return [row for row in self if row.fused]

    @property
    def left_alone(self) -> list[Row]:
        return [row for row in self if not row.fused]

    def __str__(self) -> str:
        table = [("module", "site", "served by", "of", "left alone because")]
        table += [
            (row.path or "(model)", row.kind, row.served_by, _of(row), row.reason) for row in self
        ]
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        return "\n".join([*lines, f"{len(self.fused)} fused, {len(self.left_alone)} left alone"])


def _of(row: Row) -> str:
    prefix = f"{row.path}." if row.path else ""
    return " ".join(path.removeprefix(prefix) for path in row.modules)


def summary(model: nn.Module) -> Summary:
    """What serves each convolution, batch norm and ReLU of ``model`` in its present mode.

    A list of rows with ``path``, ``kind``, ``modules``, ``served_by`` and ``reason``; printed, a
    table. Reasons are looked up now: a hook registered since the conversion is seen. A model that
    is not converted can be summarised too: what would be fused is then "not converted".

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return _Summariser(model).run()


class _Summariser:
    def __init__(self, model: nn.Module):
        self.model = model
        self.paths = {module: path for path, module in model.named_modules()}
        self.rows = Summary()
        self.listed: set[nn.Module] = set()  # leaves that some row has
        self.skipped: set[nn.Module] = set()  # containers whose forward an outer site runs
        self.refusals: dict[nn.Module, str] = {}
        self.known: dict = {}

    def run(self) -> Summary:
        for module, path in self.paths.items():
            if module in self.skipped:
                continue
            if original_class(module).__module__.startswith("fastres."):
                self.add_ready_made(module, path)
            elif is_converted(module) or is_candidate(module):
                self.add_planned(module, path)
        for module, path in self.paths.items():
            kind = _kind(module)
            if kind and module not in self.listed:
                self.add(path.rpartition(".")[0], kind, [module], self.why_unseen(path))
        return self.rows

    def add(self, path: str, kind: str, modules: list[nn.Module], reason: str) -> None:
        modules = [*modules, *(m.act for m in modules if fusable.is_bn(m) and fusable.has_relu(m))]
        self.listed.update(modules)
        served_by = "eager" if reason else self.served_by(kind, modules)
        paths = tuple(self.paths[module] for module in modules)
        self.rows.append(Row(path, kind, paths, served_by, reason))

    def served_by(self, kind: str, modules: list[nn.Module]) -> str:
        tensors = [t for m in modules for t in (*m.parameters(False), *m.buffers(False))]
        tensors += list(self.model.parameters())[:1]
        device = tensors[0].device if tensors else torch.device("cpu")
        folded = kind.startswith("conv") and not modules[0].training
        operator = "conv_bn_relu" if folded else "bn_relu" if "bn" in kind else "add_relu"
        if kind == "conv":  # see sites.convolve
            return serving("conv_bn_relu", device) if device.type == "cpu" else "eager"
        if kind in (heads.KIND, stems.KIND):
            operator = kind
        elif device.type == "cuda" and isinstance(conv := modules[0], nn.Conv2d):
            operands = (conv.weight, conv.weight, conv.stride, conv.dilation, conv.groups)
            return serving("conv_bn_relu", device, lambda: Convolution.of(*operands, conv.training))
        return serving(operator, device)

    # --- owners of sites -------------------------------------------------------------------------

    def add_ready_made(self, module: nn.Module, path: str) -> None:
        """A module of fastres itself: it calls the fused operators without being converted."""
        leaves = [leaf for leaf in module.children() if _kind(leaf)]
        if leaves:
            reasons = filter(None, (_why_not(leaf) for leaf in leaves))
            self.add(path, type(module).__name__, leaves, next(reasons, ""))

    def add_planned(self, module: nn.Module, path: str) -> None:
        plan: Plan = getattr(module, "_fastres_plan", None)
        if plan is None:
            plan = refresh(module) if is_converted(module) else build(module, self.known)
        mode = plan.mode(module.training)
        if mode.refusal or not mode.holds(module):
            self.refusals[module] = mode.refusal or "changed since the conversion"
            return
        reason = "" if is_converted(module) else NOT_CONVERTED
        self.skipped.update(module.get_submodule(inner) for inner in mode.inlined)
        for site in mode.sites:
            self.add_site(module, path, site, reason)
        self.add_alone(module, path, mode)

    def add_site(self, module: nn.Module, path: str, site: Site, reason: str) -> None:
        """A site, as the calls of :mod:`fastres.sites` would find it now."""
        kind, modules = site.kind, [module.get_submodule(inner) for inner in site.modules]
        if site.pool is not None:
            *unpooled, pool = modules
            if stems.why_not_pool(pool) or any(map(_why_not, unpooled)):
                kind, modules = kind.removesuffix("_pool"), unpooled
            else:
                self.add(path, kind, modules, reason)
                return
        if site.conv and (conv_reason := fusable.why_not_conv(modules[0])) and not reason:
            self.add(path, "conv", modules[:1], conv_reason)
            kind, modules = kind.removeprefix("conv_"), modules[1:]
            if not modules:
                return
        rest = [m for m in modules if not (site.conv and m is modules[0] and "conv" in kind)]
        if kind == "conv_bn":
            rest = [m for m in rest if not fusable.acts_apart(m)]
        why_not = heads.why_not if kind == heads.KIND else _why_not
        reasons = filter(None, map(why_not, rest))
        self.add(path, kind, modules, reason or next(reasons, ""))

    def add_alone(self, module: nn.Module, path: str, mode: Mode) -> None:
        for name, reason in mode.alone.items():
            try:
                leaf = module.get_submodule(name)
            except AttributeError:  # a function has a name, but no module
                kind = {"conv2d": "conv", "batch": "bn"}.get(name.partition("_")[0], "relu")
                self.rows.append(Row(path, kind, (), "eager", reason))
                continue
            self.add(path, _kind(leaf), [leaf], reason)

    # --- the rest --------------------------------------------------------------------------------

    def why_unseen(self, path: str) -> str:
        """Why no forward that was looked at calls the leaf at ``path``."""
        modules = {path: module for module, path in self.paths.items()}
        if isinstance(modules[path], torch.jit.ScriptModule):
            return "inside a ScriptModule"
        while path:
            path = path.rpartition(".")[0]
            owner = modules[path]
            if owner in self.refusals:
                return self.refusals[owner]
            if "forward" in owner.__dict__:
                return f"patched forward of a {type(owner).__name__}"
        return "not called in the forwards that were looked at"


def _kind(module: nn.Module) -> str:
    if fusable.is_bn(module):
        return "bn"
    cls = type(module)
    if isinstance(module, torch.jit.ScriptModule):  # the class that it was made of, by name
        cls = getattr(nn, getattr(module, "original_name", ""), cls)
    return next((kind for kind, known in _KINDS if issubclass(cls, known)), "")


def _why_not(module: nn.Module) -> str:
    if isinstance(module, nn.Conv2d):
        return fusable.why_not_conv(module)
    if isinstance(module, nn.Identity):
        return fusable.why_not_via(module)
    if _kind(module) == "bn":
        return fusable.why_not_bn(module)
    return fusable.why_not_act(module)
