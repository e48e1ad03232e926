"""python -m examples: experiments on vanishing and exploding gradients and their cures, each with a table and a figure.

Decided here: which experiments there are, in which order, and where their pictures go. Whatever does not come out as expected ends the
program with a sentence that says so.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

import gradkernels as gk
from gradkernels import _native

try:
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from examples import chain_rule, clipping, cures, dying_relu, mnist, parity, simple_net
    from examples.harness import Experiment, Setting, digits
except ModuleNotFoundError as error:
    raise SystemExit(
        f"the demonstration needs more packages than gradkernels ({error}): pip install scikit-learn matplotlib rich"
    ) from error

# Its picture takes the name that --output gives; those of the others add theirs to it.
PARITY = Experiment("parity", "vanishing, exploding and the notes' network, with torch.nn and with gradkernels", parity.run)
EXPERIMENTS = (
    Experiment("sigmoid", "the gradient of a sigmoid, at most 0.25, and of many in a chain", chain_rule.sigmoid),
    Experiment("matrices", "a product of 100 random matrices explodes, and its gradients are clipped", chain_rule.matrices),
    Experiment("numeric", "(f(w + h) - f(w - h)) / 2h against backward", chain_rule.numeric),
    Experiment("cures", "a sigmoid network that learns nothing, and the cures one at a time", cures.run),
    Experiment("dying-relu", "dead ReLU units, revived by Leaky ReLU, PReLU and RReLU", dying_relu.run),
    Experiment("simple-net", "784-300-100-10 with batch norm after ReLU and before it", simple_net.run),
    Experiment("deep-net", "100-1000-1000-1000-1000-1 with and without its gradient clipped", clipping.deep_net),
    Experiment("rnn", "a recurrent network over 100 steps, with and without its gradient clipped", clipping.rnn),
    PARITY,
)


@contextmanager
def one_thread() -> Iterator[None]:
    """Layers this small gain nothing from a second thread, and wait long for one whose core is busy with something else."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def picture_of(experiment: Experiment, output: Path) -> Path:
    return output if experiment is PARITY else output.with_stem(f"{output.stem}-{experiment.name}")


def main(argv: list[str] | None = None) -> int:
    width = max(len(experiment.name) for experiment in EXPERIMENTS)
    parser = argparse.ArgumentParser(
        prog="python -m examples",
        description="Experiments on vanishing and exploding gradients, on real digits:\n\n"
        + "\n".join(f"  {experiment.name:<{width}}  {experiment.about}" for experiment in EXPERIMENTS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which experiments; all of them where none is named")
    parser.add_argument(
        "--output", type=Path, default=Path("demo.png"), help="where parity's picture goes; those of others add -NAME (default: demo.png)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches (default: 0)")
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    parser.add_argument(
        "--mnist", type=Path, metavar="DIR", help="run the notes' own table on the four files of MNIST in DIR, besides what is named"
    )
    arguments = parser.parse_args(argv)
    unknown = set(arguments.names) - {experiment.name for experiment in EXPERIMENTS}
    if unknown:
        parser.error(f"there is no experiment {', '.join(sorted(unknown))}; there are {', '.join(each.name for each in EXPERIMENTS)}")
    if not arguments.output.parent.is_dir():
        parser.error(f"there is no folder {arguments.output.parent}")
    if _native.C is None:
        raise SystemExit(f"the demonstration failed: the native library is not in use, {_native.reason}. To mend it: {_native.remedy}")

    chosen = [each for each in EXPERIMENTS if each.name in arguments.names or not (arguments.names or arguments.mnist)]
    if arguments.mnist is not None:
        chosen.append(Experiment("mnist", "the notes' own table", partial(mnist.run, mnist.read(arguments.mnist))))

    console = Console()
    data = digits(arguments.seed)
    # MNIST's table has its own numbers.
    sizes = f": {len(data.y_train)} digits to learn, {len(data.y_test)} to test" if any(each in EXPERIMENTS for each in chosen) else ""
    console.print(f"gradkernels {gk.__version__}, {_native.C.instruction_set()}, torch {torch.__version__}{sizes}", soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with one_thread(), Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        for place, experiment in enumerate(chosen, start=1):

            def begin(description: str, steps: int, prefix: str = f"{place} of {len(chosen)}") -> Callable[[], None]:
                progress.reset(task, total=steps, description=f"{prefix}: {description}")
                return lambda: progress.advance(task)

            for result in experiment.run(Setting(data, arguments.seed, arguments.quick, begin)):
                if isinstance(result, Figure):
                    path = picture_of(experiment, arguments.output)
                    result.savefig(path, format="png")
                    console.print(f"wrote {path}", soft_wrap=True)
                else:
                    console.print(result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
