"""convert(model): an existing model computed by this package's kernels, in place and exactly; revert(model); and a report of both.

Modules change their class and nothing else: parameters, buffers, hooks and names stay the same objects. A batch norm becomes
BatchNormAct with act="identity"; a block whose forward calls it beside an activation gets a forward that joins them (guard.py).
Everything is read before anything is changed, and what was changed is put back if an exception follows.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from gradkernels.acts import act_of_module, check_act
from gradkernels.conversion import rewrite, trace
from gradkernels.conversion.attributes import restore
from gradkernels.conversion.block import converted_class, why_not_derived
from gradkernels.conversion.check import Observation, largest_difference
from gradkernels.conversion.guard import ATTRIBUTE, ORIGINAL, RewrittenForward, base_class
from gradkernels.conversion.patterns import ACTIVATION_MODULES, BATCH_NORMS, is_activation, keeps_output
from gradkernels.conversion.purity import classes_asked
from gradkernels.conversion.report import ConversionReport, Row
from gradkernels.conversion.result import Site

_QUANTISED = ("torch.ao.", "torch.nn.quantized", "torch.nn.intrinsic", "torch.nn.qat", "torchao.")


def convert(model: nn.Module, *, residual: bool = True, check: Any = None) -> ConversionReport:
    """Rewrites a model in place so that batch norm, a residual addition and the activation after them are one kernel.

    Parameters, buffers, hooks, names, state_dict and modes stay what they are, so optimizers built before stay valid; results differ by
    rounding only. What cannot be read for certain is left as it is, and the report says why. `revert` undoes it.

    Args:
        model: any module; what it holds is found by reading the forward of each block with torch.fx.
        residual: fuse the addition of a residual too.
        check: a batch: the model's argument, a tuple of its positional arguments or a mapping of its arguments by name. The model is run
            with it before and after, forward and backward, and the report says how outputs and gradients differ and how many bytes were
            saved for backward. Tensors are found in outputs that are tuples, lists, mappings, dataclasses or registered with
            torch.utils._pytree. Buffers, gradients and torch's generators are as before afterwards. A deep network enlarges differences
            in rounding, more so in small batches; a model in float64 shows that there is nothing else.

    Returns:
        A ConversionReport.

    Raises:
        TypeError: model is not a module.
        Exception: what model(check) raises; the model is then as it was.

    Example:
        >>> import torch, gradkernels as gk
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.LeakyReLU(0.1), torch.nn.Linear(8, 2))
        >>> print(gk.convert(model))
        convert: 1 fused, 0 replaced, 0 left of 1 batch norms and activations
          module  found                   becomes                     why
          1       BatchNorm1d, LeakyReLU  batch_norm_act(leaky_relu)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert takes a torch.nn.Module, not {type(model).__name__}")
    problem = _problem_of(model)
    if problem is not None:
        return ConversionReport((), (problem,))
    before = [(module, type(module), dict(module.__dict__)) for module in model.modules()]
    try:
        _revert(model)
        plan = _Plan(model, residual)
        seen = None if check is None else Observation(model, check)
        plan.apply()
        if seen is None:
            return ConversionReport(tuple(plan.rows), tuple(plan.notes))
        after = Observation(model, check)
        if not seen.outputs:
            plan.notes.append(f"the model returned {seen.output_type}, in which there is no tensor to compare")
    except BaseException:
        for module, kind, state in before:
            object.__setattr__(module, "__class__", kind)
            restore(module, state)
        raise
    return ConversionReport(
        tuple(plan.rows),
        tuple(plan.notes),
        seen.saved_bytes,
        after.saved_bytes,
        largest_difference(seen.outputs, after.outputs),
        largest_difference(seen.grads, after.grads),
    )


