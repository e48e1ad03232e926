"""What a call takes with the native library, with the portable one and with torch: the table of docs/design/wheels.md.

    PYTHONPATH=. python tests/time_libraries.py

The libraries take turns on one thread. A figure is the least of the turns, in microseconds of CPU time, so that it
depends little on what else the machine does.
"""

import time

import torch
from torch import nn
from torch.nn import functional as F

import gradkernels as gk
from gradkernels import _native

SIZES = {"16 elements": 16, "64 KiB": 1 << 14, "4 MiB": 1 << 20}
ROUNDS = 40
SECONDS_OF_A_TURN = 0.005


def calls_of(size):
    """name -> (our call, torch's call), in float32."""
    x = torch.randn(size, requires_grad=True)
    grad_y = torch.randn(size)
    channels = min(64, size // 4)
    image = torch.randn(4, channels, size // 4 // channels, requires_grad=True)
    ours, torchs = gk.BatchNormAct1d(channels, act="relu"), nn.BatchNorm1d(channels)
    grad_image = torch.randn_like(image)
    parameter = nn.Parameter(torch.randn(size))
    parameter.grad = torch.randn(size)
    optimizer, torch_optimizer = gk.optim.RMSprop([parameter], lr=1e-6), torch.optim.RMSprop([parameter], lr=1e-6)
    bound = 1e9
    return {
        "`leaky_relu`, forward": (lambda: gk.leaky_relu(grad_y), lambda: F.leaky_relu(grad_y)),
        "`leaky_relu`, forward and backward": (lambda: gk.leaky_relu(x).backward(grad_y), lambda: F.leaky_relu(x).backward(grad_y)),
        "`swish`, forward and backward": (lambda: gk.swish(x).backward(grad_y), lambda: F.silu(x).backward(grad_y)),
        "`batch_norm_act`, forward and backward": (
            lambda: ours(image).backward(grad_image),
            lambda: F.relu(torchs(image)).backward(grad_image),
        ),
        "`clip_grad_norm_`": (lambda: gk.clip_grad_norm_(parameter, bound), lambda: nn.utils.clip_grad_norm_(parameter, bound)),
        "`optim.RMSprop`": (optimizer.step, torch_optimizer.step),
    }


def calls_of_group_norm():
    """A sample of a diffusion U-Net."""
    image = torch.randn(2, 320, 64, 64, requires_grad=True)
    grad_image = torch.randn_like(image)
    ours, torchs = gk.GroupNormAct(32, 320, act="swish"), nn.GroupNorm(32, 320)
    name = "`group_norm_act`, forward and backward"
    return {name: (lambda: ours(image).backward(grad_image), lambda: F.silu(torchs(image)).backward(grad_image))}


def calls_of_many(count=1000):
    parameters = [nn.Parameter(torch.randn(16)) for _ in range(count)]
    for parameter in parameters:
        parameter.grad = torch.randn(16)
    optimizer, torch_optimizer = gk.optim.RMSprop(parameters, lr=1e-6), torch.optim.RMSprop(parameters, lr=1e-6)
    return {
        "`clip_grad_norm_`": (lambda: gk.clip_grad_norm_(parameters, 1e9), lambda: nn.utils.clip_grad_norm_(parameters, 1e9)),
        "`clip_grad_value_`": (lambda: gk.clip_grad_value_(parameters, 1e4), lambda: nn.utils.clip_grad_value_(parameters, 1e4)),
        "`optim.RMSprop`": (optimizer.step, torch_optimizer.step),
    }


def microseconds(call, count):
    begin = time.process_time()
    for _ in range(count):
        call()
    return (time.process_time() - begin) / count * 1e6


def use(library):
    _native.C, _native.PORTABLE = library


def row(name, ours, torchs, libraries):
    """Markdown: the figures, and how many times as long the portable library takes as the native one."""
    turns = {kind: [] for kind in (*libraries, "torch")}
    count = max(1, int(SECONDS_OF_A_TURN * 1e6 / microseconds(torchs, 3)))
    for _ in range(ROUNDS):
        for kind, library in libraries.items():
            use(library)
            ours()
            turns[kind].append(microseconds(ours, count))
        turns["torch"].append(microseconds(torchs, count))
    native, portable, torch_time = (min(turns[kind]) for kind in ("native", "portable", "torch"))
    return f"| {name} | {native:.3g} | {portable:.3g} | {portable / native:.2f} | {torch_time:.3g} |"


def main():
    libraries = {"native": (_native.C, None), "portable": (None, _native.load_portable()[0])}
    assert libraries["native"][0] and libraries["portable"][1], "build both libraries: make build"
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {_native.C.instruction_set()}")
    print("| | native | portable | times as long | torch |\n|---|---|---|---|---|")
    groups = [(size, calls_of(count)) for size, count in SIZES.items()]
    groups += [("(2, 320, 64, 64)", calls_of_group_norm()), ("1,000 tensors of 16 elements", calls_of_many())]
    for size, calls in groups:
        for name, (ours, torchs) in calls.items():
            print(row(f"{size}: {name}", ours, torchs, libraries), flush=True)


if __name__ == "__main__":
    main()
