"""The cost model: the formulas of the schedules where they are known, and the command that draws it."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from bllkern.cli import main
from bllkern.parallel.plan import METHODS, Block, predict
from bllkern.parallel.profile import profile

FAST = 1e18  # bytes per second: links that cost nothing
EQUAL = [Block(str(i), 1.0, 2.0, 3.0, 100, 100, 1000, 50) for i in range(8)]


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
@pytest.mark.parametrize("micro_batches", [1, 4, 32])
def test_equal_blocks_take_what_the_papers_say(stages, micro_batches):
    each = 3.0 * 8 / stages  # of a stage on a micro-batch
    fill = (stages - 1) * each
    expected = {
        "block-parallel": micro_batches * each,
        "1F1B": micro_batches * each + fill,
        "zero-bubble": micro_batches * each + fill / 3,
        "data-parallel": micro_batches * 24.0 / stages,
    }
    for method, seconds in expected.items():
        found = predict(method, EQUAL, stages, FAST, micro_batches=micro_batches)
        assert found.seconds == pytest.approx(seconds, rel=1e-9), method
        work = micro_batches * 24.0 / stages
        assert found.bubble == pytest.approx(1 - work / seconds, abs=1e-9), method


def one_f_one_b(stages, micro_batches, cores):
    """Seconds of 1F1B, played: every stage does its operations in order, those that can run share the cores equally."""
    orders = [_order(min(stages - place, micro_batches), micro_batches) for place in range(stages)]
    done, left, now = set(), [None] * stages, 0.0
    while any(orders):
        runs = [p for p, order in enumerate(orders) if order and _needs(*order[0], p, stages) <= done]
        left = [
            (1.0 if orders[p][0][0] == "F" else 2.0) if p in runs and left[p] is None else left[p]
            for p in range(stages)
        ]
        rate = min(1.0, cores / len(runs))
        passed = min(left[p] for p in runs)
        now += passed / rate
        for p in runs:
            left[p] -= passed
            if left[p] < 1e-9:
                done.add((*orders[p].pop(0), p))
                left[p] = None
    return now


def _order(ahead, micro_batches):
    order = [("F", micro) for micro in range(ahead)]
    for micro in range(micro_batches):
        order.append(("B", micro))
        order += [("F", ahead + micro)] if ahead + micro < micro_batches else []
    return order


def _needs(kind, micro, place, stages):
    if kind == "F":
        return {("F", micro, place - 1)} if place else set()
    return {("B", micro, place + 1)} if place + 1 < stages else {("F", micro, place)}


@pytest.mark.parametrize("stages, cores", [(4, 4), (4, 2), (4, 1), (8, 2), (8, 4)])
@pytest.mark.parametrize("micro_batches", [8, 16])
def test_devices_share_cores(stages, cores, micro_batches):
    blocks = EQUAL[:stages]
    options = {"blocks": blocks, "devices": stages, "bandwidth": FAST, "micro_batches": micro_batches, "cores": cores}
    assert predict("1F1B", **options).seconds == pytest.approx(one_f_one_b(stages, micro_batches, cores))
    work = micro_batches * 3.0 * stages / cores
    assert predict("block-parallel", **options).seconds == pytest.approx(work)
    assert predict("data-parallel", **options).seconds == pytest.approx(work)
    assert work <= predict("zero-bubble", **options).seconds <= predict("1F1B", **options).seconds


def test_messages_are_work_for_devices_that_share_cores():
    """A message of 100 bytes takes 2 s, beside the 3 s of a block's local learning; one without zeros half of that."""
    options = {"blocks": EQUAL[:2], "devices": 2, "bandwidth": 50.0, "micro_batches": 8}
    assert predict("block-parallel", **options).seconds == pytest.approx(8 * 3.0)
    assert predict("block-parallel", **options, cores=2).seconds == pytest.approx(8 * 5.0)
    assert predict("block-parallel", **options, cores=1).seconds == pytest.approx(8 * 10.0)
    assert predict("1F1B", **options, cores=1).seconds == pytest.approx(8 * 14.0)
    options["blocks"] = [replace(block, packed=50) for block in EQUAL[:2]]
    assert predict("block-parallel", **options, cores=2).seconds == pytest.approx(8 * 4.0)
    assert predict("1F1B", **options, cores=1).seconds == pytest.approx(8 * 14.0)


