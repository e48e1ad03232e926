"""convert(model) makes this package's kernels compute a model, in place; revert(model) undoes it.

Modules change their class and nothing else: parameters, buffers, hooks and names stay the same objects. A
batch, group or instance norm becomes ours with act="identity". A block whose forward also calls an activation after it
gets a forward that computes both in one kernel (guard.py). All forwards are read before any module is
changed. After an exception the model is as it was.
"""

import sys
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from gradkernels.acts import act_of_module, check_act
from gradkernels.conversion import rewrite, trace
from gradkernels.conversion.attributes import ORIGINAL, base_class, held, restore
from gradkernels.conversion.block import converted_class, why_not_derived
from gradkernels.conversion.check import Observation, largest_difference
from gradkernels.conversion.guard import FORWARD, RewrittenForward
from gradkernels.conversion.patterns import (
    ACTIVATION_MODULES,
    IS_RETURNED,
    NORMS,
    is_activation,
    is_norm,
    keeps_output,
    may_be_rewritten,
    ours_for,
    why_kept,
)
from gradkernels.conversion.purity import attributes_looked_for, classes_asked, own_classes
from gradkernels.conversion.report import ConversionReport, Row
from gradkernels.conversion.result import IS_IN_PLACE, KEEPS_ITS_OUTPUT, NOTHING_TO_FUSE, Place, Reason, Site
from gradkernels.layers import check_model

_REMEDY_OF_FORWARDS = 'change it as the guide says under "What it leaves alone"'
_QUANTISED = ("torch.ao.", "torch.nn.quantized", "torch.nn.intrinsic", "torch.nn.qat", "torchao.")


def convert(model: nn.Module, *, residual: bool = True, check: Any = None) -> ConversionReport:
    """Rewrites a model in place: one kernel computes a norm, a residual addition and an activation.

    Parameters, buffers, hooks, names, state_dict and modes stay the same objects, so an optimizer that was
    built before stays valid. Results differ by rounding only. A forward that cannot be read for certain is
    left as it is, and the report says why. `revert` undoes the conversion.

    Args:
        model: any module. The forward of each block in it is read with torch.fx.
        residual: whether the addition of a residual is fused too.
        check: a batch to compare the model before and after conversion: the model's argument, a tuple of its
            positional arguments, or a mapping of its arguments by name. The model runs forward and backward
            with the batch before and after conversion. The report then says how far outputs and gradients
            differ, and how many bytes are kept for backward. Outputs may be tensors, tuples, lists, mappings,
            dataclasses, or classes that are registered with torch.utils._pytree. Buffers, gradients and
            torch's random numbers are the same afterwards. A deep network enlarges differences in rounding,
            more so with a small batch. A check of the model in float64 shows whether there is any other
            difference.

    Returns:
        A ConversionReport.

    Raises:
        TypeError: model is not a module.
        Exception: any exception that model(check) raises. The model is then as it was.

    Example:
        >>> import torch, gradkernels as gk
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.1), nn.Linear(8, 2))
        >>> print(gk.convert(model))
        convert: 1 fused, 0 replaced, 0 left of 1 norms and activations
          module  found                   becomes                     why
          1       BatchNorm1d, LeakyReLU  batch_norm_act(leaky_relu)
    """
    check_model(model)
    problem = _why_not_convertible(model)
    if problem is not None:
        return ConversionReport((), (problem,))
    states = [(module, type(module), dict(module.__dict__)) for module in model.modules()]
    try:
        _revert(model)
        plan = _Plan(model, residual)
        before = None if check is None else Observation(model, check)
        plan.apply()
        if before is None:
            return ConversionReport(tuple(plan.rows), tuple(plan.notes))
        after = Observation(model, check)
        if not before.outputs:
            plan.notes.append(f"the model returned {before.output_type}, in which there is no tensor to compare")
    except BaseException:
        for module, kind, state in states:
            object.__setattr__(module, "__class__", kind)
            restore(module, state)
        raise
    return ConversionReport(
        tuple(plan.rows),
        tuple(plan.notes),
        before.saved_bytes,
        after.saved_bytes,
        largest_difference(before.outputs, after.outputs),
        largest_difference(before.grads, after.grads),
    )


