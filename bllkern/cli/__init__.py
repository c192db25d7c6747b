"""The command line: ``bllkern train``, ``bllkern compare``, ``bllkern plan``, ``bllkern info``."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import sys
import textwrap

from .. import models, objectives
from ..execution.schedules import SCHEDULES
from . import block_parallel, compare, info, plan, train
from .errors import UserError

IMAGE_MODELS = [name for name, model in models.MODELS.items() if model.rank != 1]

EXAMPLES = """\
examples:
  bllkern train                                   a perceptron on scikit-learn's digits, seconds
  bllkern train --objective bwbpf --output out    with a checkpoint after every epoch
  bllkern train --objective bwbpf --output out --resume
  bllkern train --data cifar10 --data-dir ~/data --model resnet18 --cuts 4 --epochs 20
  bllkern compare --objectives backprop,bll,bwbpf --seeds 3 --output figures
  bllkern plan --model resnet50 --devices 4096 --bandwidth 100M
  bllkern info                                    versions, what was built, which backend runs what
"""
TRAIN_EXAMPLES = """\
examples:
  bllkern train --data digits --model mlp --objective bll
  bllkern train --objective bll --option family=bernoulli --option similarity=1.0
  bllkern train --data cifar10 --data-dir ~/data --model convnet --train-size 10000 --test-size 2000 --epochs 5
  bllkern train --model resnet18 --cuts layer1.0,layer1.1,layer2,layer3 --schedule immediate --output out

With --output, DIR/checkpoint.pt is written after every epoch, DIR/metrics.json with it, DIR/weights.pt (the plain
network's state_dict) at the end. The same command with --resume continues, to the same weights as an unbroken run.

"""
COMPARE_EXAMPLES = """\
examples:
  bllkern compare --objectives backprop,bll,bwbpf,predsim --seeds 3
  bllkern compare --data cifar10 --data-dir ~/data --model convnet --train-size 10000 --test-size 2000 --epochs 5
  bllkern compare --objectives backprop,bll --option bll.similarity=12.0 --output figures

Writes DIR/compare.json and DIR/compare.png. Memory is what a training step holds beyond what it began with.

"""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for a mistake of the user, 130 when interrupted."""
    try:
        args, unknown = _parser().parse_known_args(argv)
    except SystemExit as end:  # --help, or an argument that does not parse
        return end.code
    try:
        if unknown:
            raise UserError(f"unrecognized arguments: {' '.join(unknown)}")
        return args.run(args)
    except (UserError, FloatingPointError) as exception:
        print(f"bllkern {args.command}: error: {' '.join(str(exception).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nbllkern {args.command}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    title = "Train neural networks block by block, without end-to-end backpropagation."
    parser = _command(None, "bllkern", title, EXAMPLES)
    parser.set_defaults(run=info.run, command="info")
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser)
    _add_train(_command(commands, "train", "train one network", TRAIN_EXAMPLES + _objective_options()))
    title = "train under several objectives and compare them"
    _add_compare(_command(commands, "compare", title, COMPARE_EXAMPLES + _objective_options()))
    _add_plan(_command(commands, "plan", "predict steps on many devices from blocks measured here", None))
    info_parser = _command(commands, "info", "versions, what was built, which backend runs what", None)
    info_parser.set_defaults(run=info.run, command="info")
    return parser


def _command(commands, name: str, description: str, examples: str | None) -> argparse.ArgumentParser:
    style = {
        "description": description,
        "epilog": examples,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "allow_abbrev": False,
    }
    return _Parser(prog=name, **style) if commands is None else commands.add_parser(name, help=description, **style)


def _objective_options() -> str:
    """The options of every objective with their defaults, for the help."""
    lines = ["options of the objectives, and their defaults:"]
    for name, objective in objectives.OBJECTIVES.items():
        defaults = [f"{field.name}={field.default}" for field in dataclasses.fields(objective)]
        text = f"{name}: {' '.join(defaults) or 'none'}"
        lines.append(textwrap.fill(text, 110, initial_indent="  ", subsequent_indent="    "))
    return "\n".join(lines)


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_train, command="train")
    _add_protocol(parser)
    parser.add_argument("--objective", default="bll", choices=sorted(objectives.OBJECTIVES), help="default: bll")
    _add_option(parser, "NAME=VALUE", "an option of the objective, such as family=bernoulli; may be repeated")
    parser.add_argument("--output", metavar="DIR", help="folder for checkpoint, metrics, weights; default: none")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --output")


    parallel = "ranks that share the blocks, under torchrun; ranks left over train on other parts of each batch"
    parser.add_argument("--block-parallel", type=_positive_int, metavar="K", help=parallel)