def test_memory_is_that_of_one_block_or_of_all_that_wait():
    memory = {method: predict(method, EQUAL, 4, FAST, micro_batches=8).memory for method in METHODS}
    held = 3 * 2 * 50  # parameters, gradients and momenta of two blocks
    assert memory["block-parallel"] == 1000 + 5 * 100 + held
    assert memory["1F1B"] == memory["zero-bubble"] == 4 * 2000 + held
    assert memory["data-parallel"] == 8000 + 3 * 8 * 50


def test_a_slow_link_bounds_the_step():
    bytes_per_second = 10.0  # a message takes 10 s, a stage 6 s
    found = predict("block-parallel", EQUAL, 4, bytes_per_second, micro_batches=8)
    assert found.seconds == pytest.approx(8 * 10)
    assert predict("1F1B", EQUAL, 4, bytes_per_second, micro_batches=8).seconds > 8 * 20
    sparse = [replace(block, packed=80) for block in EQUAL]
    assert predict("block-parallel", sparse, 4, bytes_per_second, micro_batches=8).seconds == pytest.approx(8 * 8)
    ring = 2 * 3 / 4 * 400 / bytes_per_second
    assert predict("data-parallel", EQUAL, 4, bytes_per_second, micro_batches=4).seconds == pytest.approx(8 + ring)


@pytest.mark.parametrize("method", METHODS)
def test_faster_links_are_never_slower_and_rows_share_the_work(method):
    times = [predict(method, EQUAL, 4096, 10.0**power, 1e-3, 64).seconds for power in range(3, 12)]
    assert times == sorted(times, reverse=True)
    assert predict(method, EQUAL, 16, FAST, micro_batches=32).seconds == pytest.approx(
        predict(method, EQUAL, 8, FAST, micro_batches=16).seconds
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "gpipe"}, "method must be one of"),
        ({"devices": 0}, "devices must be positive, got 0"),
        ({"bandwidth": -1}, "bandwidth must be positive, got -1"),
        ({"micro_batches": 0}, "micro_batches must be positive, got 0"),
        ({"cores": 0}, "cores must be positive, got 0"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        predict(**{"method": "1F1B", "blocks": EQUAL, "devices": 2, "bandwidth": 1.0, **options})


def test_blocks_are_counted_exactly():
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5))
    before = [p.detach().clone() for p in net.parameters()]
    x, y = torch.randn(4, 8), torch.randint(5, (4,))
    blocks = profile(net, ["1", "3"], 5, "bwbpf", x, y, nn.functional.cross_entropy, repeats=1)
    assert [block.name for block in blocks] == ["1", "3", "output"]
    assert [block.message for block in blocks] == [4 * 4 * 32, 4 * 4 * 16, 0]
    kept = int((net[:4](x) != 0).sum())
    assert [block.packed for block in blocks] == [4 * 4 * 32, 8 + 4 * kept, 0]  # 64 bits of mask
    assert [block.parameters for block in blocks] == [4 * 9 * 32, 4 * 33 * 16, 4 * 17 * 5]
    assert blocks[1].activations == 4 * 4 * 16  # relu keeps its output; the product's input is kept by the block before
    assert all(time > 0 for block in blocks for time in (block.forward, block.backward, block.local))
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(net.parameters(), before))


def test_the_command_writes_a_table_and_a_plot(tmp_path, capsys):
    options = [
        "--model",
        "mlp",
        "--devices",
        "20",
        "--bandwidth",
        "100M",
        "--batch-size",
        "4",
        "--threads",
        "1",
        "--cores",
        "1",
    ]
    threads = torch.get_num_threads()
    assert main(["plan", *options, "--output", str(tmp_path)]) == 0
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "plan.json").read_text())
    assert (
        len(report["predictions"]) == 4 * 6
        and report["options"]["bandwidth"] == 1e8
        and report["options"]["cores"] == 1
        and list(report["blocks"]) == ["1", "2"]  # measured by one process, and by two at once
    )
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert all(method in printed for method in METHODS)
    assert "2 processes at once" in printed
    assert main(["plan", "--bandwidth", "fast"]) == 2
    assert "must be a positive number, or one followed by k, M or G, got 'fast'" in capsys.readouterr().err
    assert main(["plan", "--model", "mlp", "--cores", "1", "--cuts", "nowhere", "--output", str(tmp_path)]) == 2
    assert "nowhere" in capsys.readouterr().err