def revert(model: nn.Module) -> nn.Module:
    """Undoes convert, in place: every module gets back the class that it had.

    A module that has been replaced or changed since, by convert_sync_batch_norm for example, stays as it is.

    Args:
        model: any module. One that was not converted stays as it is.

    Returns:
        model.

    Raises:
        TypeError: model is not a module.

    Example:
        >>> import torch, gradkernels as gk
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        >>> gk.convert(model).rows[0].becomes, type(model[0])
        ('batch_norm_act(relu)', <class 'gradkernels.batch_norm_act.BatchNormAct1d'>)
        >>> type(gk.revert(model)[0])
        <class 'torch.nn.modules.batchnorm.BatchNorm1d'>
    """
    check_model(model)
    _revert(model)
    return model


def _revert(model: nn.Module) -> None:
    for module in model.modules():
        base = base_class(type(module))
        if base is not None:
            object.__setattr__(module, "__class__", base)
            module.__dict__.pop(FORWARD, None)
        original = module.__dict__.get(ORIGINAL)
        if isinstance(original, type) and type(module) is ours_for(original):
            object.__setattr__(module, "__class__", original)
            for name in (ORIGINAL, "act", "act_param") if original in NORMS else (ORIGINAL,):
                module.__dict__.pop(name)


def _why_not_convertible(model: nn.Module) -> str | None:
    """Why nothing in a model may be changed; None if it may."""
    if isinstance(model, torch.jit.ScriptModule):
        remedy = "Convert the model that it was made from. torch.jit.trace takes a converted model, torch.jit.script does not"
        return f"the model is scripted, so its code is compiled already. {remedy}"
    for name, module in model.named_modules():
        place = f"{name or 'the model itself'}: {type(module).__name__}"
        if type(module).__module__.startswith(_QUANTISED):
            return f"the model is quantised ({place}): the kernels take floating point"
        if any(map(is_lazy, (*module._parameters.values(), *module._buffers.values()))):
            return f"the model has parameters without a shape ({place}): run a batch through it first"
    return None


