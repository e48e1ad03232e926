"""Clipping the gradients of real models, when they are short enough and when they are not, reports of them, and optimizers with clipping.

Least traffic, G = bytes of all gradients: 1G when nothing is clipped, 3G when everything is scaled; torch always moves 3G. Clamping is 2G:
ours writes blocks of 1,024 elements with one beyond the bound, here all of them, torch every element in any case. A report is 1G,
several in torch's operators. A step of RMSprop reads parameter, gradient and average and writes two of them, 5G; AdamW reads four and
writes three, and writes the gradients that it scales, 8G. Taking the norm first is 1G more. Beside them stand torch's own other forms:
one tensor after the other where its default works on lists (foreach), and on lists where its default does not.
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


def efficientnet_b0() -> Shapes:
    """Parameters of EfficientNet-B0: Tan, Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", 2019, table 1,
    with a quarter of a block's input channels squeezed.
    """
    shapes: Shapes = []

    def convolution_and_norm(inputs: int, outputs: int, kernel: int) -> None:
        shapes.extend([(outputs, inputs, kernel, kernel), (outputs,), (outputs,)])

    convolution_and_norm(3, 32, 3)
    channels = 32
    # Expansion, kernel, channels and layers of the MBConv blocks.
    for expansion, kernel, width, layers in (
        *((1, 3, 16, 1), (6, 3, 24, 2), (6, 5, 40, 2), (6, 3, 80, 3)),
        *((6, 5, 112, 3), (6, 5, 192, 4), (6, 3, 320, 1)),
    ):
        for _ in range(layers):
            expanded, squeezed = channels * expansion, channels // 4
            if expansion > 1:
                convolution_and_norm(channels, expanded, 1)
            convolution_and_norm(1, expanded, kernel)
            shapes += [(squeezed, expanded, 1, 1), (squeezed,), (expanded, squeezed, 1, 1), (expanded,)]
            convolution_and_norm(expanded, width, 1)
            channels = width
    convolution_and_norm(channels, 1280, 1)
    return [*shapes, (1000, 1280), (1000,)]


def yolo_v8n() -> Shapes:
    """Parameters that are trained of YOLOv8n for 80 classes (Ultralytics, cfg/models/v8/yolov8.yaml at scale n)."""
    shapes: Shapes = []
    classes, bins = 80, 16

    def conv(inputs: int, outputs: int, kernel: int) -> None:
        shapes.extend([(outputs, inputs, kernel, kernel), (outputs,), (outputs,)])

    def c2f(inputs: int, outputs: int, depth: int) -> None:
        half = outputs // 2
        conv(inputs, outputs, 1)
        conv((2 + depth) * half, outputs, 1)
        for _ in range(2 * depth):
            conv(half, half, 3)

    conv(3, 16, 3)
    for inputs, width, depth in ((16, 32, 1), (32, 64, 2), (64, 128, 2), (128, 256, 1)):
        conv(inputs, width, 3)
        c2f(width, width, depth)
    # Spatial pyramid pooling, then the way up and down again.
    conv(256, 128, 1)
    conv(512, 256, 1)
    c2f(256 + 128, 128, 1)
    c2f(128 + 64, 64, 1)
    for width, joined in ((64, 128), (128, 256)):
        conv(width, width, 3)
        c2f(joined + width, joined, 1)
    # Boxes, then classes.
    maps = (64, 128, 256)
    for hidden, outputs in ((max(bins, maps[0] // 4, 4 * bins), 4 * bins), (max(maps[0], min(classes, 100)), classes)):
        for width in maps:
            conv(width, hidden, 3)
            conv(hidden, hidden, 3)
            shapes.extend([(outputs, hidden, 1, 1), (outputs,)])
    return shapes


def gpt2_small() -> Shapes:
    """Parameters of GPT-2 small (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019), its head tied."""
    width = 768
    linear = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    layer: Shapes = [*[(width,)] * 4, *linear, *[(outputs,) for _, outputs in linear]]
    return [(50257, width), (1024, width), *layer * 12, (width,), (width,)]


def elements(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


assert (len(resnet50()), elements(resnet50())) == (161, 25_557_032)
assert (len(efficientnet_b0()), elements(efficientnet_b0())) == (213, 5_288_548)
assert (len(yolo_v8n()), elements(yolo_v8n())) == (183, 3_157_184)
assert (len(gpt2_small()), elements(gpt2_small())) == (148, 124_439_808)

# At either end of a gradient: the chunks between are computed as these are.
PROVED = 32768
# Proved on a few tensors: a float64 copy of a model with an optimizer's state would take more memory than many machines have.
PROVED_SHAPES: Shapes = [(1,), (17,), (255,), (768, 70), (65537,)]
MODELS: dict[str, Callable[[], Shapes]] = {
    # Small first, for --quick.
    "1,000 tensors of 256": lambda: [(256,)] * 1000,
    "YOLOv8n": yolo_v8n,
    "EfficientNet-B0": efficientnet_b0,
    "ResNet-50": resnet50,
    "GPT-2 small": gpt2_small,
}


def falling(
    clip: Callable[..., object], parameters: list[nn.Parameter], gradients: list[Tensor], start: float, factor: float
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Clipping to a bound that falls by `factor` at every call, so that each clips again what the last one left, and what begins anew."""
    bound = [start]

    def step() -> None:
        bound[0] *= factor
        clip(parameters, bound[0])

    def refill() -> None:
        bound[0] = start
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad.copy_(gradient)

    return step, refill


