"""python -m gradkernels diagnose: a user's own model from the command line, with a progress line and a picture."""

from __future__ import annotations

import argparse
import importlib
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
from gradkernels.diagnosis.probe import probe
from gradkernels.layers import unwrapped

# Of matplotlib's formats those that diagnose is tested with.
_PICTURES = (".png", ".pdf", ".svg")

_OURS = (*(function.__code__.co_filename for function in (diagnose, probe, unwrapped)), __file__)
# What these raise says in words what is wrong.
_CHECKS = ("_check", "_targets", "probe", "unwrapped")

# Not shown of a traceback, which is about a user's own code.
_NOT_THE_USERS = ("<frozen importlib", importlib.__file__, pkgutil.__file__, str(Path(torch.__file__).parent), *_OURS)


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
    if arguments.output.suffix not in _PICTURES:
        parser.error(f"--output {arguments.output} does not end in {', '.join(_PICTURES)}")

    _progress(f"making {arguments.model}")
    model = _call(parser, arguments.model)
    if not isinstance(model, nn.Module):
        parser.error(f"{arguments.model} returned {type(model).__name__}, not a torch.nn.Module")
    batch, loss_fn = _batch(parser, arguments.batch, model), _loss(parser, arguments.loss)
    _progress("forward and backward" + (", and again with the cures" if arguments.apply else ""))
    try:
        diagnosis = diagnose(model, batch, loss_fn, apply=arguments.apply)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if last.filename in _OURS and last.name in _CHECKS:
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
    """One line that is overwritten, for a person who waits; nothing in a log."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{words}", end="", file=sys.stderr, flush=True)


def _refuse(parser: argparse.ArgumentParser, words: str, error: Exception) -> NoReturn:
    """For what the user's own code raises: words first, then where."""
    _progress("")
    parser.print_usage(sys.stderr)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_NOT_THE_USERS)]
    told = ["\n", *traceback.format_list(frames), *traceback.format_exception_only(error)] if frames else []
    parser.exit(2, f"{parser.prog}: error: {words}: {type(error).__name__}: {error}\n{''.join(told)}")


def _resolve(parser: argparse.ArgumentParser, name: str) -> Any:
    """What MODULE:NAME names; modules of the current folder too."""
    if not re.fullmatch(r"[\w.]+:[\w.]+", name):
        parser.error(f"{name!r} is not of the form MODULE:NAME")
    try:
        found = pkgutil.resolve_name(name)
    except (ModuleNotFoundError, AttributeError, ValueError) as error:
        parser.error(f"{name} cannot be had: {error}")
    except Exception as error:
        _refuse(parser, f"{name.partition(':')[0]} cannot be imported", error)
    if not callable(found):
        parser.error(f"{name} is {type(found).__name__}, which cannot be called")
    return found


def _call(parser: argparse.ArgumentParser, name: str) -> Any:
    function = _resolve(parser, name)
    try:
        return function()
    except Exception as error:
        _refuse(parser, f"{name}() failed", error)


def _batch(parser: argparse.ArgumentParser, wanted: str, model: nn.Module) -> tuple[Any, Any]:
    if re.fullmatch(r"[0-9]+(,[0-9]+)*", wanted):
        like = next(model.parameters(), torch.empty(0, device="cpu"))
        return torch.randn([int(size) for size in wanted.split(",")], dtype=like.dtype, device=like.device), None
    if Path(wanted).is_file():
        try:
            batch = torch.load(wanted, weights_only=True)
        except Exception as error:
            parser.error(f"{wanted} is no file of tensors that torch.load(weights_only=True) takes: {type(error).__name__}")
    elif ":" in wanted:
        batch = _call(parser, wanted)
    else:
        parser.error(f"--batch {wanted} is no size such as 32,3,224,224, no file that is there, and not of the form MODULE:FUNCTION")
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        parser.error(f"{wanted} holds no pair (inputs, targets)")
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
    """For a batch of a size, which has none: classes at random, or numbers."""
    if not isinstance(outputs, torch.Tensor):
        raise TypeError(
            f"the model returned {type(outputs).__name__}: targets can be made up for one tensor only, so --batch has to have them"
        )
    if loss not in ("cross_entropy", "nll_loss"):
        return torch.rand_like(outputs)
    if outputs.dim() < 2 or outputs.shape[1] < 2:
        shape = tuple(outputs.shape)
        raise ValueError(f"{loss} needs the scores of two classes or more, not outputs of the shape {shape}: --loss names another loss")
    return torch.randint(outputs.shape[1], (len(outputs), *outputs.shape[2:]), device=outputs.device)
