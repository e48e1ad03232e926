"""The activations that a batch norm applies, one record for each. Their formulas and gradients are in csrc/math/activation.h.

Everything that lists these activations reads ACTS: the operators, convert and fold, init, diagnose and the tables of the tests.
activation.py adds the functions and modules of this package where it defines them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def swish(x: Tensor, beta: float | Tensor) -> Tensor:
    """x sigmoid(beta x), composed of torch's operators."""
    # Integers go to F.silu for its error: the product would promote them in silence.
    if (not isinstance(beta, Tensor) and beta == 1) or not (x.is_floating_point() or x.is_complex()):
        return F.silu(x)
    return x * torch.sigmoid(beta * x)


@dataclass(frozen=True, eq=False)
class Act:
    """One activation.

    Attributes:
        name: the value of the argument `act`.
        function: the activation of (x, act_param), composed of torch's operators.
        saves: what backward needs to know of the activation's input, besides a gradient: "nothing", a bit for each element ("mask"), or
            the "value" itself.
        param: the name of the parameter that act_param stands for; None without one.
        default: the value of act_param=None; None without a parameter.
        modules: class -> the attribute that holds the parameter, or None. A subclass may compute something else, so it is not listed.
        spellings: a function, or the name of a method, that computes the activation -> its argument that is the parameter, or None.
    """

    name: str
    function: Callable[[Tensor, float], Tensor]
    saves: Literal["nothing", "mask", "value"]
    param: str | None = None
    default: float | None = None
    modules: dict[type[nn.Module], str | None] = field(default_factory=dict)
    spellings: dict[Any, str | None] = field(default_factory=dict)

    @property
    def operators(self) -> set[str]:
        """The names of the operators that compute it, without the underscore of the version in place."""
        names = {each if isinstance(each, str) else each.__name__ for each in self.spellings}
        return {self.name, *(name.rstrip("_") for name in names)}

    def module(self, act_param: float) -> nn.Module:
        """A module that computes it: ours if this package has one, else torch's."""
        kind, attribute = [*self.modules.items()][-1]
        return kind() if attribute is None else kind(**{attribute: act_param})


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
    )
}


def act_of_module(module: nn.Module) -> Act | None:
    """The activation that a module is an instance of."""
    return next((act for act in ACTS.values() if type(module) in act.modules), None)


def act_of_spelling(target: Any) -> Act | None:
    """The activation that a function, or a method of that name, computes."""
    return next((act for act in ACTS.values() if target in act.spellings), None)


def has_param(act: str) -> bool:
    return act in ACTS and ACTS[act].default is not None


def check_act(act: str, act_param: float | None) -> float:
    """act_param, or its default; 0.0 if `act` takes none. ValueError for an unknown name and for a parameter that `act` does not take."""
    if act not in ACTS:
        raise ValueError(f"unknown act {act!r}, known are {', '.join(map(repr, ACTS))}")
    if isinstance(act_param, Tensor):
        raise TypeError(f"act_param must be a float, not {type(act_param).__name__}: it is not learnt")
    # float() would read the number in a string.
    if isinstance(act_param, str):
        raise TypeError("act_param must be a float, not str")
    default = ACTS[act].default
    # Modules hold 0.0 for an activation without a parameter.
    if default is None and act_param:
        raise ValueError(f"act_param={act_param} is given for act {act!r}, which has no parameter")
    return (default or 0.0) if act_param is None else float(act_param)


def resolve_act(act: str | nn.Module, act_param: float | None) -> tuple[str, float]:
    """The name and the parameter of an activation that is given by name or as a module."""
    if isinstance(act, str):
        return act, check_act(act, act_param)
    found = act_of_module(act)
    if found is None or any(True for _ in act.parameters()):
        modules = ", ".join(sorted({kind.__name__ for each in ACTS.values() for kind in each.modules}))
        kind = act.__name__ + " itself" if isinstance(act, type) else str(act)
        raise TypeError(
            f"act is one of {', '.join(map(repr, ACTS))}, or an instance of {modules}, not {kind}. "
            "An activation with learnable parameters, such as PReLU or a learnable Swish, stays a module of its own after act='identity'"
        )
    if act_param is not None:
        raise ValueError(f"act_param is read from the module given as act, {act}; pass one or the other")
    attribute = found.modules[type(act)]
    return found.name, check_act(found.name, None if attribute is None else getattr(act, attribute))
