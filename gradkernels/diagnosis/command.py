"""python -m gradkernels diagnose: diagnose a model from the command line, and draw the picture."""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from gradkernels.diagnosis.diagnose import diagnose
from gradkernels.layers import unwrapped

# The formats of matplotlib that diagnose is tested with.
_PICTURES = (".png", ".pdf", ".svg")

_OURS = (str(Path(__file__).parent), unwrapped.__code__.co_filename)
# The exceptions of these functions explain a wrong argument, so their message is enough.
_CHECKS = ("_check_arguments", "_check_loss", "_check_gradients", "_learning_parameters", "_targets", "unwrapped")

# A traceback shows the user's own code only, without frames of these files.
_NOT_THE_USERS = ("<frozen importlib", importlib.__file__, pkgutil.__file__, str(Path(torch.__file__).parent), *_OURS)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gradkernels diagnose",
        description="Run one step of your model and report which layers do not learn, why, and what to do.",
    )
    parser.add_argument("model", metavar="MODULE:FACTORY", help="a function without arguments that returns the model")
    parser.add_argument(
        "--batch",
        required=True,
        metavar="SIZE | FILE | MODULE:FUNCTION",
        help="a size such as 32,3,224,224 for random numbers; a file of (inputs, targets) for torch.load; or a function that returns them",
    )
    parser.add_argument(
        "--loss", default="cross_entropy", help="a function of torch.nn.functional, or MODULE:FUNCTION (default: cross_entropy)"
    )
    parser.add_argument("--apply", action="store_true", help="try the safe cures on a copy, and show the figures before and after")
    parser.add_argument("--output", type=Path, default=Path("diagnosis.png"), help="the file for the picture (default: diagnosis.png)")
    arguments = parser.parse_args(argv)
    # pathlib raises an error if a name is too long for the file system.
    if not os.path.isdir(arguments.output.parent):
        parser.error(f"there is no folder {arguments.output.parent}")
    if arguments.output.suffix not in _PICTURES:
        parser.error(f"--output {arguments.output} does not end in {', '.join(_PICTURES)}")

    _progress(f"making {arguments.model}")
    model = _call(parser, arguments.model)
    if not isinstance(model, nn.Module):
        parser.error(f"{arguments.model} returned {type(model).__name__}, not a torch.nn.Module")
    batch, loss_fn = _batch(parser, arguments.batch, model), _loss(parser, arguments.loss)
    _progress("forward and backward" + (", then again with the cures" if arguments.apply else ""))
    try:
        diagnosis = diagnose(model, batch, loss_fn, apply=arguments.apply)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if last.filename.startswith(_OURS) and last.name in _CHECKS:
            _progress("")
            parser.error(str(error))
        _refuse(parser, f"{arguments.model} does not run on the batch {arguments.batch} with the loss {arguments.loss}", error)
    _progress(f"drawing {arguments.output}")
    try:
        diagnosis.plot(arguments.output)
        picture = f"wrote {arguments.output}"
    except (ImportError, OSError) as error:
        picture = f"no picture: {error}"
    _progress("")
    print(f"{diagnosis}\n\n{picture}")
    return 0


def _progress(words: str) -> None:
    """Overwrite the progress line in a terminal. Elsewhere, as in a log, nothing is written."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{words}", end="", file=sys.stderr, flush=True)


def _refuse(parser: argparse.ArgumentParser, words: str, error: Exception) -> NoReturn:
    """Exit after an exception of the user's own code: first the message, then where it was raised."""
    _progress("")
    parser.print_usage(sys.stderr)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_NOT_THE_USERS)]
    details = ["\n", *traceback.format_list(frames), *traceback.format_exception_only(error)] if frames else []
    parser.exit(2, f"{parser.prog}: error: {words}: {type(error).__name__}: {error}\n{''.join(details)}")


def _resolve(parser: argparse.ArgumentParser, name: str) -> Any:
    """Return the function that MODULE:NAME names. Modules of the current folder can be named, too."""
    if not re.fullmatch(r"[\w.]+:[\w.]+", name):
        parser.error(f"{name!r} is not of the form MODULE:NAME")
    try:
        function = pkgutil.resolve_name(name)
    except (ModuleNotFoundError, AttributeError, ValueError) as error:
        parser.error(f"{name} was not found: {error}")
    except Exception as error:
        _refuse(parser, f"{name.partition(':')[0]} cannot be imported", error)
    if not callable(function):
        parser.error(f"{name} is {type(function).__name__}, which cannot be called")
    return function


def _call(parser: argparse.ArgumentParser, name: str) -> Any:
    function = _resolve(parser, name)
    try:
        return function()
    except Exception as error:
        _refuse(parser, f"{name}() failed", error)


def _batch(parser: argparse.ArgumentParser, wanted: str, model: nn.Module) -> tuple[Any, Any]:
    if re.fullmatch(r"[0-9]+(,[0-9]+)*", wanted):
        like = next(model.parameters(), torch.empty(0, device="cpu"))
        try:
            return torch.randn([int(size) for size in wanted.split(",")], dtype=like.dtype, device=like.device), None
        except Exception as error:
            first_line = str(error).partition("\n")[0]
            parser.error(f"torch cannot make a tensor of the size --batch {wanted}: {type(error).__name__}: {first_line}")
    if os.path.isfile(wanted):
        try:
            batch = torch.load(wanted, weights_only=True)
        except Exception as error:
            parser.error(f"torch.load(weights_only=True) cannot read tensors from {wanted}: {type(error).__name__}")
    elif ":" in wanted:
        batch = _call(parser, wanted)
    else:
        parser.error(f"--batch {wanted} is not a size such as 32,3,224,224, not an existing file, and not of the form MODULE:FUNCTION")
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        parser.error(f"{wanted} does not hold a pair (inputs, targets)")
    inputs, targets = batch
    return inputs, targets


def _loss(parser: argparse.ArgumentParser, wanted: str) -> Callable[[Any, Any], Any]:
    loss_fn = _resolve(parser, wanted) if ":" in wanted else getattr(nn.functional, wanted, None)
    if not callable(loss_fn):
        parser.error(f"--loss: torch.nn.functional has no {wanted}, and it is not of the form MODULE:FUNCTION")

    def loss(outputs: Any, targets: Any) -> Any:
        if targets is None:
            targets = _targets(outputs, wanted)
        return loss_fn(outputs, targets)

    return loss


def _targets(outputs: Any, loss: str) -> torch.Tensor:
    """Random targets for a batch of random numbers: classes, or numbers in the shape of the outputs."""
    if not isinstance(outputs, torch.Tensor):
        raise TypeError(
            f"the model returned {type(outputs).__name__}, and random targets exist for one tensor only: pass targets with --batch"
        )
    if loss not in ("cross_entropy", "nll_loss"):
        return torch.rand_like(outputs)
    if outputs.dim() < 2 or outputs.shape[1] < 2:
        shape = tuple(outputs.shape)
        raise ValueError(f"{loss} needs scores of two or more classes, not outputs of the shape {shape}: choose another one with --loss")
    return torch.randint(outputs.shape[1], (len(outputs), *outputs.shape[2:]), device=outputs.device)
