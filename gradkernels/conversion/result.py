"""What rewriting the forward of one block gives."""

from dataclasses import dataclass, field

from torch import nn

from gradkernels.conversion.guard import RewrittenForward


@dataclass
class Site:
    """One place in a forward where a batch norm or an activation is called.

    module: the module that is called, None for a function. found: the call, and what is fused with it. label: what computes it in the
    rewritten forward, None if it stays as it was. is_fused: one pass computes more than one call. why: the reason why it stays, or why
    no more is fused. absorbed: modules that are not called any more. keeps_output: it is an ELU whose output may be written, so that
    ours, which needs the output for the gradient, cannot take its place.
    """

    module: nn.Module | None
    found: str
    label: str | None = None
    is_fused: bool = False
    why: str = ""
    absorbed: tuple[nn.Module, ...] = ()
    keeps_output: bool = False


@dataclass
class RewriteResult:
    """The sites in a forward, and the forward that takes its place, None if it stays. problem: why it could not be read."""

    sites: list[Site] = field(default_factory=list)
    forward: RewrittenForward | None = None
    problem: str | None = None
