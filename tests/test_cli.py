"""The command line: training, exact resume, comparison, and what it says to a mistake."""

import json
import os
import pickle
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import bllkern
from bllkern import models
from bllkern.cli import checkpoint, data, loop, main, measure, presets

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--train-size", "60", "--test-size", "40", "--batch-size", "20", "--epochs", "3"]


def _train(*arguments, output=None):
    return main(["train", *SMALL, *arguments, *([] if output is None else ["--output", str(output)])])


def _weights(output):
    return torch.load(output / "weights.pt", weights_only=True)


def _same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def _error(capsys):
    """The one line on stderr, without a traceback."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_train_learns_digits(tmp_path, capsys):
    assert main(["train", "--output", str(tmp_path), "--epochs", "8"]) == 0
    printed = capsys.readouterr().out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [epoch["epoch"] for epoch in metrics] == list(range(1, 9))
    assert set(metrics[0]["losses"]) == {"layer1", "layer2", "layer3", "output"}
    assert metrics[-1]["accuracy"] > 0.93 and metrics[-1]["losses"]["layer1"] < metrics[0]["losses"]["layer1"] / 2
    assert f"test accuracy {metrics[-1]['accuracy']:.2%}" in printed and "peak memory" in printed
    # the weights are those of the plain network, and classify as was reported
    plain = models.build("mlp", 10, (1, 8, 8)).eval()
    plain.load_state_dict(_weights(tmp_path))
    digits = data.load("digits")
    right = (plain(digits.test_x).argmax(1) == digits.test_y).double().mean()
    assert right.item() == pytest.approx(metrics[-1]["accuracy"], abs=1e-12)


@pytest.mark.parametrize("schedule", ["eager", "deferred", "immediate"])
def test_schedules_end_with_the_same_weights(tmp_path, schedule):
    assert _train("--schedule", schedule, output=tmp_path / schedule) == 0
    assert _train(output=tmp_path / "default") == 0
    got, expected = _weights(tmp_path / schedule), _weights(tmp_path / "default")
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", sorted(bllkern.objectives.OBJECTIVES))
@pytest.mark.parametrize("model", ["mlp", "convnet"])
def test_objectives(objective, model, capsys):
    assert _train("--objective", objective, "--model", model, "--epochs", "1") == 0
    assert "test accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_presets_train_and_give_way_to_what_is_given(tmp_path, preset, capsys):
    expected = presets.PRESETS[preset]
    given = ["--preset", preset, *SMALL, "--lr", "0.02", "--model", "convnet"]
    assert main(["train", *given, "--output", str(tmp_path / "train")]) == 0
    made = torch.load(tmp_path / "train" / "checkpoint.pt", weights_only=True)["arguments"]
    assert made["optimizer"] == "sgd" and made["lr_schedule"] == "cosine" and made["augment"] == "crop-flip"
    assert made["lr"] == 0.02 and made["epochs"] == 3 and made["weight_decay"] == expected.protocol["weight_decay"]
    assert made["objective"] == expected.objective and made["options"] == expected.options
    assert main(["compare", *given, "--objectives", "backprop", "--seeds", "1", "--output", str(tmp_path / "c")]) == 0
    protocol = json.loads((tmp_path / "c" / "compare.json").read_text())["protocol"]
    assert protocol["optimizer"] == "sgd" and protocol["lr"] == 0.02


def test_an_option_overrides_that_of_the_preset(tmp_path):
    assert _train("--preset", "bll-released", "--option", "prediction=0.5", *SMALL, output=tmp_path) == 0
    options = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["arguments"]["options"]
    assert options == {**presets.PRESETS["bll-released"].options, "prediction": 0.5}


def test_tokens_train(tmp_path, capsys):
    assert _train("--data", "reversal", "--model", "transformer", "--validation", "50", output=tmp_path) == 0
    assert "60 training and 40 validation samples" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert 0 <= metrics[-1]["accuracy"] < 0.5 and 1 < metrics[-1]["loss"] < 3  # log 8 = 2.08 by chance
    # the network of the reversal task must see what follows
    net = models.transformer(8, (10,), causal=False).eval()
    net.load_state_dict(_weights(tmp_path))
    reversal = data.load("reversal", test_size=40, validation=50)
    right = (net(reversal.test_x).argmax(-1) == reversal.test_y).double().mean()
    assert right.item() == pytest.approx(metrics[-1]["accuracy"], abs=1e-12)


def test_options_reach_the_objective(tmp_path):
    for folder, option in (("a", "evidence=1.0"), ("b", "evidence=0.5"), ("c", "family=bernoulli")):
        assert _train("--option", option, output=tmp_path / folder) == 0
    plain, half, bernoulli = (_weights(tmp_path / folder) for folder in "abc")
    assert not _same(plain, half) and not _same(plain, bernoulli)


def test_seed_reproduces(tmp_path):
    for folder, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        assert _train("--seed", seed, output=tmp_path / folder) == 0
    first, second, other = (_weights(tmp_path / folder) for folder in "abc")
    assert _same(first, second) and not _same(first, other)


VARIANTS = {
    "eager": [],
    "immediate": ["--schedule", "immediate", "--cuts", "3"],
    "deferred": ["--schedule", "deferred", "--objective", "predsim"],
    "random numbers in the loss": ["--option", "denoising=1.0", "--option", "noise=0.5"],
    "batch norm": ["--model", "convnet", "--objective", "bwbpf"],
    "augmentation, SGD": ["--augment", "crop-flip", "--optimizer", "sgd", "--lr-schedule", "cosine"],
}


def _interrupt_in_epoch(monkeypatch, number):
    """Ctrl-C while the epoch is evaluated."""
    evaluate = loop.Training.evaluate

    def interrupted(self):
        if len(self.history) + 1 == number:
            raise KeyboardInterrupt
        return evaluate(self)

    monkeypatch.setattr(loop.Training, "evaluate", interrupted)


@pytest.mark.parametrize("arguments", VARIANTS.values(), ids=VARIANTS)
def test_interrupted_training_resumes_bit_for_bit(tmp_path, arguments, monkeypatch, capsys):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert _train(*arguments, output=unbroken) == 0
    with monkeypatch.context() as patch:
        _interrupt_in_epoch(patch, 2)
        assert _train(*arguments, output=broken) == 130
    assert capsys.readouterr().err == "\nbllkern train: interrupted\n"
    assert len(json.loads((broken / "metrics.json").read_text())) == 1
    assert _train(*arguments, "--resume", output=broken) == 0
    assert _same(_weights(broken), _weights(unbroken))
    losses = [[epoch["losses"] for epoch in json.loads((f / "metrics.json").read_text())] for f in (broken, unbroken)]
    assert losses[0] == losses[1]


def test_killed_training_resumes_bit_for_bit(tmp_path):
    arguments = ["--train-size", "100", "--batch-size", "20", "--epochs", "12", "--threads", "1"]
    killed, unbroken = tmp_path / "killed", tmp_path / "unbroken"
    command = [sys.executable, "-m", "bllkern", "train", *arguments, "--output", str(killed)]
    environment = {**os.environ, "PYTHONPATH": str(Path(bllkern.__file__).parents[1])}
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL)
    while not (killed / "checkpoint.pt").exists():
        assert process.poll() is None, "the training ended before its first checkpoint"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (killed / "weights.pt").exists()
    assert main(["train", *arguments, "--output", str(killed), "--resume"]) == 0
    assert main(["train", *arguments, "--output", str(unbroken)]) == 0
    assert _same(_weights(killed), _weights(unbroken))


def test_resume_of_a_finished_training_changes_nothing(tmp_path, capsys):
    assert _train(output=tmp_path) == 0
    before = {name: (tmp_path / name).read_bytes() for name in ("checkpoint.pt", "metrics.json")}
    weights = _weights(tmp_path)
    assert _train("--resume", output=tmp_path) == 0
    assert {name: (tmp_path / name).read_bytes() for name in before} == before and _same(_weights(tmp_path), weights)
    assert "test accuracy" in capsys.readouterr().out


def test_resume_without_a_checkpoint_starts(tmp_path, capsys):
    assert _train("--resume", output=tmp_path / "new") == 0
    assert "no checkpoint in" in _error(capsys)
    assert _train(output=tmp_path / "other") == 0
    assert _same(_weights(tmp_path / "new"), _weights(tmp_path / "other"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The bytes of a good checkpoint, and what it holds."""
    output = tmp_path_factory.mktemp("finished")
    assert _train(output=output) == 0
    file = output / "checkpoint.pt"
    return file.read_bytes(), torch.load(file, weights_only=True)


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def _code(file):
    return pickle.dumps(_Touch(str(file.parent / "ran")))


