"""What the chain rule does to a gradient, without training: the ceiling of sigmoid, a product of matrices, the numeric gradient.

Each is computed by backward and held against what is known otherwise: a formula, float64, or the difference of two losses.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import gradkernels as gk
from examples.harness import Digits, Report, Setting, require
from examples.telling import new_figure, new_table
from gradkernels.diagnosis.plots import BAD, GOOD, INK, PALE, dress

# Sigmoid

CEILING = 0.25
DEPTHS = range(1, 21)


class Slopes(NamedTuple):
    """Gradients over x, float64 [1601]; chained is the largest of them after 1 to 20 sigmoids."""

    x: Tensor
    sigmoid: Tensor
    cures: dict[str, Tensor]
    chained: list[float]


def slope(y: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(y.sum(), x, retain_graph=True)[0]


def slopes() -> Slopes:
    x = (torch.arange(-800, 801, dtype=torch.float64) / 100).requires_grad_()
    y, chained = x, []
    for _ in DEPTHS:
        y = y.sigmoid()
        chained.append(slope(y, x).max().item())
    cures = {"Leaky ReLU": slope(gk.leaky_relu(x), x), "ELU": slope(gk.elu(x), x), "Swish": slope(gk.swish(x), x)}
    return Slopes(x.detach(), slope(x.sigmoid(), x), cures, chained)


def sigmoid(setting: Setting) -> Report:
    setting.begin("the gradient of sigmoid", 1)()
    found = slopes()
    shown = (-8, -4, -2, 0, 2, 4, 8)
    rows = [(x, int((found.x - x).abs().argmin())) for x in shown]
    yield new_table(
        "The gradient of sigmoid, and of what cures it",
        ("x", *(str(x) for x in shown)),
        (
            [name, *(f"{values[place]:.3f}" for _, place in rows)]
            for name, values in {"sigmoid": found.x.sigmoid(), "its gradient": found.sigmoid, **found.cures}.items()
        ),
    )
    place = int(found.sigmoid.argmax())
    where, peak = found.x[place].item(), found.sigmoid[place].item()
    require(
        (where, peak) == (0, CEILING),
        f"the gradient of sigmoid was to be largest at 0, where it is {CEILING}, and is {peak:.4g} at {where:.2g}",
    )
    by_formula = found.x.sigmoid() * (1 - found.x.sigmoid())
    apart = (found.sigmoid - by_formula).abs().max().item()
    require(apart < 1e-15, f"backward of sigmoid was to be y (1 - y), and is {apart:.1e} from it")
    for depth, largest in zip(DEPTHS, found.chained, strict=True):
        ceiling = CEILING**depth
        require(
            largest <= ceiling, f"{depth} sigmoids in a chain were to have at most {ceiling:.1e} of the gradient, and have {largest:.1e}"
        )
    for name, gradient in found.cures.items():
        least = gradient[found.x >= 1].min().item()
        require(least > 0.9, f"the gradient of {name} was to be near 1 from x = 1 on, and falls to {least:.2g}")

    yield draw_slopes(found)


def draw_slopes(found: Slopes) -> Figure:
    figure = new_figure(12, 4.8)
    left, right = figure.subplots(1, 2)
    left.axhline(CEILING, color=BAD, linestyle=":", linewidth=1)
    left.text(-7.9, CEILING + 0.02, "ceiling 0.25", color=BAD)
    for (name, gradient), style in zip(found.cures.items(), ("--", "-", "-."), strict=True):
        left.plot(found.x, gradient, color=GOOD, linestyle=style, linewidth=1.4, label=name)
    left.plot(found.x, found.sigmoid, color=BAD, linewidth=2.2, label="sigmoid")
    left.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.0, 0.95))
    dress(
        left,
        "Sigmoid passes on a quarter of a gradient at best;\nthe cures pass on all of it where x > 0",
        "x",
        "gradient of the activation",
    )

    right.plot(DEPTHS, [CEILING**depth for depth in DEPTHS], color=BAD, linestyle=":", linewidth=1)
    right.plot(DEPTHS, found.chained, "o-", color=BAD, markersize=4)
    right.axhline(1, color=GOOD)
    right.text(20, 2, "ReLU and its leaky and exponential kin, x > 0", color=GOOD, ha="right", va="bottom")
    right.text(12.2, CEILING**11, "ceiling 0.25$^n$", color=BAD)
    right.annotate(
        f"10 sigmoids: {found.chained[9]:.0e}\nof the gradient",
        (10, found.chained[9]),
        (2, found.chained[14]),
        color=BAD,
        arrowprops={"arrowstyle": "-", "color": BAD},
    )
    right.set_yscale("log")
    right.set_ylim(top=1e3)
    right.set_xticks([1, 5, 10, 15, 20])
    dress(
        right,
        "In a chain the quarters multiply:\nthis is how gradients vanish",
        "activations in the chain, n",
        "largest gradient over x in [-8, 8]",
    )
    return figure


# A product of matrices

MATRICES, SIZE = 100, 4


class Product(NamedTuple):
    """largest: magnitude in the product of the first n matrices. Of the gradients of the sum of the product: their norms, and totals."""

    largest: list[float]
    norms: Tensor
    clipped: Tensor
    exact_total: float
    total: float
    torch_total: float
    torch_clipped: Tensor

    @property
    def clipped_total(self) -> float:
        return float(self.clipped.norm())


def norms_of(matrices: Tensor) -> Tensor:
    """In float64, where 1e25 can be squared."""
    norms: Tensor = matrices.double().flatten(1).norm(dim=1)
    return norms


def multiply(generator: torch.Generator) -> Product:
    factors = [torch.randn(SIZE, SIZE, generator=generator).requires_grad_() for _ in range(MATRICES)]
    product, largest = torch.eye(SIZE), []
    for factor in factors:
        product = product @ factor
        largest.append(product.abs().max().item())
    gradients = torch.stack(torch.autograd.grad(product.sum(), factors))

    def clipped_by(clip_grad_norm_: Callable[..., Tensor]) -> tuple[float, Tensor]:
        for factor, gradient in zip(factors, gradients, strict=True):
            factor.grad = gradient.clone()
        total = clip_grad_norm_(factors, max_norm=1.0).item()
        return total, torch.stack([factor.grad for factor in factors if factor.grad is not None])

    total, clipped = clipped_by(gk.clip_grad_norm_)
    torch_total, torch_clipped = clipped_by(nn.utils.clip_grad_norm_)
    norms = norms_of(gradients)
    exact = norms.norm().item()
    apart = (clipped.double() * exact - gradients.double()).abs().max().item() / gradients.abs().max().item()
    require(apart < 1e-6, f"clipped gradients were to point where they did, and are {apart:.1e} from it")
    return Product(largest, norms, norms_of(clipped), exact, total, torch_total, norms_of(torch_clipped))


def matrices(setting: Setting) -> Report:
    setting.begin("a product of matrices", 1)()
    found = multiply(setting.generator())
    yield new_table(
        f"The gradients of a product of {MATRICES} random {SIZE} x {SIZE} matrices, float32, clipped to norm 1",
        ("", "total norm", "after clipping", "largest gradient left"),
        (
            ["float64", f"{found.exact_total:.3g}", "1", ""],
            ["gradkernels", f"{found.total:.3g}", f"{found.clipped_total:.3g}", f"{found.clipped.max():.2g}"],
            ["torch.nn", f"{found.torch_total:.3g}", f"{found.torch_clipped.norm():.3g}", f"{found.torch_clipped.max():.2g}"],
        ),
    )
    require(
        found.largest[-1] > 1e12, f"a product of {MATRICES} matrices was to explode, and its largest element is {found.largest[-1]:.1e}"
    )
    apart = abs(found.total - found.exact_total) / found.exact_total
    require(apart < 1e-6, f"the norm of gradkernels was to be {found.exact_total:.6e}, as in float64, and is {found.total:.6e}")
    require(abs(found.clipped_total - 1) < 1e-5, f"gradients clipped to norm 1 were to have it, and have {found.clipped_total:.3g}")

    yield draw_product(found)


def draw_product(found: Product) -> Figure:
    figure = new_figure(12, 4.8)
    left, right = figure.subplots(1, 2)
    left.plot(range(1, MATRICES + 1), found.largest, color=BAD)
    left.set_yscale("log")
    left.text(85, found.largest[-1], f"{found.largest[-1]:.0e}", color=BAD, ha="right", va="center")
    dress(
        left, f"A product of {MATRICES} random {SIZE} x {SIZE} matrices explodes", "matrices multiplied", "largest element of the product"
    )

    right.plot(range(1, MATRICES + 1), found.norms, color=BAD)
    right.plot(range(1, MATRICES + 1), found.clipped, color=GOOD)
    right.set_yscale("log")
    right.set_ylim(1e-6, found.norms.max().item() * 1e7)
    right.text(0, found.norms.max().item() * 30, f"as they are: total norm {found.exact_total:.0e}", color=BAD)
    right.text(0, found.clipped.max().item() * 30, f"clipped by gradkernels: total norm {found.clipped_total:.3g}", color=GOOD)
    if not math.isfinite(found.torch_total):
        note = (
            f"torch.nn's clipping squares in float32, gets {found.torch_total:g}\nfor the norm, and leaves {found.torch_clipped.norm():.3g}"
        )
        right.text(0, 1e11, note, color=INK, va="center")
    dress(right, "So do the gradients; clipped, they keep their direction", "matrix", "norm of its gradient")
    return figure


# The numeric gradient

STEPS = tuple(10 ** (-exponent / 2) for exponent in range(2, 25))
CHECKED_PARAMETERS = 60


class NumericError(NamedTuple):
    """|numeric - backward| / |backward| over the checked parameters, for each h of STEPS, in float64 and in float32."""

    float64: list[float]
    float32: list[float]


def smooth_network(dtype: torch.dtype, generator: torch.Generator) -> nn.Sequential:
    """Activations without a corner, on either side of which a difference and a derivative disagree."""
    model = nn.Sequential(nn.Linear(64, 16, bias=False), gk.BatchNormAct1d(16, act="elu"), nn.Linear(16, 16), gk.Swish(), nn.Linear(16, 10))
    gk.init.apply_(model, generator=generator)
    return model.to(dtype)


def numeric_error(data: Digits, seed: int, dtype: torch.dtype) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    model = smooth_network(dtype, generator)
    x, target = next(data.batches(seed, epochs=1))
    x = x.to(dtype)

    def loss() -> Tensor:
        return F.cross_entropy(model(x), target)

    parameters = list(model.parameters())
    backward = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss(), parameters)])
    places = torch.randperm(len(backward), generator=generator)[:CHECKED_PARAMETERS]
    w = nn.utils.parameters_to_vector(parameters).detach()

    def loss_at(place: int, shift: float) -> float:
        shifted = w.clone()
        shifted[place] += shift
        nn.utils.vector_to_parameters(shifted, parameters)
        return loss().item()

    errors = []
    with torch.no_grad():
        for h in STEPS:
            numeric = torch.tensor([(loss_at(place, h) - loss_at(place, -h)) / (2 * h) for place in places.tolist()], dtype=dtype)
            errors.append(((numeric - backward[places]).norm() / backward[places].norm()).item())
    return errors


def numeric(setting: Setting) -> Report:
    setting.begin("the numeric gradient", 1)()
    found = NumericError(*(numeric_error(setting.data, setting.seed, dtype) for dtype in (torch.float64, torch.float32)))
    shown = range(0, len(STEPS), 4)
    yield new_table(
        "Numeric gradient against backward: relative distance",
        ("h", *(f"{STEPS[place]:.0e}" for place in shown)),
        ([name, *(f"{errors[place]:.1e}" for place in shown)] for name, errors in found._asdict().items()),
    )
    best = min(found.float64)
    require(best < 1e-8, f"numeric gradient and backward were to agree to 8 digits in float64, and the best h leaves {best:.1e}")
    # Two steps of STEPS are a factor of 10, in which the error of a central difference falls by 100.
    fall = found.float64[0] / found.float64[4]
    require(2e3 < fall < 5e4, f"from h = 0.1 to 0.001 the numeric gradient was to come nearer by 10,000, and came by {fall:.0f}")
    rise = found.float64[-1] / best
    require(rise > 100, f"at h = {STEPS[-1]:.0e} rounding was to spoil the numeric gradient, and it is {rise:.0f} times its best")

    yield draw_numeric(found)


def draw_numeric(found: NumericError) -> Figure:
    figure = new_figure(9, 4.8)
    axes = figure.subplots()
    axes.plot(STEPS, found.float32, color=BAD)
    axes.plot(STEPS, found.float64, color=GOOD)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.invert_xaxis()
    for name, errors, colour, corner in (("float64", found.float64, GOOD, (0.3, 0.04)), ("float32", found.float32, BAD, (0.03, 0.8))):
        least = min(range(len(errors)), key=lambda place: errors[place])
        axes.plot(STEPS[least], errors[least], "o", color=colour)
        label = f"{name}: best at h = {STEPS[least]:.0e},\n{errors[least]:.0e} from backward"
        axes.text(*corner, label, color=colour, transform=axes.transAxes)
    axes.set_ylim(bottom=min(found.float64) / 300, top=max(found.float32) * 30)
    axes.text(0.03, 0.3, "too long a step:\nthe error falls as h²", color=PALE, transform=axes.transAxes)
    axes.text(0.97, 0.3, "too short: rounding\nrises as 1 / h", color=PALE, transform=axes.transAxes, ha="right")
    dress(
        axes,
        "(f(w + h) - f(w - h)) / 2h agrees with backward, best between truncation and rounding",
        "h, ever shorter",
        "relative distance from backward",
    )
    return figure
