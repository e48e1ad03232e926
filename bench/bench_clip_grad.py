"""clip_grad_norm_ on the gradients of real models, when they are short enough and when they are not, beside torch's.

Least traffic, G = bytes of all gradients: 1G when nothing is clipped, 3G when everything is scaled. torch always moves 3G.
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
        outputs="warm",
        prepare=prepare,
    )


if __name__ == "__main__":
    options = arguments(__doc__)
    run("clip_grad_norm_, float32", [partial(case, model, clips) for model in MODELS for clips in (False, True)], options)
