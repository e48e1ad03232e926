"""How much of real models convert fuses, and how exact the converted models are: python tests/real_models.py [PART OF A NAME]

The models are those of tests/models/catalogue.py whose library is installed and that have at most MOST_PARAMETERS.

A training step of the unconverted model shows the pairs of norm and activation that one kernel can compute, and a step of the
converted model those that one kernel does compute (tests/fused_pairs.py). Both steps are in float64. Their difference is relative to the
largest value of the tensor, or to FLOOR times that of all outputs, gradients or statistics: some gradients are zero but for rounding.
"""

import argparse
import collections
import copy
import math
import sys
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

from harness import gk, header, text_of, write

# isort: split
from fused_pairs import UNNAMED, Fused, Pairs, tensors_in
from models.catalogue import every_model

MOST_PARAMETERS, BOUND, FLOOR, LEAST_SHARE = 30_000_000, 1e-9, 1e-4, 0.9


def step(model, x, mode):
    """Outputs, gradients and running statistics of one step of training, by name."""
    torch.manual_seed(0)
    with mode:
        outputs = tensors_in(model(x.clone()))
    roots = [each for each in outputs if each.requires_grad]
    torch.manual_seed(0)
    # Below a batch norm the gradient of a plain sum is zero.
    torch.autograd.backward(roots, [torch.randn_like(each) for each in roots])
    grads = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {"output": dict(enumerate(outputs)), "gradient of": grads, "statistic": dict(model.named_buffers())}


def largest_difference(before, after):
    worst = (0.0, "")
    for kind, tensors in before.items():
        tensors = {name: each.detach() for name, each in tensors.items() if each.is_floating_point() and each.numel()}
        largest = {name: each.abs().max().item() for name, each in tensors.items()}
        for name, each in tensors.items():
            scale = max(largest[name], FLOOR * max(largest.values())) or 1.0
            difference = (after[kind][name].detach() - each).abs().max().item() / scale
            worst = max(worst, (math.inf if math.isnan(difference) else difference, f"{kind} {name}"))
    return worst


def measured(build, make_input):
    """The figures of a model; None if it has too many parameters."""
    torch.manual_seed(0)
    model, x = build().double().train(), make_input().double()
    parameters = sum(each.numel() for each in model.parameters())
    if parameters > MOST_PARAMETERS:
        return None
    original = copy.deepcopy(model)
    began = time.process_time()
    try:
        report = gk.convert(model)
        seconds = time.process_time() - began
        seen, fused, left = Pairs(original), Fused(model), collections.Counter()
        before, after = step(original, x, seen), step(model, x, fused)
    finally:
        # Models of ultralytics share one activation, whose class conversion has changed.
        gk.revert(model)
    pairs = seen.found(before["output"].values())
    for act, names in pairs:
        call = next(((act, name) for name in (*names, UNNAMED) if fused.calls[act, name]), None)
        if call:
            fused.calls[call] -= 1
        else:
            rows = [row for row in report.rows if row.name in names]
            whys = {row.why or ("reported as fused, but calls take another way" if row.is_fused else "without a reason") for row in rows}
            left[" / ".join(sorted(whys)) or "not in the report"] += 1
    # What is fused and is no pair, the judge does not see.
    counts = {"pairs": len(pairs), "fused": len(pairs) - left.total(), "others fused": fused.calls.total()}
    return counts | {"convert, CPU s": seconds, "difference": largest_difference(before, after), "left": left}


def share(figures):
    return f"{figures['fused'] / figures['pairs']:.1%}" if figures["pairs"] else ""


def row(library, name, found):
    difference, where = found["difference"]
    left = "; ".join(f"{count} x {why}" for why, count in found["left"].most_common())
    texts = {"difference": f"{difference:.1e}, {where}", "share": share(found), "left": left}
    texts["convert, CPU s"] = f"{found['convert, CPU s']:.2f}"
    return {"library": library, "model": name, **{name: str(figure) for name, figure in (found | texts).items()}}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition(": python")[0])
    parser.add_argument("part", nargs="?", default="", help="only the models whose library and name contain it")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write FOLDER/<machine>/real_models.json as well")
    options = parser.parse_args()
    figures, failed, totals = [], [], collections.Counter()
    for library, name, build, make_input in every_model():
        if not find_spec(library) or options.part not in f"{library} {name}":
            continue
        try:
            found = measured(build, make_input)
        except Exception as error:
            failed.append(f"{library} {name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            print(failed[-1], file=sys.stderr, flush=True)
            continue
        if found:
            figures.append(row(library, name, found))
            print(*figures[-1].values(), sep=", ", file=sys.stderr, flush=True)
            totals += collections.Counter(models=1, pairs=found["pairs"], fused=found["fused"])
            if not found["difference"][0] < BOUND:
                failed.append(f"{library} {name} differs by {found['difference']}")
    versions = {library: metadata.version(library) for library in dict.fromkeys(figure["library"] for figure in figures)}
    head = header(False) | {"script": "tests/real_models.py"} | versions | totals | {"share": share(totals)}
    part = {"title": "models of libraries, converted", "header": head, "rows": figures}
    write("real_models", part, options.out)
    print(text_of("real_models", part))
    for each in figures:
        if each["share"] and float(each["share"].rstrip("%")) < 100 * LEAST_SHARE:
            print(f"below {LEAST_SHARE:.0%}: {each['library']} {each['model']}, {each['fused']} of {each['pairs']}: {each['left']}")
    print("failed:", "; ".join(failed) or "nothing")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
