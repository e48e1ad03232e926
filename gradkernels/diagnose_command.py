"""python -m gradkernels diagnose: a user's own model from the command line, with a progress line and a picture."""

import argparse
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradkernels.diagnose import diagnose


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gradkernels diagnose", description="One step of your model: which layers do not learn, why, and what to do."
    )
    parser.add_argument("model", metavar="MODULE:FACTORY", help="called without arguments, returns the model")
    parser.add_argument(
        "--batch",
        required=True,
        metavar="SIZE | FILE | MODULE:FUNCTION",
        help="random numbers of a size such as 32,3,224,224; a file of (inputs, targets) for torch.load; or a function that returns them",
    )
    parser.add_argument("--loss", default="cross_entropy", help="of torch.nn.functional, or MODULE:FUNCTION (default: cross_entropy)")
    parser.add_argument("--apply", action="store_true", help="try the safe cures on a copy, show before and after")
    parser.add_argument("--output", type=Path, default=Path("diagnosis.png"), help="where the picture goes (default: diagnosis.png)")
    arguments = parser.parse_args(argv)
    if not arguments.output.parent.is_dir():
        parser.error(f"there is no folder {arguments.output.parent}")

    _progress(f"making {arguments.model}")
    model = _resolve(parser, arguments.model)()
    if not isinstance(model, nn.Module):
        parser.error(f"{arguments.model} returned {type(model).__name__}, not a torch.nn.Module")
    batch, loss_fn = _batch(parser, arguments.batch), _loss(parser, arguments.loss)
    _progress("forward and backward" + (", and again with the cures" if arguments.apply else ""))
    diagnosis = diagnose(model, batch, loss_fn, apply=arguments.apply)
    _progress(f"drawing {arguments.output}")
    try:
        diagnosis.plot(arguments.output)
        picture = f"wrote {arguments.output}"
    except ImportError as error:
        picture = f"no picture: {error}"
    _progress("")
    print(f"{diagnosis}\n\n{picture}")
    return 0


def _progress(words: str) -> None:
    """One line that is overwritten, for a person who waits; nothing in a log."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{words}", end="", file=sys.stderr, flush=True)


def _resolve(parser: argparse.ArgumentParser, name: str) -> Any:
    """What MODULE:NAME names; modules of the current folder too."""
    if ":" not in name:
        parser.error(f"{name!r} is not of the form MODULE:NAME")
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        parser.error(f"{name} cannot be had: {error}")


def _batch(parser: argparse.ArgumentParser, wanted: str) -> tuple[Any, Any]:
    if all(size.strip().isdigit() for size in wanted.split(",")):
        return torch.randn([int(size) for size in wanted.split(",")]), None
    batch = torch.load(wanted, weights_only=True) if Path(wanted).is_file() else _resolve(parser, wanted)()
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        parser.error(f"{wanted} holds no pair (inputs, targets)")
    inputs, targets = batch
    return inputs, targets


def _loss(parser: argparse.ArgumentParser, wanted: str) -> Callable[[Any, Any], Any]:
    loss_fn = _resolve(parser, wanted) if ":" in wanted else getattr(nn.functional, wanted, None)
    if not callable(loss_fn):
        parser.error(f"torch.nn.functional has no {wanted}")

    def loss(outputs: Any, targets: Any) -> Any:
        # A batch of a size has no targets: classes at random, or numbers.
        if targets is None and wanted in ("cross_entropy", "nll_loss"):
            targets = torch.randint(outputs.shape[1], (len(outputs), *outputs.shape[2:]), device=outputs.device)
        elif targets is None:
            targets = torch.rand_like(outputs)
        return loss_fn(outputs, targets)

    return loss
