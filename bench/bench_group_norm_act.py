"""Group norm + activation, and of volumes instance norm: gk.GroupNormAct and gk.InstanceNormAct3d compared with act(norm(x)) of torch.nn.

Least traffic as in bench_batch_norm_act.py, which has the case. The last shapes are near the limits of the kernels.
"""

from functools import partial

import torch

from bench_batch_norm_act import LAST, case
from harness import arguments, run

DIFFUSION = tuple((shape, "swish", 32) for shape in ((2, 320, 64, 64), (2, 640, 32, 32), (2, 1280, 16, 16)))
VOLUMES = (((2, 32, 64, 64, 64), "leaky_relu", 32), ((1, 64, 32, 48, 48), "leaky_relu", 64))
DETECTION = (((2, 256, 100, 152), "relu", 32),)
MORE = (((8, 512, 7, 7), "relu", 32), ((3, 48, 37, 41), "elu", 6), ((64, 96, 14, 14), "swish", 1))

if __name__ == "__main__":
    options = arguments(__doc__)
    settings = [{"dtype": dtype} | layout for dtype in (torch.float32, torch.bfloat16) for layout in ({}, LAST)]
    cases = [
        partial(case, shape, act, groups=groups, with_compiler=True, **each)
        for each in settings
        for shape, act, groups in (*DIFFUSION, *VOLUMES, *DETECTION)
    ]
    cases += [partial(case, shape, act, groups=groups, **each) for each in settings[:2] for shape, act, groups in MORE]
    cases += [
        partial(case, shape, act, groups=groups, residual=True, **each) for each in settings[:2] for shape, act, groups in DIFFUSION[:1]
    ]
    if options.quick:
        cases = [partial(case, MORE[1][0], "elu", groups=6)]
    run("group norm + activation", cases, options)