def revert(model: nn.Module) -> nn.Module:
    """Undoes convert, in place: every module has the class it had.

    What has been made of a module since, by convert_sync_batch_norm for one, stays.

    Args:
        model: any module; one that was not converted stays as it is.

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
    if not isinstance(model, nn.Module):
        raise TypeError(f"revert takes a torch.nn.Module, not {type(model).__name__}")
    _revert(model)
    return model


def _revert(model: nn.Module) -> None:
    for module in model.modules():
        base = base_class(type(module))
        if base is not None:
            object.__setattr__(module, "__class__", base)
            module.__dict__.pop(ATTRIBUTE, None)
        original = module.__dict__.get(ORIGINAL)
        if original is not None and type(module) is (BATCH_NORMS | ACTIVATION_MODULES)[original]:
            object.__setattr__(module, "__class__", original)
            for name in (ORIGINAL, "act", "act_param") if issubclass(original, _BatchNorm) else (ORIGINAL,):
                module.__dict__.pop(name)


def _problem_of(model: nn.Module) -> str | None:
    """Why nothing in a model is to be touched."""
    if isinstance(model, torch.jit.ScriptModule):
        return "the model is scripted: its code is compiled already. Convert the model that was scripted; what was converted can be traced"
    for name, module in model.named_modules():
        if type(module).__module__.startswith(_QUANTISED):
            return f"the model is quantised ({name or 'the model itself'}: {type(module).__name__}): the kernels take floating point"
        if any(map(is_lazy, (*module._parameters.values(), *module._buffers.values()))):
            place = name or "the model itself"
            return f"the model has parameters without a shape ({place}: {type(module).__name__}): run a batch through it first"
    return None


class _Plan:
    """Every change, before any of it is made."""

    def __init__(self, model: nn.Module, residual: bool) -> None:
        self.model = model
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.forwards: dict[nn.Module, RewrittenForward] = {}
        self.names = {module: name for name, module in model.named_modules()}
        # What the forwards did not call that were read: module -> why.
        self.problems: dict[nn.Module, str] = {}
        # What is below code that would see another class -> why it keeps its own.
        self.kept: dict[nn.Module, str] = {}
        sites = [(block, site) for block in self.names for site in self.read(block, residual)]
        changes = {*BATCH_NORMS, *ACTIVATION_MODULES, *map(type, self.forwards)}
        changes_or_names = changes | {each.__name__ for each in changes}
        for block in self.names:
            if any(not asked or asked & changes_or_names for asked in classes_asked(type(block))):
                why = f"{type(block).__name__} asks for the class of a module, which conversion would change"
                self.kept.update(dict.fromkeys(block.modules(), why))
        self.alone = {site.module for _, site in sites if site.module is not None and site.label is None}
        self.alone -= {site.module for _, site in sites if site.keeps_output}
        called = {site.module for _, site in sites} | {each for _, site in sites for each in site.absorbed}
        for block, site in sites:
            # A subclass of batch norm that is fused in itself is a leaf without a reading in the block that calls it.
            if site.module is None or site.module is block or site.module not in self.forwards:
                self.rows.append(self.row(block, site))
        for module, name in self.names.items():
            if module not in called and (isinstance(module, _BatchNorm) or is_activation(module)):
                site = Site(module, type(module).__name__, why=self.why_uncalled(name))
                if keeps_output(module):
                    site.why, site.keeps_output = rewrite.KEEPS_ITS_OUTPUT, True
                else:
                    self.alone.add(module)
                self.rows.append(self.row(module, site))
        order = {name: place for place, name in enumerate(self.names.values())}
        self.rows.sort(key=lambda row: order[row.name])
        if not any(isinstance(module, _BatchNorm) for module in self.names):
            self.notes.append("the model has no batch normalisation")
        for module, name in self.names.items():
            if isinstance(module, torch.jit.ScriptModule) and not isinstance(self.above(name), torch.jit.ScriptModule):
                self.notes.append(f"{name} is scripted and left as it is")

    def read(self, block: nn.Module, residual: bool) -> list[Site]:
        """The sites in the forward of one module, and the reason where there are none to be read."""
        if not trace.has_own_forward(block):
            return []
        found = rewrite.rewrite_forward(block, residual)
        if found.problem is not None:
            self.problems[block] = found.problem
        if found.forward is not None:
            why = why_not_derived(type(block))
            if why is not None:
                self.problems[block] = f"stays: its class {why}"
                return []
            self.forwards[block] = found.forward
        return found.sites

    def row(self, block: nn.Module, site: Site) -> Row:
        module = site.module
        name = self.names[block if module is None else module]
        kept = self.kept.get(block) or (module and self.kept.get(module))
        if kept:
            return Row(name, site.found, None, kept)
        if site.label is not None:
            return Row(name, site.found, site.label, site.why, site.is_fused)
        if module is None:
            return Row(name, site.found, None, site.why)
        if type(module) in BATCH_NORMS:
            return Row(name, site.found, BATCH_NORMS[type(module)].__name__, site.why)
        if site.keeps_output:
            return Row(name, site.found, None, site.why)
        ours, why = _activation_alone(module)
        # One that a batch norm could take in stays apart for what hides the place of its call.
        hidden = isinstance(module, _BatchNorm) or (site.why and act_of_module(module) is not None)
        return Row(name, site.found, ours, site.why if hidden else why)

    def above(self, name: str) -> nn.Module:
        return self.model.get_submodule(name.rpartition(".")[0])

    def why_uncalled(self, name: str) -> str:
        """Of the innermost block above a module that no forward calls."""
        while name:
            block = self.above(name)
            name = name.rpartition(".")[0]
            if block in self.problems:
                return f"the forward of {type(block).__name__} {self.problems[block]}"
            if not isinstance(block, (nn.ModuleList, nn.ModuleDict)):
                break
        return "no forward that could be read calls it"

    def apply(self) -> None:
        for module in self.names:
            kind = type(module)
            if module in self.kept:
                continue
            if kind in BATCH_NORMS:
                module.__dict__[ORIGINAL] = kind
                module.__dict__["act"], module.__dict__["act_param"] = "identity", check_act("identity", None)
                object.__setattr__(module, "__class__", BATCH_NORMS[kind])
            elif module in self.alone and kind in ACTIVATION_MODULES and _activation_alone(module)[0] is not None:
                module.__dict__[ORIGINAL] = kind
                object.__setattr__(module, "__class__", ACTIVATION_MODULES[kind])
            elif module in self.forwards:
                module.__dict__[ATTRIBUTE] = self.forwards[module]
                object.__setattr__(module, "__class__", converted_class(kind))


def _activation_alone(module: nn.Module) -> tuple[str | None, str]:
    """What an activation that nothing is fused with becomes, and why it is left."""
    kind: Any = type(module)
    if kind is nn.SiLU and getattr(module, "inplace", False):
        return None, "it is in place, which ours is not"
    if kind in ACTIVATION_MODULES:
        return f"gradkernels.{ACTIVATION_MODULES[kind].__name__}", ""
    if kind is nn.RReLU:
        return None, "gradkernels.RReLU draws other slopes from the same seed"
    if kind.__module__.startswith("gradkernels."):
        return None, "it is gradkernels' already"
    if act_of_module(module) is not None:
        return None, "torch's own is kept: alone there is nothing to fuse"
    return None, f"there is no kernel for {kind.__name__}"