class _Plan:
    """Every change that convert makes, and the report on it. Only `apply` changes the model."""

    def __init__(self, model: nn.Module, residual: bool) -> None:
        self.model = model
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.forwards: dict[nn.Module, RewrittenForward] = {}
        self.reader = rewrite.Reader()
        self.names = {module: name for name, module in model.named_modules()}
        # Blocks whose forward was not read, because it calls no norm and no activation with a kernel.
        self.unread: set[nn.Module] = set()
        # Blocks whose forward could not be read or cannot be replaced -> why.
        self.problems: dict[nn.Module, str] = {}
        # Modules whose class must stay, because of their attributes or of what code above them asks -> why.
        self.kept = {module: why for module in self.names if (why := why_kept(module))} | _of_classes(set(map(type, self.names)))
        # A Sequential is read at once.
        self.reader.follow(
            block
            for block in _with_progress(self.names)
            if trace.has_own_forward(block) and (type(block).forward is nn.Sequential.forward or may_be_rewritten(block))
        )
        found = [(block, site) for block in self.names for site in self.read(block, residual)]
        self.keep_what_is_asked_for()
        # Modules that are called somewhere without being fused, and may get our class.
        self.alone = {site.module for _, site in found if site.module is not None and site.label is None}
        self.alone -= {site.module for _, site in found if site.keeps_output}
        called = {site.module for _, site in found} | {module for _, site in found for module in site.absorbed}
        sites = _one_at_each_place(found)
        for block, site in sites:
            if site.why == IS_RETURNED:
                site.why = self.why_returned(block)
        fused = {site.module for _, site in sites if site.is_fused and site.place is not None}
        for block, site in sites:
            # A norm with its own rewritten forward has one row: for its call if it is fused there, else for that forward.
            if site.module not in self.forwards or (site.is_fused if site.place is not None else site.module not in fused):
                self.rows.append(self.row(block, site))
        for module, name in self.names.items():
            if module not in called and (is_norm(module) or is_activation(module)):
                self.rows.append(self.row(module, self.site_without_call(module, name)))
        order = {name: place for place, name in enumerate(self.names.values())}
        self.rows.sort(key=lambda row: order[row.name])
        if not any(map(is_norm, self.names)):
            self.notes.append("the model has no batch, group or instance norm")
        for module, name in self.names.items():
            if isinstance(module, torch.jit.ScriptModule) and not isinstance(self.above(name), torch.jit.ScriptModule):
                self.notes.append(f"{name} is scripted and left as it is")

    def read(self, block: nn.Module, residual: bool) -> list[Site]:
        """The sites in the forward of one module. Notes the rewritten forward, or why there is none."""
        if not trace.has_own_forward(block):
            return []
        if not may_be_rewritten(block):
            self.unread.add(block)
            return []
        result = rewrite.rewrite_forward(block, residual, self.reader, self.reader.kinds_of_calls(block))
        if not self.reader.calls_of(block) and (names := trace.optional_arguments(type(block).forward)):
            for site in (site for site in result.sites if site.label is not None):
                unseen = f"only in calls without {', '.join(names)}: no forward that could be read calls {type(block).__name__}"
                site.why = site.why or unseen
        self.kept |= result.kept
        if result.problem is not None:
            self.problems[block] = Reason(result.problem, _REMEDY_OF_FORWARDS)
        if result.forward is not None:
            why = why_not_derived(type(block))
            if why is not None:
                self.problems[block] = f"stays: its class {why}"
                return []
            self.forwards[block] = result.forward
        return result.sites

    def keep_what_is_asked_for(self) -> None:
        """Keeps the classes below code that may ask for a class that changes, or for a name that is added."""
        changing = {*ACTIVATION_MODULES, *map(type, self.forwards), *(kind for kind in map(type, self.names) if ours_for(kind) is not None)}
        classes_and_names = changing | {kind.__name__ for kind in changing}
        looked_for = {kind: attributes_looked_for(kind) for kind in set(map(type, self.names))}
        for block in self.names:
            if any(not asked or asked & classes_and_names for asked in classes_asked(type(block))):
                asks = Reason(
                    f"{type(block).__name__} asks for the class of a module, which conversion would change",
                    "use isinstance, and not type() or __class__",
                )
                self.kept.update(dict.fromkeys(block.modules(), asks))
            # Without such names, why_kept says what it said at first.
            if names := looked_for[type(block)]:
                self.kept |= {module: why for module in block.modules() if (why := why_kept(module, names))}

    def site_without_call(self, module: nn.Module, name: str) -> Site:
        """The site of a module that no forward calls, as far as forwards could be read."""
        site = Site(module, type(module).__name__, why=self.why_uncalled(name))
        if keeps_output(module):
            site.why, site.keeps_output = KEEPS_ITS_OUTPUT, True
        else:
            self.alone.add(module)
        return site

    def row(self, block: nn.Module, site: Site) -> Row:
        module = site.module
        name = self.names[block if module is None else module]
        kept = self.kept.get(block) or (module and self.kept.get(module))
        if kept:
            return Row(name, site.found, None, kept)
        if site.label is not None:
            return Row(name, site.found, site.label, site.why, site.is_fused)
        if module is None or site.keeps_output:
            return Row(name, site.found, None, site.why)
        ours = NORMS.get(type(module))
        if ours is not None:
            return Row(name, site.found, ours.__name__, site.why)
        label, why = _activation_alone(module)
        # The reason of the site is more useful if the activation could be fused where it is called.
        is_fusible = is_norm(module) or (site.why and act_of_module(module) is not None)
        return Row(name, site.found, label, site.why if is_fusible else why)

    def above(self, name: str) -> nn.Module:
        return self.model.get_submodule(name.rpartition(".")[0])

    def why_returned(self, block: nn.Module) -> str:
        """Why nothing is fused with what a block returns: the problem of the block that calls it, if that has one."""
        name = self.names[block]
        while name:
            above = self.above(name)
            name = name.rpartition(".")[0]
            if above in self.problems:
                return self.with_problem("its output is returned to {}, whose forward {}", above)
            call = self.reader.ends.last_norm(above)
            if not isinstance(above, (nn.ModuleList, nn.ModuleDict)) and (call is None or call[0] is not block):
                break
        return IS_RETURNED

    def with_problem(self, text: str, block: nn.Module) -> str:
        """A text that names a block and its problem."""
        problem = self.problems[block]
        why = text.format(type(block).__name__, problem)
        return Reason(why, problem.remedy) if isinstance(problem, Reason) else why

    def why_uncalled(self, name: str) -> str:
        """Why no call of a module was found: the problem of the block that holds it."""
        while name:
            block = self.above(name)
            name = name.rpartition(".")[0]
            if block in self.problems:
                return self.with_problem("the forward of {} {}", block)
            if block in self.unread:
                return ""
            if not isinstance(block, (nn.ModuleList, nn.ModuleDict)):
                break
        return "no forward that could be read calls it"

    def apply(self) -> None:
        for module in self.names:
            kind = type(module)
            if module in self.kept:
                continue
            ours = NORMS.get(kind)
            if ours is not None:
                module.__dict__[ORIGINAL] = kind
                module.__dict__["act"], module.__dict__["act_param"] = "identity", check_act("identity", None)
                object.__setattr__(module, "__class__", ours)
            elif module in self.alone and kind in ACTIVATION_MODULES and _activation_alone(module)[0] is not None:
                module.__dict__[ORIGINAL] = kind
                object.__setattr__(module, "__class__", ACTIVATION_MODULES[kind])
            elif module in self.forwards:
                module.__dict__[FORWARD] = self.forwards[module]
                object.__setattr__(module, "__class__", converted_class(kind))


