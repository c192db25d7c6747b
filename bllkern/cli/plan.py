"""``bllkern plan``: what a step would take on many devices, block-parallel and otherwise, from blocks measured here."""

from __future__ import annotations

import argparse
import dataclasses
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from .. import models, objectives
from ..parallel.plan import METHODS, Block, Prediction, predict
from ..parallel.profile import at_once, profile
from .checkpoint import write_atomically, write_json
from .errors import user_errors
from .measure import human_bytes, human_time
from .train import stage_cuts

OBJECTIVES = [name for name, objective in objectives.OBJECTIVES.items() if objective().isolate]
CLASSES, SHAPE, TOKENS = 10, (3, 32, 32), 64
LINKS = [10 ** (power / 4) for power in range(28, 47)]  # bits per second: 10 Mbit/s, a home's uplink, to 300 Gbit/s


def run(args: argparse.Namespace) -> int:
    counts = [2**power for power in range(args.devices.bit_length()) if 2**power < args.devices] + [args.devices]
    profiles = _profiles(args, counts)
    for processes, blocks in profiles.items():
        print(_block_table(blocks, args, processes))
    measured = [profiles[_processes(args, devices)] for devices in counts]
    table = [_all(blocks, args, devices, args.bandwidth) for blocks, devices in zip(measured, counts)]
    print(_table(table))
    links = [_all(measured[-1], args, args.devices, bandwidth) for bandwidth in LINKS]
    output = Path(args.output)
    with user_errors("--output"):
        output.mkdir(parents=True, exist_ok=True)
    options = {name: getattr(args, name) for name in ("model", "objective", "batch_size", "micro_batches")}
    report = {
        "options": {
            **options,
            "bandwidth": args.bandwidth,
            "latency": args.latency,
            "devices": args.devices,
            "cores": args.cores,
        },
        "blocks": {n: [dataclasses.asdict(block) for block in blocks] for n, blocks in profiles.items()},
        "predictions": [dataclasses.asdict(prediction) for row in table for prediction in row],
    }
    write_json(output / "plan.json", report)
    _draw(args, counts, table, links, output / "plan.png")
    print(f"\n{output}: plan.json, plan.png")
    return 0


def _processes(args: argparse.Namespace, devices: int) -> int:
    """How many processes show at once what so many devices do: one where each has a machine of its own."""
    return 1 if args.cores is None else min(devices, 2 * args.cores)


def _profiles(args: argparse.Namespace, counts: list[int]) -> dict[int, list[Block]]:
    """The blocks as each number of processes at once has measured them."""
    if args.cores is None:
        return {1: _blocks(args)}
    return {n: at_once(n, partial(_blocks, args)) for n in dict.fromkeys(_processes(args, n) for n in counts)}


def _blocks(args: argparse.Namespace) -> list[Block]:
    """The blocks of the model, measured on random inputs; devices that share cores have one thread each by default."""
    shared = args.cores is not None
    if args.threads is not None or shared:
        torch.set_num_threads(args.threads or 1)
    torch.manual_seed(args.seed)
    tokens = models.MODELS[args.model].rank == 1
    shape = (TOKENS,) if tokens else SHAPE
    with user_errors():
        net = models.build(args.model, CLASSES, shape)
        cuts = stage_cuts(args)
        x = torch.randint(CLASSES, (args.batch_size, *shape)) if tokens else torch.randn(args.batch_size, *shape)
        y = torch.randint(CLASSES, (args.batch_size, *shape) if tokens else (args.batch_size,))

        def loss(output, target):
            return F.cross_entropy(output.flatten(0, -2), target.flatten())

        clock = time.thread_time if shared else time.perf_counter
        return profile(net, cuts, CLASSES, args.objective, x, y, loss, clock=clock)


def _all(blocks: list[Block], args: argparse.Namespace, devices: int, bandwidth: float) -> list[Prediction]:
    options = {"latency": args.latency, "micro_batches": args.micro_batches, "cores": args.cores}
    return [predict(method, blocks, devices, bandwidth / 8, **options) for method in METHODS]


def _block_table(blocks: list[Block], args: argparse.Namespace, processes: int) -> str:
    threads = args.threads or (torch.get_num_threads() if args.cores is None else 1)
    measured = f"{args.model}, {args.objective}, micro-batch {args.batch_size}, CPU threads: {threads}"
    lines = [measured if processes == 1 else f"{measured}, {processes} processes at once"]
    lines += ["block            forward  backward     local   message    packed  activations  parameters"]
    for block in blocks:
        times = "".join(f"{human_time(value):>10}" for value in (block.forward, block.backward, block.local))
        sizes = f"{human_bytes(block.message):>10}{human_bytes(block.packed):>10}"
        held = f"{human_bytes(block.activations):>13}{human_bytes(block.parameters):>12}"
        lines.append(f"{block.name:14.14}{times}{sizes}{held}")
    return "\n".join(lines)


def _table(rows: list[list[Prediction]]) -> str:
    lines = ["\ndevices  method          stages      step  idle      memory"]
    for row in rows:
        for found in row:
            lines.append(
                f"{found.devices:7}  {found.method:14}{found.stages:8}{human_time(found.seconds):>10}"
                f"{found.bubble:6.0%}{human_bytes(found.memory):>12}"
            )
    return "\n".join(lines)


def _draw(args: argparse.Namespace, counts: list[int], table: list, links: list, path: Path) -> None:
    """Step time over the number of devices, and over the bandwidth of the links."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    drawn = [
        (panels[0], counts, table, f"devices, links of {args.bandwidth / 1e6:g} Mbit/s"),
        (panels[1], [link / 1e6 for link in LINKS], links, f"Mbit/s of a link, {args.devices} devices"),
    ]
    for axes, places, rows, label in drawn:
        for method, predictions in zip(METHODS, zip(*rows)):
            axes.loglog(places, [found.seconds for found in predictions], marker=".", label=method)
        axes.set_xlabel(label)
        axes.set_ylabel("seconds of a step (predicted)")
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.suptitle(f"{args.model}, {args.objective}, {args.micro_batches} micro-batches of {args.batch_size}")
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    write_atomically(path, content.getvalue())
