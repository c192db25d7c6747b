"""The command line: ``bllkern train``, ``compare``, ``split``, ``reproduce``, ``plan``, ``info``."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import sys
import textwrap
from pathlib import Path

from .. import _native, models, objectives
from ..cuts import file as cuts_file
from ..execution.schedules import SCHEDULES
from . import block_parallel, compare, info, plan, published, reproduce, split, train
from .data import AUGMENTATIONS, DATASETS
from .errors import UserError
from .presets import PRESETS

EXAMPLES = """\
examples:
  bllkern train                                   a perceptron on scikit-learn's digits, seconds
  bllkern train --objective bwbpf --output out    with a checkpoint after every epoch
  bllkern train --objective bwbpf --output out --resume
  bllkern train --data cifar10 --data-dir ~/data --model resnet18 --cuts 4 --epochs 20
  bllkern compare --objectives backprop,bll,bwbpf --seeds 3 --output figures
  bllkern split resnet20 --blocks 4 --data cifar10 --data-dir ~/data --output r20.json
  bllkern reproduce bwbpf --scale cpu --data-dir ~/data
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

Writes DIR/compare.json, compare.md and compare.png. DIR/compare.journal.json keeps every training: the same command
continues a killed one. Memory is what a training step holds beyond what it began with.

"""
SPLIT_EXAMPLES = """\
examples:
  bllkern split convnet --blocks 4 --output convnet.json
  bllkern split resnet20 --blocks 4 --data cifar10 --data-dir ~/data --epochs 9 --output r20.json
  bllkern split convnet --blocks 4 --max-time-ratio 1.0 --max-memory-ratio 0.5 --output small.json
  bllkern split resnet56 --from r20.json --data cifar10 --data-dir ~/data --output r56.json
  bllkern train --model resnet20 --cuts r20.json --data cifar10 --data-dir ~/data

Chooses among cuts, heads (linear, mlp, conv) and pooled sizes by successive halving: all candidates train briefly, the
best third of them longer, the last for --epochs. They are scored on a fifth of the training samples, which they are not
trained on. What is found is then trained on all training samples and tested beside cuts that are even by layers and by
cost; nothing is chosen by the test. OUTPUT.journal.json, beside --output OUTPUT.json, keeps every training: the same
command continues a killed search. --from carries the cuts of a shallower relative over, tests them in the same table,
and says how much they keep of what a direct search gains.

"""
REPRODUCE_EXAMPLES = """\
examples:
  bllkern reproduce bwbpf --scale cpu --data-dir ~/data --output bench/results
  bllkern reproduce bll --scale gpu --data-dir ~/data --output bench/results

cpu: a small convnet on 10,000 images of CIFAR-10 in place of the papers' networks (bll: also sequence reversal), about
half an hour on two idle cores. gpu: ResNet-18 and ResNet-50 on all of CIFAR-10, 30 epochs.

Writes DIR/PAPER-SCALE.json, .md and .png. The JSON keeps every training: the same command continues a killed one. What
is not trained at a scale is in the table as "not measured".

"""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for a mistake of the user, 130 when interrupted."""
    try:
        args, unknown = _parse(argv)
    except SystemExit as end:  # --help, or an argument that does not parse
        return end.code
    try:
        if unknown:
            raise UserError(f"unrecognized arguments: {' '.join(unknown)}")
        if _native.error and args.command != "info":
            print(f"bllkern {args.command}: {_native.error}: plain torch runs instead, more slowly", file=sys.stderr)
        return args.run(args)
    except (UserError, FloatingPointError) as exception:
        print(f"bllkern {args.command}: error: {' '.join(str(exception).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nbllkern {args.command}: interrupted", file=sys.stderr)
        return 130


