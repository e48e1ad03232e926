"""Clipping the gradients of models, reports of them, and optimizers with clipping, each compared with torch's functions that do the same.

Least traffic, G = bytes of all gradients: 1G where clip_grad_norm_ finds nothing to clip, 3G where it scales; torch always moves 3G.
Clamping is 2G, a report 1G. A step of RMSprop reads parameter, gradient and average and writes two of them, 5G, and 1G more for the norm; a
clipped step of AdamW reads four and writes three, takes the norm, and writes the gradients that it scales, 9G. Adaptive clipping reads
weights and gradients, 2G, and writes the gradients that it scales, 3G. A policy is compared with a bound that is never reached.
"""

import itertools
import math
import operator
from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from harness import EAGER, OURS, Case, arguments, gk, prove, reference, run
from models.resnet import resnet50

Shapes = list[tuple[int, ...]]
Parameters = list[nn.Parameter]
Step = Callable[[], Any]
# Makes, of some parameters, the step that is measured.
Maker = Callable[[Parameters], Step]


def gpt2_small() -> Shapes:
    """Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, its head tied: 124 million parameters."""
    width = 768
    linear = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    layer: Shapes = [*[(width,)] * 4, *linear, *[(outputs,) for _, outputs in linear]]
    return [(50257, width), (1024, width), *layer * 12, (width,), (width,)]


MODELS: dict[str, Callable[[], Shapes]] = {
    "1,000 tensors of 256": lambda: [(256,)] * 1000,
    "ResNet-50": cache(lambda: [tuple(each.shape) for each in resnet50(classes=1000).parameters()]),
    "GPT-2 small": gpt2_small,
    # Proofs are made on these: a float64 copy of a model with an optimizer's state would take more memory than many machines have.
    "proof": lambda: [(1,), (17,), (255,), (768, 70), (65537,)],
}


@lru_cache(maxsize=2)
def drawn(count: int) -> Tensor:
    return torch.randn(count)


def parameters_of(model: str, dtype: torch.dtype) -> Parameters:
    """With gradients. A gradient begins one number after its parameter: drawing numbers takes longer than most of what is measured."""
    shapes, begin, parameters = MODELS[model](), 0, []
    flat = drawn(sum(map(math.prod, shapes)) + 1)
    for shape in shapes:
        value, grad = (flat[at : at + math.prod(shape)].view(shape).to(dtype, copy=True) for at in (begin, begin + 1))
        parameters.append(nn.Parameter(value))
        parameters[-1].grad = grad
        begin += math.prod(shape)
    return parameters


def norm_of(parameters: Parameters) -> float:
    return sum(torch.linalg.vector_norm(each.grad, dtype=torch.float64).square() for each in parameters).sqrt().item()


def falling(start: float) -> Callable[[], float]:
    """A bound that falls from call to call, so that every call has to clip again what the last one left."""
    bounds = itertools.accumulate(itertools.repeat(0.999), operator.mul, initial=start)
    return lambda: next(bounds)


def norm_clipping(clips: bool, function: Callable[..., Any], parameters: Parameters) -> Step:
    norm = norm_of(parameters)
    bound = falling(0.5 * norm) if clips else lambda: 2 * norm
    return lambda: function(parameters, bound())


def value_clipping(function: Callable[..., Any], parameters: Parameters) -> Step:
    bound = falling(2.0)
    return lambda: function(parameters, bound())


def adaptive_by_torch(parameters: Parameters, clip_factor: float) -> None:
    """The loop of timm's adaptive_clip_grad."""
    for each in parameters:
        dims = tuple(range(1, each.dim())) or None
        with torch.no_grad():
            weight_norm, norm = (torch.linalg.vector_norm(x, dim=dims, keepdim=True) for x in (each, each.grad))
            bound = weight_norm.clamp(min=1e-3) * clip_factor
            clipped = each.grad * (bound / norm.clamp(min=1e-6))
            each.grad.copy_(torch.where(norm < bound, each.grad, clipped))


def adaptive(clips: bool, function: Callable[..., Any], parameters: Parameters) -> Step:
    bound = falling(0.1) if clips else lambda: 1e9
    return lambda: function(parameters, bound())


def report_by_torch(parameters: Parameters) -> list[Tensor]:
    grads = [each.grad for each in parameters]
    norms, largest = ([function(each) for each in grads] for function in (torch.linalg.vector_norm, lambda grad: grad.abs().max()))
    nonfinite = torch.stack([(~each.isfinite()).sum() for each in grads])
    return [torch.stack(norms), torch.stack(largest), nonfinite, torch.nn.utils.get_total_norm(grads)]


def report_by_us(parameters: Parameters) -> list[Tensor]:
    found = gk.grad_report(parameters)
    return [found.norms, found.max_abs, found.nonfinite, found.total_norm]


def rmsprop(max_norm: float | None, foreach: bool | None, parameters: Parameters) -> Step:
    optimizer = torch.optim.RMSprop(parameters, foreach=foreach)

    def step() -> None:
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()

    return step


