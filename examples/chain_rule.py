"""What the chain rule does to a gradient, without training: a chain of sigmoids, a product of matrices.

Backward is compared with a formula, with float64, and with the difference of two losses.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradkernels as gk
from examples.experiment import Digits, Results, Setting, check, new_figure, new_table
from gradkernels.diagnosis.plots import BAD, GOOD, INK, PALE

# Sigmoid

LARGEST_SLOPE = 0.25
DEPTHS = range(1, 21)


def slope(y: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(y.sum(), x, retain_graph=True)[0]


def sigmoid(setting: Setting) -> Results:
    x = (torch.arange(-800, 801, dtype=torch.float64) / 100).requires_grad_()
    y, chained = x, []
    for _ in setting.track(DEPTHS):
        y = y.sigmoid()
        chained.append(slope(y, x).max().item())
    of_sigmoid = slope(x.sigmoid(), x)
    cures = {"Leaky ReLU": slope(gk.leaky_relu(x), x), "ELU": slope(gk.elu(x), x), "Swish": slope(gk.swish(x), x)}
    x = x.detach()
    shown = (-8, -4, -2, 0, 2, 4, 8)
    rows = {"sigmoid": x.sigmoid(), "d sigmoid / dx": of_sigmoid} | {f"d {name} / dx": values for name, values in cures.items()}
    yield new_table(
        "The gradient of sigmoid and of three activations that replace it",
        ("x", *map(str, shown)),
        ([name, *(f"{values[x == point].item():.3f}" for point in shown)] for name, values in rows.items()),
    )
    peak, at = of_sigmoid.max().item(), x[of_sigmoid.argmax()].item()
    check((peak, at) == (LARGEST_SLOPE, 0), f"expected the largest gradient of sigmoid to be {LARGEST_SLOPE} at 0; it is {peak} at {at}")
    error = (of_sigmoid - x.sigmoid() * (1 - x.sigmoid())).abs().max().item()
    check(error < 1e-15, f"expected backward of sigmoid to be y (1 - y); the difference is {error:.1e}")
    for depth, largest in zip(DEPTHS, chained, strict=True):
        limit = LARGEST_SLOPE**depth
        check(largest <= limit, f"expected a gradient of at most {limit:.1e} through {depth} sigmoids; it is {largest:.1e}")
    for name, values in cures.items():
        least = values[x >= 1].min().item()
        check(least > 0.9, f"expected the gradient of {name} to be near 1 for x >= 1; it falls to {least:.2g}")

    figure, (left, right) = new_figure(
        ("The gradient of sigmoid is at most 0.25;\nits replacements reach 1 for x > 0", "x", "gradient of the activation"),
        ("In a chain these factors multiply:\nthe gradient vanishes", "activations in the chain, n", "largest gradient for x in [-8, 8]"),
    )
    left.axhline(LARGEST_SLOPE, color=BAD, linestyle=":", linewidth=1)
    left.text(-7.9, LARGEST_SLOPE + 0.02, "limit 0.25", color=BAD)
    for (name, values), style in zip(cures.items(), ("--", "-", "-."), strict=True):
        left.plot(x, values, color=GOOD, linestyle=style, linewidth=1.4, label=name)
    left.plot(x, of_sigmoid, color=BAD, linewidth=2.2, label="sigmoid")
    left.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.0, 0.95))
    right.plot(DEPTHS, [LARGEST_SLOPE**depth for depth in DEPTHS], color=BAD, linestyle=":", linewidth=1)
    right.plot(DEPTHS, chained, "o-", color=BAD, markersize=4)
    right.axhline(1, color=GOOD)
    right.text(20, 2, "ReLU, Leaky ReLU, ELU for x > 0", color=GOOD, ha="right", va="bottom")
    right.text(12.2, LARGEST_SLOPE**11, "limit 0.25$^n$", color=BAD)
    right.text(1, chained[15], f"10 sigmoids pass on\n{chained[9]:.0e} of the gradient", color=BAD)
    right.set_yscale("log")
    right.set_ylim(top=1e3)
    right.set_xticks([1, 5, 10, 15, 20])
    yield figure


# A product of matrices

MATRICES, SIZE = 100, 4


def multiply(generator: torch.Generator) -> tuple[list[float], Tensor, dict[str, tuple[float, Tensor]]]:
    """Multiplies random matrices; the gradients are those of the sum of the product.

    Returns the largest element of the product of the first n matrices, for each n; the gradients in float64;
    and for each library the norm that clipping returned, and the clipped gradients.
    """
    factors = [torch.randn(SIZE, SIZE, generator=generator).requires_grad_() for _ in range(MATRICES)]
    product, largest = torch.eye(SIZE), []
    for factor in factors:
        product = product @ factor
        largest.append(product.abs().max().item())
    gradients, clipped = torch.autograd.grad(product.sum(), factors), {}
    for library, clip_grad_norm_ in (("gradkernels", gk.clip_grad_norm_), ("torch.nn", nn.utils.clip_grad_norm_)):
        for factor, gradient in zip(factors, gradients, strict=True):
            factor.grad = gradient.clone()
        norm = clip_grad_norm_(factors, max_norm=1.0).item()
        clipped[library] = norm, torch.stack([factor.grad for factor in factors if factor.grad is not None]).double()
    return largest, torch.stack(gradients).double(), clipped


def matrices(setting: Setting) -> Results:
    largest, gradients, clipped = multiply(torch.Generator().manual_seed(setting.seed))
    exact, (norm, ours), (torch_norm, _) = gradients.norm().item(), clipped["gradkernels"], clipped["torch.nn"]
    rows = {"float64": (exact, gradients / exact)} | clipped
    yield new_table(
        f"The gradients of a product of {MATRICES} random {SIZE} x {SIZE} matrices, float32, clipped to norm 1",
        ("", "total norm", "after clipping", "largest element"),
        ([name, f"{before:.3g}", f"{after.norm():.3g}", f"{after.abs().max():.2g}"] for name, (before, after) in rows.items()),
    )
    check(largest[-1] > 1e12, f"expected a product of {MATRICES} matrices to explode; its largest element is {largest[-1]:.1e}")
    check(abs(norm / exact - 1) < 1e-6, f"expected gradkernels' norm to be that of float64, {exact:.6e}; it is {norm:.6e}")
    check(abs(ours.norm().item() - 1) < 1e-5, f"expected the clipped gradients to have norm 1; they have {ours.norm():.3g}")
    error = (ours - gradients / exact).abs().max().item()
    check(error < 1e-6, f"expected the clipped gradients to keep their direction; the largest error of an element is {error:.1e}")

    figure, (left, right) = new_figure(
        (f"A product of {MATRICES} random\n{SIZE} x {SIZE} matrices explodes", "matrices multiplied", "largest element of the product"),
        ("So do its gradients.\nClipping keeps their direction", "matrix", "norm of the gradient"),
    )
    left.plot(range(1, MATRICES + 1), largest, color=BAD)
    left.annotate(f"{largest[-1]:.0e}", (MATRICES, largest[-1]), (-12, 0), textcoords="offset points", color=BAD, ha="right")
    for values, colour, label in ((gradients, BAD, "not clipped"), (ours, GOOD, "clipped by gradkernels")):
        norms = values.flatten(1).norm(dim=1)
        right.plot(range(1, MATRICES + 1), norms, color=colour)
        right.text(0, norms.max().item() * 30, f"{label}: total norm {values.norm():.2g}", color=colour)
    right.set_ylim(1e-6, exact * 1e7)
    if math.isinf(torch_norm):
        right.text(0, 1e11, "torch.nn squares in float32: its norm\nis inf, and its clipped gradients are 0", color=INK, va="center")
    for axes in (left, right):
        axes.set_yscale("log")
    yield figure


# The numeric gradient

STEPS = tuple(10 ** (-exponent / 2) for exponent in range(2, 25))
CHECKED_PARAMETERS = 60


def numeric_errors(data: Digits, seed: int, dtype: torch.dtype) -> list[float]:
    """|numeric - backward| / |backward| over the checked parameters, for each h of STEPS.

    The activations have no corner: at a corner the difference and the derivative disagree.
    """
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 16, bias=False), gk.BatchNormAct1d(16, act="elu"), nn.Linear(16, 16), gk.Swish(), nn.Linear(16, 10))
    gk.init.apply_(model, generator=generator)
    x, target = data.first_batch(seed)
    x, parameters = x.to(dtype), list(model.to(dtype).parameters())
    w = nn.utils.parameters_to_vector(parameters).detach()
    backward = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(F.cross_entropy(model(x), target), parameters)])
    checked = torch.randperm(len(w), generator=generator)[:CHECKED_PARAMETERS]

    def loss_at(index: int, shift: float) -> float:
        shifted = w.clone()
        shifted[index] += shift
        nn.utils.vector_to_parameters(shifted, parameters)
        return F.cross_entropy(model(x), target).item()

    errors = []
    with torch.no_grad():
        for h in STEPS:
            numeric = torch.tensor([(loss_at(index, h) - loss_at(index, -h)) / (2 * h) for index in checked.tolist()], dtype=dtype)
            errors.append(((numeric - backward[checked]).norm() / backward[checked].norm()).item())
    return errors


def numeric(setting: Setting) -> Results:
    dtypes = {"float64": torch.float64, "float32": torch.float32}
    errors = {name: numeric_errors(setting.data, setting.seed, dtypes[name]) for name in setting.track([*dtypes])}
    yield new_table(
        "The numeric gradient compared with backward: relative difference",
        ("h", *(f"{h:.0e}" for h in STEPS[::4])),
        ([name, *(f"{error:.1e}" for error in values[::4])] for name, values in errors.items()),
    )
    float64, least = errors["float64"], min(errors["float64"])
    check(least < 1e-8, f"expected the numeric gradient and backward to agree to 8 digits in float64; the best h leaves {least:.1e}")
    # The error of a central difference falls with h^2, that is 100-fold in two elements of STEPS.
    fall = float64[0] / float64[4]
    check(2e3 < fall < 5e4, f"expected the numeric error to fall 10,000-fold from h = 0.1 to 0.001; it fell {fall:.0f}-fold")
    rise = float64[-1] / least
    check(rise > 100, f"expected rounding to spoil the numeric gradient at h = {STEPS[-1]:.0e}; its error is {rise:.0f} times the best")

    title = "The numeric gradient (f(w + h) - f(w - h)) / 2h is best for a medium h"
    figure, (axes,) = new_figure((title, "h, decreasing", "relative difference from backward"))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.invert_xaxis()
    for (name, values), colour, corner in zip(errors.items(), (GOOD, BAD), ((0.36, 0.03), (0.03, 0.8)), strict=True):
        best, h = min(zip(values, STEPS, strict=True))
        axes.plot(STEPS, values, color=colour)
        axes.plot(h, best, "o", color=colour)
        axes.text(*corner, f"{name}: best at h = {h:.0e},\n{best:.0e} from backward", color=colour, transform=axes.transAxes)
    axes.set_ylim(bottom=least / 300, top=max(errors["float32"]) * 30)
    axes.text(0.03, 0.03, "large h: the error of the\ndifference falls as h²", color=PALE, transform=axes.transAxes)
    axes.text(0.97, 0.3, "small h: the rounding\nerror grows as 1 / h", color=PALE, transform=axes.transAxes, ha="right")
    yield figure
