"""What rewriting the forward of one block gives."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from gradkernels.conversion.guard import RewrittenForward


class Reason(str):
    """Why a call stays as it was, with what the user can change.

    Attributes:
        remedy: what the user can change.
    """

    remedy: str

    def __new__(cls, why: str, remedy: str) -> "Reason":
        reason = super().__new__(cls, why)
        reason.remedy = remedy
        return reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.remedy)


# Reasons that hold for a module and for a function.
KEEPS_ITS_OUTPUT = Reason(
    "gradkernels.ELU keeps its output for the gradient, and something may write into that output",
    "write y = y + x after it, and not y += x",
)
IS_IN_PLACE = Reason("it is in place, which the kernel is not, and something else may read its input", "use inplace=False")
NOTHING_TO_FUSE = "torch's is kept: without a norm there is nothing to fuse"


# The module whose forward has a call, and the name of the call's node in the graph of this forward.
Place = tuple[nn.Module, str]


@dataclass
class Site:
    """One place in a forward where a norm or an activation is called.

    Attributes:
        module: the module that is called; None for a function.
        found: the norm or the activation, and what is fused with it.
        label: what computes it in the rewritten forward; None if the call stays as it was.
        is_fused: whether one kernel computes more than one call.
        why: why the call stays as it was, or why no more is fused with it.
        absorbed: modules that the rewritten forward does not call here.
        keeps_output: it is an ELU whose output may be written. Ours, which keeps the output for the gradient,
            cannot take its place.
        place: where it is called; None for a norm that applies an activation in its own forward.
        also: the places of all calls that are fused, its own included.
    """

    module: nn.Module | None
    found: str
    label: str | None = None
    is_fused: bool = False
    why: str = ""
    absorbed: tuple[nn.Module, ...] = ()
    keeps_output: bool = False
    place: Place | None = None
    also: tuple[Place, ...] = ()


@dataclass
class RewriteResult:
    """What can be done with one forward.

    Attributes:
        sites: the norms and activations that it calls.
        forward: the rewritten forward; None if nothing in it changes.
        kept: modules that cannot get our class, because the forward looks for a name that ours has -> why.
        problem: why the forward could not be read or rewritten.
    """

    sites: list[Site] = field(default_factory=list)
    forward: RewrittenForward | None = None
    kept: dict[nn.Module, str] = field(default_factory=dict)
    problem: str | None = None
