"""Training batch norm + GELU, Hardswish or Mish, and frozen batch norm + ReLU (torchvision's formula), compared with torch, on one thread.

Least traffic as in bench_batch_norm_act.py, which has the case; frozen batch norm reads no x in backward. The last shapes are drawn anew in
each run; the header has their seed.
"""

import random
from functools import partial

import torch

from bench_batch_norm_act import LAST, MORE_ACTS, case, drawn
from harness import arguments, header, run

SHAPES = ((32, 64, 56, 56), (32, 1024, 14, 14), (32, 2048, 7, 7), (16, 144, 56, 56), (12, 192, 33, 33), (24, 80, 48, 48), (6, 17, 150, 150))
LAYOUTS = ({}, LAST)

if __name__ == "__main__":
    options, seed = arguments(__doc__), random.randrange(1000)
    torch.set_num_threads(1)
    chosen = [(shape, layout) for layout in LAYOUTS for shape in SHAPES]
    chosen += [(shape, LAYOUTS["layout" in settings]) for shape, _, settings in drawn(random.Random(seed), 4)]
    if options.quick:
        chosen = [((4, 8, 5, 5), {})]
    cases = [partial(case, shape, act, **layout) for act in MORE_ACTS for shape, layout in chosen]
    cases += [partial(case, shape, "relu", frozen=True, residual=each, **layout) for shape, layout in chosen for each in (False, True)]
    head = header(options.quick) | {"seed of the drawn cases": seed}
    run("batch norm + less usual activations, and frozen batch norm", cases, options, head)