def _parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The arguments; what is not given has the preset's value, if there is a preset, else the default."""
    parser, commands = _parser()
    args, unknown = parser.parse_known_args(argv)
    if getattr(args, "preset", None) is None:
        return args, unknown
    preset = PRESETS[args.preset]
    commands["compare"].set_defaults(**preset.protocol)
    for name in ("train", "split"):
        commands[name].set_defaults(**preset.protocol, objective=preset.objective, preset_options=preset.options)
    args, unknown = parser.parse_known_args(argv)
    if getattr(args, "objective", None) != preset.objective:  # the options are those of the preset's own
        args.preset_options = {}
    return args, unknown


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and those of its commands by name."""
    title = "Train neural networks block by block, without end-to-end backpropagation."
    parser = _command(None, "bllkern", title, EXAMPLES)
    parser.set_defaults(run=info.run, command="info")
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser)
    _add_train(_command(commands, "train", "train one network", TRAIN_EXAMPLES + _choices()))
    title = "train under several objectives and compare them"
    _add_compare(_command(commands, "compare", title, COMPARE_EXAMPLES + _choices()))
    title = "search where to cut a network, and the head to learn through"
    _add_split(_command(commands, "split", title, SPLIT_EXAMPLES + _choices()))
    title = "a paper's table, beside what is measured here"
    _add_reproduce(_command(commands, "reproduce", title, REPRODUCE_EXAMPLES))
    _add_plan(_command(commands, "plan", "predict steps on many devices from blocks measured here", None))
    info_parser = _command(commands, "info", "versions, what was built, which backend runs what", None)
    info_parser.set_defaults(run=info.run, command="info")
    return parser, commands.choices


def _command(commands, name: str, description: str, examples: str | None) -> argparse.ArgumentParser:
    style = {
        "description": description,
        "epilog": examples,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "allow_abbrev": False,
    }
    return _Parser(prog=name, **style) if commands is None else commands.add_parser(name, help=description, **style)


def _choices() -> str:
    """Data sets, presets and the options of objectives, for the help."""
    lines = ["data sets, and what --data-dir is for them:"]
    lines += [f"  {name:14} {what or '(needs none)'}" for name, (_, what) in DATASETS.items()]
    lines += ["", "presets:"]
    for name, preset in PRESETS.items():
        values = [f"--{key.replace('_', '-')} {value}" for key, value in preset.protocol.items()]
        values += [f"--objective {preset.objective}", *(f"--option {k}={v}" for k, v in preset.options.items())]
        lines.append(textwrap.fill(f"{name}: {' '.join(values)}", 110, initial_indent="  ", subsequent_indent="    "))
    return "\n".join([*lines, "", _objective_options()])


def _objective_options() -> str:
    """The options of every objective with their defaults, for the help."""
    lines = ["options of the objectives, and their defaults:"]
    for name, objective in objectives.OBJECTIVES.items():
        options = objective()
        defaults = [f"{field.name}={getattr(options, field.name)}" for field in dataclasses.fields(options)]
        text = f"{name}: {' '.join(defaults) or 'none'}"
        lines.append(textwrap.fill(text, 110, initial_indent="  ", subsequent_indent="    "))
    return "\n".join(lines)


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_train, command="train", preset_options={})
    _add_protocol(parser)
    names = sorted(objectives.OBJECTIVES)
    parser.add_argument("--objective", choices=names, help="default: that of the file of cuts, or bll")
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


def _add_split(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=split.run, command="split", validation=None, preset_options={})
    add = parser.add_argument
    add("model", choices=models.MODELS, metavar="MODEL", help=f"one of {', '.join(models.MODELS)}")
    add("--blocks", type=_blocks, metavar="K", help="blocks to cut into, 2 or more")
    add("--from", dest="source", metavar="FILE", help="a .json of bllkern split for a relative, to carry over")
    add("--candidates", type=_non_negative_int, default=24, metavar="N", help="to search among; default: 24; 0: none")
    add("--max-time-ratio", type=_positive_float, metavar="X", help="largest step time / backprop's; default: any")
    add("--max-memory-ratio", type=_positive_float, metavar="X", help="largest peak memory of a step / backprop's")
    add("--seeds", type=_positive_int, default=3, metavar="N", help="of the table, from --seed on; default: 3")
    add("--objective", choices=cuts_file.OBJECTIVES, help="default: that of --from, or bll")
    _add_option(parser, "NAME=VALUE", "an option of the objective, such as family=bernoulli; may be repeated")
    add("--output", default="cuts.json", metavar="FILE", help="default: cuts.json")
    _add_training(parser)


def _add_reproduce(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=reproduce.run, command="reproduce")
    add = parser.add_argument
    names = list(published.PAPERS)
    add("paper", choices=names, metavar="PAPER", help=f"one of {', '.join(names)}")
    add("--scale", choices=["cpu", "gpu"], required=True, help="see below")
    add("--data-dir", metavar="DIR", help="the folder that holds cifar-10-batches-py")
    add("--seeds", type=_positive_int, metavar="N", help="default: those of the scale")
    add("--output", metavar="DIR", default="bllkern-reproduce", help="default: bllkern-reproduce")
    _add_machine(parser)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=plan.run, command="plan")
    add = parser.add_argument
    add("--model", default="resnet18", choices=sorted(models.MODELS), metavar="NAME", help="default: resnet18")
    add("--objective", default="bll", choices=plan.OBJECTIVES, help="of the blocks; default: bll")
    add("--cuts", type=_cuts, metavar="CUTS", help="modules, comma separated, or how many blocks; default: the stages")
    add("--devices", type=_positive_int, default=1024, metavar="N", help="up to so many; default: 1024")
    add(
        "--bandwidth", type=_bandwidth, default=1e9, metavar="B", help="bits per second of a link, as 100M; default: 1G"
    )
    add("--latency", type=_non_negative_float, default=0.0, metavar="S", help="seconds of a link; default: 0")
    add(
        "--cores",
        type=_positive_int,
        metavar="N",
        help="that all devices share, as processes of one machine; default: own",
    )
    add("--batch-size", type=_positive_int, default=16, metavar="N", help="of a micro-batch; default: 16")
    add("--micro-batches", type=_positive_int, default=4, metavar="N", help="in a step; default: 4")
    add("--seed", type=_non_negative_int, default=0, metavar="N", help="of weights and inputs; default: 0")
    add("--threads", type=_positive_int, metavar="N", help="CPU threads; default: torch's choice")
    add("--output", metavar="DIR", default="bllkern-plan", help="default: bllkern-plan")


def _bandwidth(text: str) -> float:
    scale = {"k": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:])
    number = text if scale is None else text[:-1]
    return _number(number, float, 0, True, "a positive number, or one followed by k, M or G") * (scale or 1)


def _add_protocol(parser: argparse.ArgumentParser) -> None:
    """What decides how a network is trained, apart from the objective."""
    add = parser.add_argument
    add("--validation", type=_positive_int, metavar="N", help="test on N training samples instead of the test data")
    names = ", ".join(models.MODELS)
    add("--model", default="mlp", choices=models.MODELS, metavar="NAME", help=f"{names}; default: mlp")
    text = "modules, comma separated; how many blocks; stages:N, N along the stages; a .json of bllkern split"
    add("--cuts", type=_cuts, metavar="CUTS", help=f"{text}; default: the stages")
    _add_training(parser)


def _add_training(parser: argparse.ArgumentParser) -> None:
    """What decides how a given network with given cuts is trained."""
    add = parser.add_argument
    add("--preset", choices=sorted(PRESETS), help="defaults as a paper's released code has them, see below")
    add("--data", default="digits", choices=DATASETS, metavar="NAME", help=f"{', '.join(DATASETS)}; default: digits")
    add("--data-dir", metavar="PATH", help="where the data set is, see below")
    add("--train-size", type=_positive_int, metavar="N", help="training samples; default: all")
    add("--test-size", type=_positive_int, metavar="N", help="test samples; default: all")
    add("--augment", choices=AUGMENTATIONS, help="of images; default: what is usual for the data set")
    add("--image-size", type=_positive_int, metavar="N", help="for tiny-imagenet and folder; default: 64")
    add("--schedule", choices=sorted(SCHEDULES), help="when a block learns; default: eager, where losses are isolated")
    add("--epochs", type=_positive_int, default=20, metavar="N", help="default: 20")
    add("--batch-size", type=_positive_int, default=100, metavar="N", help="default: 100")
    add("--optimizer", default="adamw", choices=list(train.RATES), help="one for each block; default: adamw")
    add("--lr", type=_positive_float, metavar="X", help="the largest learning rate; default: 0.004, for sgd 0.1")
    add("--weight-decay", type=_non_negative_float, metavar="X", help="default: 0.01, for sgd 0.0005")
    add("--lr-schedule", default="onecycle", choices=["onecycle", "cosine"], help="default: onecycle")
    add("--seed", type=_non_negative_int, default=0, metavar="N", help="of weights and order of the data; default: 0")
    add("--autocast", action="store_true", help="run the network under torch.autocast in bfloat16")
    _add_machine(parser)


def _add_machine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
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


def _cuts(text: str) -> list[str] | int | str | Path:
    if text.endswith(".json"):
        return Path(text)
    kind, _, blocks = text.partition(":")
    if kind == "stages" and blocks.isdecimal():
        return text
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


def _blocks(text: str) -> int:
    return _number(text, int, 2, False, "an integer of 2 or more")


def _positive_int(text: str) -> int:
    return _number(text, int, 1, False, "a positive integer")


def _positive_float(text: str) -> float:
    return _number(text, float, 0, True, "a positive number")


def _non_negative_float(text: str) -> float:
    return _number(text, float, 0, False, "a non-negative number")


def _non_negative_int(text: str) -> int:
    return _number(text, int, 0, False, "a non-negative integer")