def case(model: str, clips: bool) -> Case:
    shapes = MODELS[model]()
    name = f"{model}, {'clipping' if clips else 'not clipping'}"
    gradients = [torch.randn(shape) for shape in shapes]
    norm = sum(torch.linalg.vector_norm(gradient, dtype=torch.float64).square() for gradient in gradients).sqrt().item()
    clip_functions = {
        "eager": torch.nn.utils.clip_grad_norm_,
        "torch, foreach=False": partial(torch.nn.utils.clip_grad_norm_, foreach=False),
        "gradkernels": gk.clip_grad_norm_,
    }
    providers, prepare = {}, {}
    for provider, clip in clip_functions.items():
        parameters = [nn.Parameter(torch.empty(0).expand(0)) for _ in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.data = gradient
            parameter.grad = gradient.clone()
        start, factor = (norm, 0.99) if clips else (2 * norm, 1.0)
        providers[provider], prepare[provider] = falling(clip, parameters, gradients, start, factor)

    def answer(clip: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        parameters = [nn.Parameter(gradient.to(dtype, copy=True)) for gradient in gradients]
        for parameter in parameters:
            parameter.grad = parameter.detach()
        total = clip(parameters, 0.5 * norm if clips else 2 * norm)
        # Of GPT-2's largest tensor alone float64 would fill 300 MB again and again.
        ends = (torch.cat([grad[:PROVED], grad[-PROVED:]]) for grad in (parameter.grad.flatten() for parameter in parameters))
        return {"total norm": total, **{f"gradient {i}": grad for i, grad in enumerate(ends)}}

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


def clamping_case(model: str) -> Case:
    """clip_grad_value_ with a bound that falls from call to call, so that there is always something beyond it."""
    shapes = MODELS[model]()
    drawn = values_like(shapes)
    clip_functions = {"eager": torch.nn.utils.clip_grad_value_, "gradkernels": gk.clip_grad_value_}
    providers, prepare = {}, {}
    for provider, clip in clip_functions.items():
        parameters = parameters_like(*drawn)
        providers[provider], prepare[provider] = falling(clip, parameters, drawn[1], 2.0, 0.999)

    def answer(clip: Callable[..., None], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        parameters = parameters_like(*values_like(PROVED_SHAPES), dtype)
        clip(parameters, 1.0)
        return {f"gradient {i}": parameter.grad for i, parameter in enumerate(parameters)}

    total_bytes = 4 * elements(shapes)
    return Case(
        name=f"{model}, clip_grad_value_",
        providers=providers,
        prepare=prepare,
        bytes=2 * total_bytes,
        copied=total_bytes,
        prove=lambda: prove(
            model, answer(gk.clip_grad_value_), *(answer(clip_functions["eager"], each) for each in (torch.float32, torch.float64))
        ),
        direction="in place",
        layout=f"{len(shapes)} tensors",
        outputs="none",
    )


def report_of(grads: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What gk.grad_report finds, as one writes it with torch."""
    return (
        torch.stack([torch.linalg.vector_norm(grad) for grad in grads]),
        torch.stack([grad.abs().max() for grad in grads]),
        torch.stack([(~grad.isfinite()).sum() for grad in grads]),
        torch.nn.utils.get_total_norm(grads),
    )


def report_case(model: str) -> Case:
    shapes = MODELS[model]()
    parameters = parameters_like(*values_like(shapes))
    grads = [parameter.grad for parameter in parameters]

    def check() -> None:
        few = parameters_like(*values_like(PROVED_SHAPES))
        grads = [parameter.grad for parameter in few]
        report = gk.grad_report(few)
        names = ("norms", "max_abs", "nonfinite", "total_norm")
        answers = ([getattr(report, name) for name in names], report_of(grads), reference.grad_norms(grads))
        prove(f"{model}, grad_report", *({name: each.double() for name, each in zip(names, answer, strict=True)} for answer in answers))

    total_bytes = 4 * elements(shapes)
    return Case(
        name=f"{model}, grad_report",
        providers={"eager": partial(report_of, grads), "gradkernels": partial(gk.grad_report, parameters)},
        bytes=total_bytes,
        copied=total_bytes,
        prove=check,
        direction="in place",
        layout=f"{len(shapes)} tensors",
        outputs="none",
    )


def values_like(shapes: Shapes) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and gradients, the same ones at every call."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(elements(shapes), generator=generator)
    sizes = [torch.Size(shape).numel() for shape in shapes]
    values = [each.view(shape) for each, shape in zip(flat.split(sizes), shapes, strict=True)]
    # Not the parameters themselves, and as good as independent of them.
    return values, [each.view(shape) for each, shape in zip(flat.roll(1).split(sizes), shapes, strict=True)]


def parameters_like(values: list[Tensor], grads: list[Tensor], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    parameters = []
    for value, grad in zip(values, grads, strict=True):
        parameters.append(nn.Parameter(value.clone().to(dtype)))
        parameters[-1].grad = grad.clone().to(dtype)
    return parameters


FOREACH = "torch, foreach=True"
# What makes, of some parameters, the step that is measured.
Stepper = Callable[[list[nn.Parameter]], Callable[[], None]]


def after(step: Stepper, shapes: Shapes, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The parameters after one step."""
    parameters = parameters_like(*values_like(shapes), dtype)
    step(parameters)()
    return {f"parameter {i}": parameter.detach() for i, parameter in enumerate(parameters)}


def step_case(model: str, name: str, steps: dict[str, Stepper], passes: int) -> Case:
    """passes: how many times the bytes of all gradients have to be moved."""
    shapes = MODELS[model]()
    drawn = values_like(shapes)
    total_bytes = 4 * elements(shapes)
    return Case(
        name=f"{model}, {name}",
        providers={provider: make(parameters_like(*drawn)) for provider, make in steps.items()},
        bytes=passes * total_bytes,
        copied=total_bytes,
        prove=lambda: prove(
            name,
            after(steps["gradkernels"], PROVED_SHAPES),
            after(steps["eager"], PROVED_SHAPES),
            after(steps["eager"], PROVED_SHAPES, torch.float64),
        ),
        direction="in place",
        layout=f"{len(shapes)} tensors",
        outputs="none",
    )


def rmsprop(parameters: list[nn.Parameter], provider: str, max_norm: float | None) -> Callable[[], None]:
    if provider == "gradkernels":
        return gk.optim.RMSprop(parameters, max_norm=max_norm).step
    optimizer = torch.optim.RMSprop(parameters, foreach=True if provider == FOREACH else None)

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


def rmsprop_case(model: str, clips: bool) -> Case:
    steps = {
        provider: partial(rmsprop, provider=provider, max_norm=1.0 if clips else None) for provider in ("eager", FOREACH, "gradkernels")
    }
    return step_case(model, "RMSprop with max_norm" if clips else "RMSprop", steps, 6 if clips else 5)


def adamw_case(model: str) -> Case:
    """Beside eager, what attached clipping is to cost no more than: the norm alone and torch's fused step."""
    providers = ("eager", "norm, then step", "gradkernels")
    return step_case(model, "AdamW with clipping", {provider: partial(adamw, provider=provider) for provider in providers}, 9)


if __name__ == "__main__":
    options = arguments(__doc__)
    cases = [partial(case, model, clips) for model in MODELS for clips in (False, True)]
    for model in ("1,000 tensors of 256", "YOLOv8n", "ResNet-50"):
        cases += [partial(clamping_case, model), partial(report_case, model)]
    for model in MODELS:
        cases += [partial(rmsprop_case, model, False), partial(rmsprop_case, model, True), partial(adamw_case, model)]
    # What the largest take beyond their share of time, the small ones make up for.
    run("clipping and optimizers, float32", cases if options.quick else cases[::-1], options)