def _train(args: argparse.Namespace) -> int:
    return (train if args.block_parallel is None else block_parallel).run(args)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=compare.run, command="compare")
    _add_protocol(parser)
    parser.add_argument(
        "--objectives",
        type=_objectives,
        default=["backprop", "bll", "bwbpf", "predsim"],
        metavar="NAMES",
        help=f"comma separated, of {', '.join(sorted(objectives.OBJECTIVES))}; default: backprop,bll,bwbpf,predsim",
    )
    parser.add_argument("--seeds", type=_positive_int, default=3, metavar="N", help="from --seed on; default: 3")
    _add_option(parser, "OBJECTIVE.NAME=VALUE", "an option of one, such as bll.family=bernoulli; may be repeated")
    parser.add_argument("--output", metavar="DIR", default="bllkern-compare", help="default: bllkern-compare")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=plan.run, command="plan")
    add = parser.add_argument
    add("--model", default="resnet18", choices=sorted(models.MODELS), metavar="NAME", help="default: resnet18")
    add("--objective", default="bll", choices=plan.OBJECTIVES, help="of the blocks; default: bll")
    add("--cuts", type=_cuts, metavar="CUTS", help="modules, comma separated, or how many blocks; default: the stages")
    add("--devices", type=_positive_int, default=1024, metavar="N", help="up to so many; default: 1024")
    add("--bandwidth", type=_bandwidth, default=1e9, metavar="B", help="bits per second of a link, as 100M; default: 1G")
    add("--latency", type=_non_negative_float, default=0.0, metavar="S", help="seconds of a link; default: 0")
    add("--batch-size", type=_positive_int, default=16, metavar="N", help="of a micro-batch; default: 16")
    add("--micro-batches", type=_positive_int, default=4, metavar="N", help="in a step; default: 4")
    add("--seed", type=_seed, default=0, metavar="N", help="of weights and inputs; default: 0")
    add("--threads", type=_positive_int, metavar="N", help="CPU threads; default: torch's choice")
    add("--output", metavar="DIR", default="bllkern-plan", help="default: bllkern-plan")


def _bandwidth(text: str) -> float:
    scale = {"k": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:])
    return _positive_float(text if scale is None else text[:-1]) * (scale or 1)


def _add_protocol(parser: argparse.ArgumentParser) -> None:
    """What decides how a network is trained, apart from the objective."""
    add = parser.add_argument
    add("--data", default="digits", choices=["digits", "cifar10"], help="default: digits, which scikit-learn contains")
    add("--data-dir", metavar="DIR", help="for cifar10: the folder that holds cifar-10-batches-py")
    add("--train-size", type=_positive_int, metavar="N", help="training images; default: all")
    add("--test-size", type=_positive_int, metavar="N", help="test images; default: all")
    add("--model", default="mlp", choices=IMAGE_MODELS, metavar="NAME", help=f"{', '.join(IMAGE_MODELS)}; default: mlp")
    add("--cuts", type=_cuts, metavar="CUTS", help="modules, comma separated, or how many blocks; default: the stages")
    add("--schedule", choices=sorted(SCHEDULES), help="when a block learns; default: eager, where losses are isolated")
    add("--epochs", type=_positive_int, default=20, metavar="N", help="default: 20")
    add("--batch-size", type=_positive_int, default=100, metavar="N", help="default: 100")
    add("--lr", type=_positive_float, default=4e-3, metavar="X", help="peak of the one-cycle schedule; default: 0.004")
    add("--weight-decay", type=_non_negative_float, default=1e-2, metavar="X", help="of AdamW; default: 0.01")
    add("--seed", type=_seed, default=0, metavar="N", help="of weights and order of the data; default: 0")
    add("--device", metavar="NAME", help="such as cpu or cuda:1; default: cuda where there is one")
    add("--threads", type=_positive_int, metavar="N", help="CPU threads; default: torch's choice")


def _add_option(parser: argparse.ArgumentParser, metavar: str, text: str) -> None:
    parser.add_argument("--option", action=_Option, type=_assignment, default={}, metavar=metavar, help=text)


class _Option(argparse.Action):
    """Collects assignments in a dict; the same name twice is an error."""

    def __call__(self, parser, namespace, assignment, option_string=None):
        name, value = assignment
        collected = getattr(namespace, self.dest)
        if name in collected:
            raise argparse.ArgumentError(self, f"{name} is given twice")
        setattr(namespace, self.dest, {**collected, name: value})


def _assignment(text: str) -> tuple[str, object]:
    """``name=value``; the value is a Python literal, or else a string."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _cuts(text: str) -> list[str] | int:
    if text == "1":
        raise argparse.ArgumentTypeError("must be 2 blocks or more; one block is the objective backprop")
    return int(text) if text.isdecimal() else [name.strip() for name in text.split(",")]


def _objectives(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in objectives.OBJECTIVES:
            raise argparse.ArgumentTypeError(f"must be of {sorted(objectives.OBJECTIVES)}, got {name!r}")
        if names.count(name) > 1:
            raise argparse.ArgumentTypeError(f"{name!r} is given twice")
    return names


def _number(text: str, kind: type, minimum: float, strict: bool, allowed: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not (minimum < value if strict else minimum <= value) or value == float("inf"):
        raise argparse.ArgumentTypeError(f"must be {allowed}, got {text!r}")
    return value


def _positive_int(text: str) -> int:
    return _number(text, int, 1, False, "a positive integer")


def _positive_float(text: str) -> float:
    return _number(text, float, 0, True, "a positive number")


def _non_negative_float(text: str) -> float:
    return _number(text, float, 0, False, "a non-negative number")


def _seed(text: str) -> int:
    return _number(text, int, 0, False, "a non-negative integer")
