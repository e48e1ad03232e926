"""python -m examples: every experiment prints a table, writes a figure, and fails on an unexpected result."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import gradkernels as gk
from gradkernels import _native

try:
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from examples import chain_rule, clipping, cures, dying_relu, parity, simple_net, spikes
    from examples.experiment import Results, Setting, load
except ModuleNotFoundError as error:
    raise SystemExit(
        f"the demonstration needs more packages than gradkernels ({error}): pip install scikit-learn matplotlib rich"
    ) from error

EXPERIMENTS: dict[str, tuple[str, Callable[[Setting], Results]]] = {
    "sigmoid": ("the gradient of sigmoid is at most 0.25, and vanishes in a chain of sigmoids", chain_rule.sigmoid),
    "matrices": ("a product of 100 random matrices explodes; its gradients are clipped", chain_rule.matrices),
    "numeric": ("the numeric gradient (f(w + h) - f(w - h)) / 2h, compared with backward", chain_rule.numeric),
    "cures": ("a sigmoid network that learns nothing, and the cures one at a time", cures.run),
    "dying-relu": ("dead ReLU units, and Leaky ReLU, PReLU and RReLU, which revive them", dying_relu.run),
    "simple-net": ("784-300-100-10 with batch norm after ReLU and before it", simple_net.batch_norm_order),
    "deep-net": ("100-1000-1000-1000-1000-1 with and without gradient clipping", clipping.deep_net),
    "rnn": ("a recurrent network over 100 steps, with and without gradient clipping", clipping.rnn),
    "spikes": ("spoilt batches and one with nan: not clipped, clipped, and four policies", spikes.run),
    "parity": ("vanishing, exploding and a plain network, with torch.nn and with gradkernels", parity.run),
}


def _seed(written: str) -> int:
    seed = int(written)
    # scikit-learn splits the digits with it.
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError(f"{seed} is not between 0 and {2**32 - 1}")
    return seed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples",
        description="Experiments on vanishing and exploding gradients, with scikit-learn's handwritten digits:\n\n"
        + "\n".join(f"  {name:<10}  {about}" for name, (about, _) in EXPERIMENTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="the experiments to run (default: all)")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="demo.png (the default) writes pictures demo-NAME.png")
    parser.add_argument("--seed", type=_seed, default=0, help=f"of the split, the weights and the batches; 0 to {2**32 - 1} (default: 0)")
    parser.add_argument("--quick", action="store_true", help="train for fewer epochs")
    parser.add_argument("--mnist", type=Path, metavar="DIR", help=f"train on MNIST's four files in DIR. {simple_net.WHERE}")
    arguments = parser.parse_args(argv)
    unknown = sorted({*arguments.names} - {*EXPERIMENTS})
    if unknown:
        parser.error(f"there is no experiment {', '.join(unknown)}. The experiments are {', '.join(EXPERIMENTS)}")
    if not arguments.output.parent.is_dir():
        parser.error(f"there is no folder {arguments.output.parent}")
    if arguments.output.is_dir():
        parser.error(f"--output {arguments.output} is a folder: name a file in it, such as {arguments.output / 'demo.png'}")
    if _native.C is None:
        raise SystemExit(
            f"the demonstration failed: the native library is not in use, {_native.reason}. To fix this, run: {_native.remedy}"
        )
    names = arguments.names or ([] if arguments.mnist else EXPERIMENTS)
    chosen = {name: run for name, (_, run) in EXPERIMENTS.items() if name in names}
    if arguments.mnist:
        chosen["mnist"] = partial(simple_net.mnist, simple_net.read_mnist(arguments.mnist))

    torch.set_num_threads(1)  # layers this small gain nothing from a second thread
    console, data = Console(), load(arguments.seed)
    console.print(f"gradkernels {gk.__version__}, {_native.C.instruction_set()}, torch {torch.__version__}", soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("")
        for number, (name, run) in enumerate(chosen.items(), start=1):
            show_progress = partial(progress.update, task, description=f"{number} of {len(chosen)}: {name}")
            for result in run(Setting(data, arguments.seed, arguments.quick, show_progress)):
                if isinstance(result, Figure):
                    path = arguments.output.with_stem(f"{arguments.output.stem}-{name}")
                    result.savefig(path, format="png")
                    console.print(f"wrote {path}", soft_wrap=True)
                else:
                    console.print(result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