def _state(content, **changes):
    return {**content, "training": {**content["training"], **changes}}


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda raw, content, file: file.write_bytes(raw[: len(raw) // 2]), "truncated or not a checkpoint"),
        (lambda raw, content, file: file.write_bytes(b""), "truncated or not a checkpoint"),
        (lambda raw, content, file: file.write_text("hello"), "truncated or not a checkpoint"),
        (lambda raw, content, file: file.write_bytes(_code(file)), "truncated or not"),
        (lambda raw, content, file: torch.save(_Touch(str(file.parent / "ran")), file), "truncated or not"),
        (lambda raw, content, file: torch.save(content["training"]["net"], file), "not a checkpoint of bllkern"),
        (lambda raw, content, file: torch.save({**content, "format": "other"}, file), "not a checkpoint of bllkern"),
        (lambda raw, content, file: torch.save({**content, "arguments": 3}, file), "not a checkpoint of bllkern"),
        (lambda raw, content, file: torch.save(_state(content, net={}), file), "does not fit"),
        (lambda raw, content, file: torch.save(_state(content, schedulers=[]), file), "does not fit"),
        (lambda raw, content, file: torch.save(_state(content, order=torch.zeros(3)), file), "does not fit"),
    ],
    ids=["half", "empty", "text", "pickle", "code", "weights", "format", "arguments", "net", "schedulers", "generator"],
)
def test_refused_checkpoints(tmp_path, finished, damage, message, capsys):
    file = tmp_path / "checkpoint.pt"
    damage(*finished, file)
    before = file.read_bytes()
    assert _train("--resume", output=tmp_path) == 2
    error = _error(capsys)
    assert error.startswith(f"bllkern train: error: --resume: {file} ") and message in error
    assert os.listdir(tmp_path) == ["checkpoint.pt"] and file.read_bytes() == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--lr", "0.01"], "--lr 0.004, not 0.01"),
        (["--epochs", "9"], "--epochs 3, not 9"),
        (["--seed", "1"], "--seed 0, not 1"),
        (["--objective", "bwbpf"], "--objective 'bll', not 'bwbpf'"),
        (["--cuts", "layer1"], "--cuts ['layer1', 'layer2', 'layer3'], not ['layer1']"),
        (["--option", "noise=0.5"], "--option {}, not {'noise': 0.5}"),
    ],
)
def test_checkpoint_of_other_arguments(tmp_path, finished, arguments, message, capsys):
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(finished[0])
    assert _train(*arguments, "--resume", output=tmp_path) == 2
    assert _error(capsys) == f"bllkern train: error: --resume: {file} was made with {message}"
    assert os.listdir(tmp_path) == ["checkpoint.pt"] and file.read_bytes() == finished[0]