def _one_at_each_place(found: list[tuple[nn.Module, Site]]) -> list[tuple[nn.Module, Site]]:
    """Of the sites of each call the one that says most, with the block whose forward has the call.

    Where a child is written out in the forward of its parent, both have sites for its calls.
    """
    best: dict[Place, Site] = {}
    for _, site in found:
        for place in site.also or ((site.place,) if site.place is not None else ()):
            # Parents come first. They know why a call is not fused, and children what is fused without their parents.
            if place not in best or (site.is_fused and not best[place].is_fused):
                best[place] = site
    placed = [(block, site) if site.place is None else (site.place[0], site) for block, site in found]
    return [(block, site) for block, site in placed if site.place is None or best[site.place] is site]


def _of_classes(kinds: set[type[nn.Module]]) -> dict[nn.Module, str]:
    """The modules that are attributes of classes, which other models share -> why they keep their class."""
    return {
        part: f"it is an attribute of the class {base.__name__}, which other models share"
        for base in {base for kind in kinds for base in own_classes(kind)}
        for attribute in vars(base).values()
        for value in held(attribute)
        if isinstance(value, nn.Module)
        for part in value.modules()
    }


def _with_progress(modules: Collection[nn.Module]) -> Iterable[nn.Module]:
    """The modules, with a progress line in a terminal beyond two seconds, if tqdm is installed."""
    if not sys.stderr.isatty():
        return modules
    try:
        from tqdm import tqdm
    except ImportError:
        return modules
    progress: Iterable[nn.Module] = tqdm(modules, "convert", leave=False, unit=" modules", delay=2)
    return progress


def _activation_alone(module: nn.Module) -> tuple[str | None, str]:
    """The name of the class that an activation alone gets, or None and why it keeps its own."""
    kind: Any = type(module)
    if kind is nn.SiLU and getattr(module, "inplace", False):
        return None, IS_IN_PLACE
    if kind in ACTIVATION_MODULES:
        return f"gradkernels.{ACTIVATION_MODULES[kind].__name__}", ""
    if kind is nn.RReLU:
        return None, "gradkernels.RReLU draws other slopes from the same seed"
    if kind.__module__.startswith("gradkernels."):
        return None, "it is a module of gradkernels already"
    if act_of_module(module) is not None:
        return None, NOTHING_TO_FUSE
    return None, f"there is no kernel for {kind.__name__}"
