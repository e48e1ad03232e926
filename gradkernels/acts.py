"""The activations that batch norm can apply, one record each. csrc/math/activation.h has their formulas.

The operators, convert, fold, init, diagnose and the tests all read ACTS. activation.py adds the functions and
modules of this package to the records.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def swish(x: Tensor, beta: float | Tensor) -> Tensor:
    """x sigmoid(beta x), computed with torch's operators."""
    # F.silu raises an error for integers and for what is not a tensor. The product below would silently convert them to floats.
    if (not isinstance(beta, Tensor) and beta == 1) or not (isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())):
        return F.silu(x)
    return x * torch.sigmoid(beta * x)


@dataclass(frozen=True, eq=False)
class Act:
    """One activation.

    Attributes:
        name: the value of the argument `act`.
        function: computes the activation from (x, act_param) with torch's operators.
        saves: what backward needs of the activation's input: "nothing", one bit per element ("mask"), or the
            "value".
        param: the name of the parameter that act_param sets; None without a parameter.
        default: the parameter's value for act_param=None; None without a parameter.
        modules: classes that compute the activation -> the attribute that holds the parameter, or None.
            Subclasses are not listed, because they may compute something else.
        spellings: functions and names of methods that compute the activation -> their argument for the
            parameter, or None.
        option: the argument of these classes and functions, and its value, with which they compute this activation
            and not another; None where they compute no other. Of several records that share a function, the first
            is the one that it computes by default.
    """

    name: str
    function: Callable[[Tensor, float], Tensor]
    saves: Literal["nothing", "mask", "value"]
    param: str | None = None
    default: float | None = None
    modules: dict[type[nn.Module], str | None] = field(default_factory=dict)
    spellings: dict[Any, str | None] = field(default_factory=dict)
    option: tuple[str, str] | None = None

    @property
    def operators(self) -> set[str]:
        """The operators that compute the activation, without the underscore of in-place versions."""
        if self.option is not None:
            return {self.name}
        names = {spelling if isinstance(spelling, str) else spelling.__name__ for spelling in self.spellings}
        return {self.name, *(name.rstrip("_") for name in names)}

    def attribute_of(self, module_class: type[nn.Module]) -> str | None:
        """The attribute of a module that decides what it computes, or that holds the parameter; None for neither."""
        return self.modules[module_class] if self.option is None else self.option[0]

    def module(self, act_param: float, module_class: type[nn.Module] | None = None) -> nn.Module:
        """A module that computes the activation: by default this package's if there is one, else torch's."""
        if module_class is None:
            # activation.py adds the class of this package last.
            module_class = [*self.modules][-1]
        attribute = self.attribute_of(module_class)
        return module_class() if attribute is None else module_class(**{attribute: act_param if self.option is None else self.option[1]})


ACTS = {
    act.name: act
    for act in (
        Act("identity", lambda x, _: x, "nothing", modules={nn.Identity: None}),
        Act(
            "relu",
            lambda x, _: F.relu(x),
            "mask",
            modules={nn.ReLU: None},
            spellings=dict.fromkeys((F.relu, torch.relu, torch.relu_, "relu", "relu_")),
        ),
        Act("relu6", lambda x, _: F.relu6(x), "mask", modules={nn.ReLU6: None}, spellings={F.relu6: None}),
        Act(
            "leaky_relu",
            F.leaky_relu,
            "mask",
            "negative_slope",
            0.01,
            modules={nn.LeakyReLU: "negative_slope"},
            spellings=dict.fromkeys((F.leaky_relu, F.leaky_relu_), "negative_slope"),
        ),
        Act("elu", F.elu, "value", "alpha", 1.0, modules={nn.ELU: "alpha"}, spellings=dict.fromkeys((F.elu, F.elu_), "alpha")),
        Act("swish", swish, "value", "beta", 1.0, modules={nn.SiLU: None}, spellings={F.silu: None}),
        Act("hardswish", lambda x, _: F.hardswish(x), "value", modules={nn.Hardswish: None}, spellings={F.hardswish: None}),
        Act("gelu", lambda x, _: F.gelu(x), "value", modules={nn.GELU: None}, spellings={F.gelu: None}, option=("approximate", "none")),
        Act(
            "gelu_tanh",
            lambda x, _: F.gelu(x, approximate="tanh"),
            "value",
            modules={nn.GELU: None},
            spellings={F.gelu: None},
            option=("approximate", "tanh"),
        ),
        Act("mish", lambda x, _: F.mish(x), "value", modules={nn.Mish: None}, spellings={F.mish: None}),
    )
}


def act_of_module(module: nn.Module) -> Act | None:
    """The activation that a module computes, by the module's exact class; None for other classes."""
    acts = (act for act in ACTS.values() if type(module) in act.modules)
    return next((act for act in acts if act.option is None or getattr(module, act.option[0], None) == act.option[1]), None)


def act_of_spelling(target: Any, kwargs: Mapping[str, Any] = MappingProxyType({})) -> Act | None:
    """The activation that a function, or a method of this name, computes with these arguments; None for any other."""
    acts = (act for act in ACTS.values() if target in act.spellings)
    return next((act for act in acts if act.option is None or kwargs.get(*act.option) == act.option[1]), None)


def has_param(act: str) -> bool:
    return act in ACTS and ACTS[act].default is not None


def check_act(act: str, act_param: float | None) -> float:
    """Checks both; returns the parameter: act_param, its default, or 0.0 if `act` has no parameter."""
    if act not in ACTS:
        raise ValueError(f"unknown act {act!r}; act must be one of {', '.join(map(repr, ACTS))}")
    if isinstance(act_param, Tensor):
        raise TypeError(f"act_param must be a float, not {type(act_param).__name__}: it cannot be learned")
    # float() would parse it.
    if isinstance(act_param, (str, bytes)):
        raise TypeError(f"act_param must be a float, not {type(act_param).__name__}")
    default = ACTS[act].default
    # 0.0 is allowed: modules store it for an activation without a parameter.
    if default is None and act_param:
        raise ValueError(f"act_param={act_param} does not apply to act {act!r}, which has no parameter")
    return (default or 0.0) if act_param is None else float(act_param)


def resolve_act(act: str | nn.Module, act_param: float | None) -> tuple[str, float]:
    """The name and the parameter of an activation, from its name or from a module that computes it."""
    if isinstance(act, str):
        return act, check_act(act, act_param)
    record = act_of_module(act)
    if record is None or any(True for _ in act.parameters()):
        modules = ", ".join(sorted({module_class.__name__ for known in ACTS.values() for module_class in known.modules}))
        wrong = f"the class {act.__name__}" if isinstance(act, type) else str(act)
        raise TypeError(
            f"act must be one of {', '.join(map(repr, ACTS))}, or an instance of {modules}, not {wrong}. "
            "For an activation with learnable parameters (PReLU, a learnable Swish), use act='identity' and a module after the batch norm"
        )
    if act_param is not None:
        raise ValueError(f"act_param must be None, because act is a module that holds its own parameters: {act}")
    attribute = record.modules[type(act)]
    return record.name, check_act(record.name, None if attribute is None else getattr(act, attribute))