def test_existing_training_is_not_overwritten(tmp_path, finished, capsys):
    (tmp_path / "checkpoint.pt").write_bytes(finished[0])
    assert _train(output=tmp_path) == 2
    assert "exists; add --resume to continue it" in _error(capsys)
    assert (tmp_path / "checkpoint.pt").read_bytes() == finished[0]


def test_writes_are_atomic(tmp_path, monkeypatch):
    file = tmp_path / "file"
    checkpoint.write_atomically(file, b"old")

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError):
        checkpoint.write_atomically(file, b"new")
    assert file.read_bytes() == b"old"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--objective", "nope"], ["--objective", "'nope'", "bwbpf"]),
        (["--model", "nope"], ["--model", "'nope'", "convnet"]),
        (["--model", "resnet20", "--cuts", "layer1.0.conv1"], ["block 'layer1.0.conv1'", "cut where all paths meet"]),
        (["--data", "nope"], ["--data", "'nope'", "digits"]),
        (["--nope"], ["--nope"]),
        (["--option", "nope=1"], ["'nope'", "bll", "evidence"]),
        (["--option", "evidence=-1"], ["evidence", "-1", "non-negative"]),
        (["--option", "family=nope"], ["family", "'nope'", "poisson"]),
        (["--option", "evidence"], ["--option", "NAME=VALUE"]),
        (["--option", "evidence=1", "--option", "evidence=2"], ["--option", "evidence", "twice"]),
        (["--cuts", "layer1,layr2"], ["cuts", "'layr2'", "layer2"]),
        (["--cuts", "99"], ["cuts", "99"]),
        (["--cuts", "1"], ["--cuts", "backprop"]),
        (["--cuts", "fc"], ["--cuts", "last cut"]),
        (["--cuts", "stages:9"], ["--cuts", "blocks", "4", "'mlp'", "9"]),
        (["--objective", "deep_supervision", "--schedule", "eager"], ["schedule", "'deferred'", "'eager'"]),
        (["--epochs", "0"], ["--epochs", "'0'"]),
        (["--lr", "nan"], ["--lr", "'nan'"]),
        (["--lr", "inf"], ["--lr", "'inf'"]),
        (["--weight-decay", "-1"], ["--weight-decay", "'-1'"]),
        (["--batch-size", "61"], ["--batch-size", "60", "61"]),
        (["--data", "reversal"], ["--model mlp", "images", "--data reversal", "tokens"]),
        (["--model", "transformer"], ["--model transformer", "tokens", "--data digits", "images"]),
        (["--validation", "1437"], ["--validation", "1436", "1437"]),
        (["--optimizer", "nope"], ["--optimizer", "'nope'"]),
        (["--preset", "nope"], ["--preset", "'nope'"]),
        (["--train-size", "2000"], ["--train-size", "1437", "2000"]),
        (["--data", "cifar10"], ["--data-dir"]),
        (["--data", "cifar10", "--data-dir", "/nowhere"], ["--data-dir", "/nowhere"]),
        (["--device", "nope"], ["--device", "nope"]),
        (["--resume"], ["--resume", "--output"]),
        (["--output", "/dev/null/x"], ["--output", "/dev/null/x"]),
        (["--lr", "1e30", "--epochs", "9", "--objective", "backprop"], ["not finite"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_mistakes_are_one_line(arguments, words, capsys):
    assert _train(*arguments) == 2
    error = _error(capsys)
    assert error.startswith("bllkern train: error: ") and [word for word in words if word not in error] == []


def test_compare(tmp_path, capsys):
    names = ["backprop", "bll", "deep_supervision"]
    chosen = ["--objectives", ",".join(names), "--option", "bll.similarity=2.0", "--schedule", "immediate", *SMALL]
    assert main(["compare", *chosen, "--seeds", "2", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "compare.json").read_text())
    assert list(report["objectives"]) == names
    assert report["objectives"]["bll"]["options"] == {"similarity": 2.0}
    assert report["protocol"]["train_size"] == 60 and report["protocol"]["epochs"] == 3
    for entry in report["objectives"].values():
        runs, summary = entry["runs"], entry["summary"]
        assert [run["seed"] for run in runs] == [0, 1]
        first, second = (run["accuracy"] for run in runs)
        assert summary["accuracy_mean"] == pytest.approx((first + second) / 2)
        assert summary["accuracy_std"] == pytest.approx(abs(first - second) / 2**0.5)
        assert summary["peak_bytes"] > 0 and summary["step_seconds"] > 0
    backprop, bll, _ = (entry["summary"] for entry in report["objectives"].values())
    assert bll["accuracy_difference"] == pytest.approx(bll["accuracy_mean"] - backprop["accuracy_mean"])
    text = (tmp_path / "compare.md").read_text()
    assert all(f"\n| {name} " in text for name in names) and text in capsys.readouterr().out
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_killed_comparison_continues(tmp_path, monkeypatch, capsys):
    train_epoch, trained = loop.Training.train_epoch, []

    def interrupted(self, progress):
        trained.append((self.recipe.objective, self.recipe.seed))
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train_epoch(self, progress)

    monkeypatch.setattr(loop.Training, "train_epoch", interrupted)
    chosen = ["compare", *SMALL, "--objectives", "backprop,bll", "--epochs", "1", "--output", str(tmp_path)]
    assert main([*chosen, "--seeds", "2"]) == 130 and not (tmp_path / "compare.json").exists()
    assert main([*chosen, "--seeds", "3"]) == 0  # more seeds continue too
    done = [(name, seed) for seed in range(3) for name in ("backprop", "bll")]
    assert trained == done[:3] + done[2:]
    first = json.loads((tmp_path / "compare.json").read_text())
    assert [[run["seed"] for run in entry["runs"]] for entry in first["objectives"].values()] == [[0, 1, 2]] * 2
    assert main([*chosen, "--seeds", "3", "--option", "bll.similarity=2.0"]) == 0
    assert trained[7:] == done[1::2]  # another objective than before, and the baseline as it was
    assert main([*chosen, "--lr", "0.1"]) == 2
    assert "was made with lr=0.004, not 0.1" in capsys.readouterr().err


def test_compare_agrees_with_train(tmp_path):
    chosen = ["--objectives", "bwbpf", "--seeds", "1", "--seed", "3", "--output", str(tmp_path / "compare")]
    assert main(["compare", *SMALL, *chosen]) == 0
    assert _train("--objective", "bwbpf", "--seed", "3", output=tmp_path / "train") == 0
    entry = json.loads((tmp_path / "compare" / "compare.json").read_text())["objectives"]["bwbpf"]
    assert entry["runs"][0]["accuracy"] == json.loads((tmp_path / "train" / "metrics.json").read_text())[-1]["accuracy"]
    assert entry["summary"]["accuracy_std"] is None and entry["summary"]["step_seconds_ratio"] is None


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--objectives", "bll,nope"], ["--objectives", "'nope'"]),
        (["--objectives", "bll,bll"], ["--objectives", "twice"]),
        (["--option", "similarity=1"], ["--option", "OBJECTIVE.NAME=VALUE"]),
        (["--option", "bll.nope=1"], ["--option", "'nope'"]),
        (["--seeds", "0"], ["--seeds"]),
        (["--cuts", "fc"], ["--cuts"]),
    ],
)
def test_mistakes_in_compare(arguments, words, tmp_path, capsys):
    assert main(["compare", *SMALL, "--output", str(tmp_path / "new"), *arguments]) == 2
    error = _error(capsys)
    assert error.startswith("bllkern compare: error: ") and [word for word in words if word not in error] == []
    assert not (tmp_path / "new").exists()


def test_info_and_module(capsys, monkeypatch):
    assert main(["info"]) == 0
    info = capsys.readouterr().out
    for word in ("bllkern", torch.__version__, "compiled module", "on cpu", "on cuda", *bllkern._ops.SCHEMAS):
        assert word in info
    assert "it runs on CUDA devices only" in info  # why the CUDA kernels do not run on the CPU
    monkeypatch.setattr(sys, "argv", ["bllkern"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("bllkern", run_name="__main__")
    assert end.value.code == 0 and capsys.readouterr().out == info


@pytest.mark.parametrize("command", [[], ["train"], ["compare"]])
def test_help_has_examples(command, capsys):
    assert main([*command, "--help"]) == 0
    assert f"examples:\n  bllkern {' '.join(command)}" in capsys.readouterr().out


def test_peak_memory_of_known_allocations():
    memory = measure.PeakMemory(torch.device("cpu"), steps=2)
    memory.start()
    for numbers in (50_000, 1_000):
        with memory.step():
            first = torch.empty(numbers)
            second = torch.empty(2 * numbers)
            del first
            third = torch.empty(numbers // 2)
            del second, third
    # first and second together, in the last step; the steps before do not count
    assert memory.bytes == 4 * 3_000