def adamw(is_attached: bool, parameters: Parameters) -> Step:
    optimizer = torch.optim.AdamW(parameters, fused=True)
    bound = falling(0.5 * norm_of(parameters))
    handle = gk.attach_clipping(optimizer, 1.0) if is_attached else None

    def step() -> None:
        if handle is not None:
            handle.max_norm = bound()
        else:
            torch.nn.utils.clip_grad_norm_(parameters, bound())
        optimizer.step()

    return step


def adamw_with(max_norm: Any, is_attached: bool, parameters: Parameters) -> Step:
    optimizer = torch.optim.AdamW(parameters, fused=True)
    if is_attached:
        gk.attach_clipping(optimizer, max_norm)
        return optimizer.step
    return lambda: (torch.nn.utils.clip_grad_norm_(parameters, max_norm), optimizer.step())


def policies(policy: Any) -> dict[str, Maker]:
    """Proved by the first step, in which a policy does not clip."""
    each = {EAGER: (1e9, False), "attach_clipping(1e9)": (1e9, True), OURS: (policy, True)}
    return {provider: partial(adamw_with, *arguments) for provider, arguments in each.items()}


def rmsprops(max_norm: float | None) -> dict[str, Maker]:
    theirs = {EAGER: partial(rmsprop, max_norm, None), "torch, foreach=True": partial(rmsprop, max_norm, True)}
    return theirs | {OURS: lambda parameters: gk.optim.RMSprop(parameters, max_norm=max_norm).step}


def makers(make: Callable[..., Step], *of: Any) -> dict[str, Maker]:
    """make(each, parameters) for torch's, ours and, where torch's own in float64 is not exact, what is."""
    return {provider: partial(make, each) for provider, each in zip((EAGER, OURS, "exact"), of, strict=False)}


NORM = (torch.nn.utils.clip_grad_norm_, gk.clip_grad_norm_, reference.clip_grad_norm_)
# operator -> the steps by provider, and how many times the bytes of all gradients are moved at least
OPERATORS: dict[str, tuple[dict[str, Maker], int]] = {
    "clip_grad_norm_ that clips": (makers(partial(norm_clipping, True), *NORM), 3),
    "clip_grad_norm_ that need not clip": (makers(partial(norm_clipping, False), *NORM), 1),
    "clip_grad_value_": (makers(value_clipping, torch.nn.utils.clip_grad_value_, gk.clip_grad_value_), 2),
    "grad_report": (makers(partial, report_by_torch, report_by_us), 1),
    "optim.RMSprop": (rmsprops(None), 5),
    "optim.RMSprop with max_norm": (rmsprops(1.0), 6),
    "AdamW with attach_clipping": (makers(adamw, False, True), 9),
    "adaptive_clip_grad_ that clips": (makers(partial(adaptive, True), adaptive_by_torch, gk.adaptive_clip_grad_), 3),
    "adaptive_clip_grad_ that need not clip": (makers(partial(adaptive, False), adaptive_by_torch, gk.adaptive_clip_grad_), 2),
    "AdamW with Percentile": (policies(gk.clipping.Percentile(q=100.0)), 8),
    "AdamW with ZScore": (policies(gk.clipping.ZScore()), 8),
    "AdamW with Adaptive": (policies(gk.clipping.Adaptive(clip_factor=1e9)), 9),
}
# Making the large model takes longer than measuring it.
OF_GPT2 = (
    *("clip_grad_norm_ that clips", "clip_grad_norm_ that need not clip", "optim.RMSprop", "AdamW with attach_clipping"),
    *("AdamW with Percentile", "AdamW with ZScore", "AdamW with Adaptive"),
)


def results(name: str, provider: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a step returns, and the parameters and gradients after it; gk.optim.RMSprop scales gradients as it reads them."""
    parameters = parameters_of("proof", dtype)
    returned = OPERATORS[name][0][provider](parameters)()
    found = returned if isinstance(returned, list) else [returned] if isinstance(returned, Tensor) else []
    grads = [] if name.startswith("optim.RMSprop") else [each.grad for each in parameters]
    found = [*found, *(each.detach() for each in parameters), *grads]
    return {f"result {i}": each if each.is_floating_point() else each.to(dtype) for i, each in enumerate(found)}


def case(name: str, model: str, dtype: torch.dtype = torch.float32) -> Case:
    made, passes = OPERATORS[name]
    exact = "exact" if "exact" in made else EAGER
    size = sum(map(math.prod, MODELS[model]())) * dtype.itemsize
    return Case(
        operator=name,
        name=model,
        providers={provider: make(parameters_of(model, dtype)) for provider, make in made.items() if provider != "exact"},
        prove=lambda: prove(*(results(name, each, dtype) for each in (OURS, EAGER)), results(name, exact, torch.float64)),
        bytes=passes * size,
        copied=size,
        dtype=dtype,
        in_place=True,
    )


if __name__ == "__main__":
    options = arguments(__doc__)
    # The small model comes last, because it takes less time than its share.
    models = ("GPT-2 small", "ResNet-50", "1,000 tensors of 256")[2 * options.quick :]
    cases = [partial(case, name, model) for model in models for name in OPERATORS if model != "GPT-2 small" or name in OF_GPT2]
    run("gradients and optimizers", cases, options)
