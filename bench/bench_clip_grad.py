"""Clipping the gradients of real models, when they are short enough and when they are not, and optimizers with clipping in them.

Least traffic, G = bytes of all gradients: 1G when nothing is clipped, 3G when everything is scaled; torch always moves 3G. A step of
RMSprop reads parameter, gradient and average and writes two of them, 5G; AdamW reads four and writes three, and writes the gradients that
it scales, 8G. Taking the norm first is 1G more.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from harness import Case, arguments, gk, prove, reference, run

Shapes = list[tuple[int, ...]]


def resnet50() -> Shapes:
    """Parameters of ResNet-50 (He et al., "Deep Residual Learning for Image Recognition", 2015, table 1)."""
    shapes: Shapes = []

    def convolution_and_norm(inputs: int, outputs: int, kernel: int) -> None:
        shapes.extend([(outputs, inputs, kernel, kernel), (outputs,), (outputs,)])

    convolution_and_norm(3, 64, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolution_and_norm(channels, width, 1)
            convolution_and_norm(width, width, 3)
            convolution_and_norm(width, 4 * width, 1)
            if block == 0:
                convolution_and_norm(channels, 4 * width, 1)
            channels = 4 * width
    return [*shapes, (1000, channels), (1000,)]


def gpt2_small() -> Shapes:
    """Parameters of GPT-2 small (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019), its head tied."""
    width = 768
    linear = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    layer: Shapes = [*[(width,)] * 4, *linear, *[(outputs,) for _, outputs in linear]]
    return [(50257, width), (1024, width), *layer * 12, (width,), (width,)]


def elements(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


assert (len(resnet50()), elements(resnet50())) == (161, 25_557_032)
assert (len(gpt2_small()), elements(gpt2_small())) == (148, 124_439_808)

MODELS: dict[str, Callable[[], Shapes]] = {
    "ResNet-50": resnet50,
    "GPT-2 small": gpt2_small,
    "1,000 tensors of 256": lambda: [(256,)] * 1000,
}


def case(model: str, clips: bool) -> Case:
    shapes = MODELS[model]()
    name = f"{model}, {'clipping' if clips else 'not clipping'}"
    gradients = [torch.randn(shape) for shape in shapes]
    norm = sum(gradient.double().square().sum() for gradient in gradients).sqrt().item()
    clip_functions = {"eager": torch.nn.utils.clip_grad_norm_, "gradkernels": gk.clip_grad_norm_}
    providers, prepare = {}, {}
    for provider, clip in clip_functions.items():
        parameters = [nn.Parameter(torch.empty(0).expand(0)) for _ in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.data = gradient
            parameter.grad = gradient.clone()
        # Each clipping call has to clip again what the last one left.
        bound = [norm]

        def step(clip: Callable[..., Tensor] = clip, parameters: list[nn.Parameter] = parameters, bound: list[float] = bound) -> None:
            if clips:
                bound[0] *= 0.99
            clip(parameters, bound[0] if clips else 2 * norm)

        def refill(parameters: list[nn.Parameter] = parameters, bound: list[float] = bound) -> None:
            bound[0] = norm
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad.copy_(gradient)

        providers[provider], prepare[provider] = step, refill

    def answer(clip: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        parameters = [nn.Parameter(gradient.to(dtype)) for gradient in gradients]
        for parameter in parameters:
            parameter.grad = parameter.detach().clone()
        total = clip(parameters, 0.5 * norm if clips else 2 * norm)
        return {"total norm": total, **{f"gradient {i}": parameter.grad for i, parameter in enumerate(parameters)}}

    total_bytes = 4 * elements(shapes)
    return Case(
        name=name,
        providers=providers,
        bytes=(3 if clips else 1) * total_bytes,
        copied=total_bytes,
        prove=lambda: prove(
            name, answer(gk.clip_grad_norm_), answer(torch.nn.utils.clip_grad_norm_), answer(reference.clip_grad_norm_, torch.float64)
        ),
        direction="in place",
        layout=f"{len(shapes)} tensors",
        outputs="none",
        prepare=prepare,
    )


def parameters_like(shapes: Shapes, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    parameters = []
    for shape in shapes:
        parameters.append(nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
        parameters[-1].grad = torch.randn(shape, generator=generator).to(dtype)
    return parameters


# What makes, of some parameters, the step that is measured.
Stepper = Callable[[list[nn.Parameter]], Callable[[], None]]


def after(step: Stepper, shapes: Shapes, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The parameters after one step."""
    parameters = parameters_like(shapes, dtype)
    step(parameters)()
    return {f"parameter {i}": parameter.detach() for i, parameter in enumerate(parameters)}


def step_case(name: str, steps: dict[str, Stepper], passes: int) -> Case:
    """passes: how many times the bytes of all gradients have to be moved."""
    shapes = gpt2_small()
    total_bytes = 4 * elements(shapes)
    # Proved on a few tensors: a float64 copy of the model with its state would take more memory than many machines have.
    proved: Shapes = [(1,), (17,), (255,), (768, 70), (65537,)]
    return Case(
        name=f"GPT-2 small, {name}",
        providers={provider: make(parameters_like(shapes)) for provider, make in steps.items()},
        bytes=passes * total_bytes,
        copied=total_bytes,
        prove=lambda: prove(
            name, after(steps["gradkernels"], proved), after(steps["eager"], proved), after(steps["eager"], proved, torch.float64)
        ),
        direction="in place",
        layout=f"{len(shapes)} tensors",
        outputs="none",
    )


def rmsprop(parameters: list[nn.Parameter], kind: type[torch.optim.Optimizer], max_norm: float | None = None) -> Callable[[], None]:
    if kind is gk.optim.RMSprop:
        return gk.optim.RMSprop(parameters, max_norm=max_norm).step
    optimizer = torch.optim.RMSprop(parameters)

    def step() -> None:
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()

    return step


def adamw(parameters: list[nn.Parameter], provider: str) -> Callable[[], None]:
    """Clips in every step but "norm, then step", which takes the norm and does nothing with it."""
    optimizer = torch.optim.AdamW(parameters, fused=True)
    grads = [parameter.grad for parameter in parameters]
    # Each clipping step has to clip again what the last one left.
    bound = [torch.nn.utils.get_total_norm(grads).item()]
    if provider == "gradkernels":
        handle = gk.attach_clipping(optimizer, bound[0])

    def step() -> None:
        bound[0] *= 0.999
        if provider == "gradkernels":
            handle.max_norm = bound[0]
        elif provider == "eager":
            torch.nn.utils.clip_grad_norm_(parameters, bound[0])
        else:
            gk.get_total_norm(grads)
        optimizer.step()

    return step


def rmsprop_case(clips: bool) -> Case:
    max_norm = 1.0 if clips else None
    kinds = {"eager": torch.optim.RMSprop, "gradkernels": gk.optim.RMSprop}
    steps = {provider: partial(rmsprop, kind=kind, max_norm=max_norm) for provider, kind in kinds.items()}
    return step_case("RMSprop with max_norm" if clips else "RMSprop", steps, 6 if clips else 5)


def adamw_case() -> Case:
    """Beside eager, what attached clipping is to cost no more than: the norm alone and torch's fused step."""
    providers = ("eager", "norm, then step", "gradkernels")
    return step_case("AdamW with clipping", {provider: partial(adamw, provider=provider) for provider in providers}, 9)


if __name__ == "__main__":
    options = arguments(__doc__)
    clipping = [partial(case, model, clips) for model in MODELS for clips in (False, True)]
    run("clipping, float32", [*clipping, partial(rmsprop_case, False), partial(rmsprop_case, True), adamw_case], options)
