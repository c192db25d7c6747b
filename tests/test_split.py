"""The search of a cut and a head, the file it writes, and what takes that file."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import bllkern
from bllkern import models, objectives
from bllkern.cli import data, loop, main, measure, split
from bllkern.cuts import file as cuts_file
from bllkern.cuts import search
from bllkern.cuts.search import Candidate
from bllkern.objectives import BLL, BWBPF

GOOD = {
    "format": "bllkern cuts 1",
    "model": "convnet",
    "cuts": ["layer1", "layer3"],
    "objective": "predsim",
    "head": "conv",
    "pool": 2,
    "options": {"similarity": 2.0},
    "found": {},
}
SMALL = ["--train-size", "100", "--test-size", "40", "--batch-size", "20", "--threads", "1"]
SEARCH = [*SMALL, "--blocks", "3", "--epochs", "3", "--candidates", "5", "--seeds", "2"]
EXAMPLE = torch.zeros(2, 1, 8, 8)


@pytest.fixture(autouse=True, scope="module")
def quick():
    """One thread, and no full garbage collection before each training, which takes longer than the training here."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure.gc, "collect", lambda: 0)
        yield
    torch.set_num_threads(threads)


def convnet():
    return models.build("convnet", 10, (1, 8, 8))


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def recipes(net):
    """The objective at each boundary of ``net``, by its name."""
    return {name: boundary.options for name, boundary in bllkern.network.boundaries(net).items()}


@pytest.mark.parametrize("kind", [str, Path])
def test_convert_takes_a_file(tmp_path, kind):
    file = kind(write(tmp_path / "cuts.json", GOOD))
    predsim = objectives.PredSim(similarity=2.0, head="conv", pool=2)
    assert recipes(bllkern.convert(convnet(), file, 10)) == {"layer1": predsim, "layer3": predsim}
    net = bllkern.convert(convnet(), file, 10, example=EXAMPLE)
    bllkern.assert_isolated(net, torch.randn(8, 1, 8, 8), torch.arange(8))


def test_convert_asks_the_file_only_for_what_is_not_given(tmp_path):
    file = write(tmp_path / "cuts.json", GOOD)
    for objective, expected in [
        ("predsim", objectives.PredSim(similarity=2.0, head="conv", pool=2)),
        ("bwbpf", BWBPF(head="conv", pool=2)),
        (BLL(family="bernoulli"), BLL(family="bernoulli")),
        ("backprop", objectives.Backprop()),
    ]:
        assert recipes(bllkern.convert(convnet(), file, 10, objective)) == {"layer1": expected, "layer3": expected}


@pytest.mark.parametrize(
    "changes, message",
    [
        ("{", "is not a JSON file"),
        ("[1, 2]", "field 'format' must be 'bllkern cuts 1'"),
        ({"format": "bllkern cuts 2"}, "field 'format' must be 'bllkern cuts 1'"),
        ({"cuts": None}, "field 'cuts' must be a list of module names, got None"),
        ({"cuts": []}, "field 'cuts' must be a list of module names"),
        ({"cuts": ["layer1", 2]}, "field 'cuts' must be a list of module names"),
        ({"objective": "backprop"}, r"field 'objective' must be one of \['bll', .*'predsim'.*\], got 'backprop'"),
        ({"model": 3}, "field 'model' must be of type str, got 3"),
        ({"head": "deep"}, "field 'head', 'pool' or 'options': head must be one of"),
        ({"pool": True}, "field 'pool' must be of type int, got True"),
        ({"pool": 0}, "field 'head', 'pool' or 'options': pool must be a positive integer"),
        ({"options": {"family": "poisson"}}, "'options': objective 'predsim' has no option 'family'"),
        ({"options": []}, "field 'options' must be of type dict"),
        ({"cut": ["layer1"]}, "field 'cut' is unknown"),
        ({"head": ...}, "field 'head' is missing"),
    ],
)
def test_malformed_files(tmp_path, changes, message, capsys):
    content = changes if isinstance(changes, str) else {k: v for k, v in {**GOOD, **changes}.items() if v is not ...}
    file = write(tmp_path / "cuts.json", content)
    with pytest.raises(ValueError, match=f"^cuts: {file}:? .*{message}"):
        bllkern.convert(convnet(), file, 10)
    assert main(["train", "--model", "convnet", *SMALL, "--cuts", str(file)]) == 2
    assert f"bllkern train: error: cuts: {file}" in capsys.readouterr().err


def test_files_that_are_not_there(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="cuts: .*nothing.json: No such file"):
        bllkern.convert(convnet(), tmp_path / "nothing.json", 10)
    with pytest.raises(ValueError, match="cuts must be module names, a number of blocks, or a .json file"):
        bllkern.convert(convnet(), "layer1", 10)
    assert main(["train", "--cuts", str(tmp_path / "nothing.json")]) == 2
    assert "nothing.json" in capsys.readouterr().err


def test_train_takes_a_file(tmp_path):
    file = write(tmp_path / "cuts.json", GOOD)
    command = ["train", "--model", "convnet", *SMALL, "--epochs", "1", "--output"]
    spelled = ["--objective", "predsim", "--option", "head=conv", "--option", "pool=2"]
    assert main([*command, str(tmp_path / "a"), "--cuts", str(file), "--option", "similarity=3.0"]) == 0
    assert main([*command, str(tmp_path / "b"), "--cuts", "layer1,layer3", *spelled, "--option", "similarity=3.0"]) == 0
    first, second = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in "ab")
    assert first[0]["losses"] == second[0]["losses"] and set(first[0]["losses"]) == {"layer1", "layer3", "output"}


def test_places_know_their_heads():
    assert split.places_of(convnet(), BLL(), EXAMPLE) == {
        "layer1.3": ["linear", "mlp", "conv"],
        "layer2.3": ["linear", "mlp", "conv"],
        "layer3.3": ["linear", "mlp", "conv"],
        "flatten": ["linear", "mlp"],
    }
    bootstrapped = split.places_of(convnet(), BLL(bootstrapping=True), EXAMPLE)
    assert set(map(tuple, bootstrapped.values())) == {("linear",)}


def test_samples_are_different_seeded_and_possible():
    places = {"a": ["linear", "conv"], "b": ["linear", "conv"], "c": ["linear"]}
    drawn = search.sample(places, 3, 12, seed=1)
    assert len(drawn) == len(set(drawn)) == 12 and drawn == search.sample(places, 3, 12, seed=1)
    assert drawn != search.sample(places, 3, 12, seed=2)
    assert {c.cuts for c in drawn} == {("a", "b"), ("a", "c"), ("b", "c")}
    assert all(c.head == "linear" for c in drawn if "c" in c.cuts)
    assert len(search.sample(places, 3, 99, seed=0)) == 12  # 2 cuts x 3 pools, and 1 x 2 x 3
    with pytest.raises(ValueError, match="number of blocks must be from 2 to 4, got 5"):
        search.sample(places, 5, 1, seed=0)


@pytest.mark.parametrize(
    "count, epochs, expected",
    [(24, 9, [(24, 1), (8, 3), (3, 9)]), (6, 3, [(6, 1), (2, 3)]), (5, 2, [(5, 2)]), (1, 1, [(1, 1)])],
)
def test_rungs(count, epochs, expected):
    assert search.rungs(count, epochs) == expected


def test_halving_stops_the_bad_ones_early():
    candidates = [Candidate(("a",), "linear", pool) for pool in range(1, 10)]
    trained = []

    def score(candidate, epochs):
        trained.append((candidate.pool, epochs))
        return None if candidate.pool == 9 else float(candidate.pool)

    assert search.halving(candidates, 9, score).pool == 8
    assert trained == [*((pool, 1) for pool in range(1, 10)), (8, 3), (7, 3), (6, 3), (8, 9)]
    with pytest.raises(ValueError, match="every candidate is over the budget or has diverged"):
        search.halving(candidates, 9, lambda *_: None)


@pytest.mark.parametrize(
    "cuts, expected",
    [
        (["layer1.2", "layer2.2"], ["layer1.8", "layer2.8"]),  # a stage's end is a stage's end
        (["layer1", "layer2"], ["layer1.8", "layer2.8"]),  # also by the stage's name
        (["layer1.0", "layer2.1", "layer3.0"], ["layer1.2", "layer2.5", "layer3.2"]),  # a third, two thirds, a third
        (["relu", "layer1.1", "layer3.1"], ["maxpool", "layer1.5", "layer3.5"]),
        (["layer2.2", "avgpool"], ["layer2.8", "avgpool"]),  # the pooling belongs to the last unit
    ],
)
def test_transfer_keeps_stage_and_depth(cuts, expected):
    shallow, deep = (models.build(name, 10, (3, 16, 16)) for name in ("resnet20", "resnet56"))
    example = torch.zeros(1, 3, 16, 16)
    assert search.transfer(cuts, shallow, deep, example) == expected
    bllkern.convert(deep, expected, 10)


def test_transfers_that_cannot_be():
    shallow, deep = (models.build(name, 10, (3, 16, 16)) for name in ("resnet20", "resnet56"))
    example = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match="'layer9' is not a place to cut the source"):
        search.transfer(["layer9"], shallow, deep, example)
    with pytest.raises(ValueError, match="two fall on one place"):
        search.transfer(["layer1.0", "layer1.1"], deep, shallow, example)
    with pytest.raises(ValueError, match="no stage 'layer1', in which 'layer1.0' lies"):
        search.transfer(["layer1.0"], shallow, models.build("vgg11", 10, (3, 32, 32)), torch.zeros(1, 3, 32, 32))


def test_the_held_out_images_are_not_trained_on():
    digits = data.load("digits")
    part = split.held_out(digits)
    assert len(part.test_x) == len(digits.train_x) // 5 and len(part.train_x) + len(part.test_x) == len(digits.train_x)
    together = torch.cat([part.train_x, part.test_x]).flatten(1)
    assert torch.equal(together.unique(dim=0), digits.train_x.flatten(1).unique(dim=0))
    again = split.held_out(digits)
    assert torch.equal(again.test_x, part.test_x) and torch.equal(again.test_y, part.test_y)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """The folder of a finished search."""
    folder = tmp_path_factory.mktemp("searched")
    assert main(["split", "convnet", *SEARCH, "--output", str(folder / "cuts.json")]) == 0
    return folder


def test_split_finds_and_reports(searched, capsys):
    file = cuts_file.read(searched / "cuts.json")
    table = file.found["table"]
    assert {"even by layers", "even by cost", "found by search"} <= table.keys()
    assert table["even by layers"]["cuts"] == ["layer1.3", "layer3.3"] and table["even by layers"]["head"] == "auto"
    found = table["found by search"]
    assert (file.cuts, file.head, file.pool) == (found["cuts"], found["head"], found["pool"])
    for row in table.values():
        first, second = (run["accuracy"] for run in row["runs"])
        assert row["accuracy_mean"] == pytest.approx((first + second) / 2)
        assert row["accuracy_std"] == pytest.approx(abs(first - second) / 2**0.5)
        assert row["step_seconds_ratio"] > 0 and row["peak_bytes_ratio"] > 0
    assert "beat both even cuts by more than the seeds' spread" in file.found["found by search"]
    # the one with the best validation accuracy of those that trained longest
    results = json.loads((searched / "cuts.journal.json").read_text())["results"]
    chosen = [(json.loads(key), result["accuracy"]) for key, result in results.items()]
    last = {(*c[3], c[2]["head"], c[2]["pool"]): a for c, a in chosen if c[0] == "validation" and c[4] == 3}
    assert len(last) == 2 and max(last, key=last.get) == (*file.cuts, file.head, file.pool)
    bllkern.convert(convnet(), searched / "cuts.json", 10)


def test_the_same_command_again_trains_nothing(searched, monkeypatch):
    before = (searched / "cuts.json").read_bytes()
    monkeypatch.setattr(loop.Training, "train_epoch", None)
    assert main(["split", "convnet", *SEARCH, "--output", str(searched / "cuts.json")]) == 0
    assert (searched / "cuts.json").read_bytes() == before


def accuracies(path):
    return {key: result["accuracy"] for key, result in json.loads(path.read_text())["results"].items()}


def test_a_killed_search_continues(searched, tmp_path):
    journal = tmp_path / "cuts.journal.json"
    command = [sys.executable, "-m", "bllkern", "split", "convnet", *SEARCH, "--output", str(tmp_path / "cuts.json")]
    environment = {**os.environ, "PYTHONPATH": str(Path(bllkern.__file__).parents[1])}
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while not journal.exists():
            assert process.poll() is None and time.monotonic() < end, "the search ended before its first result"
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    done = accuracies(journal)
    assert 0 < len(done) < len(accuracies(searched / "cuts.journal.json")) and not (tmp_path / "cuts.json").exists()
    assert main(["split", "convnet", *SEARCH, "--output", str(tmp_path / "cuts.json")]) == 0
    assert accuracies(journal) == accuracies(searched / "cuts.journal.json")
    first, second = (cuts_file.read(folder / "cuts.json") for folder in (tmp_path, searched))
    assert (first.cuts, first.head, first.pool) == (second.cuts, second.head, second.pool)


def test_the_budget_drops_what_costs_more(tmp_path, capsys):
    arguments = ["split", "convnet", *SEARCH, "--output", str(tmp_path / "cuts.json")]
    assert main([*arguments, "--max-memory-ratio", "0.01"]) == 2
    assert "every candidate is over the budget" in capsys.readouterr().err and not (tmp_path / "cuts.json").exists()
    results = json.loads((tmp_path / "cuts.journal.json").read_text())["results"]
    memory = sorted({r["peak_bytes"] for key, r in results.items() if '"backprop"' not in key})
    backprop = next(r["peak_bytes"] for key, r in results.items() if '"backprop"' in key)
    limit = memory[0] / backprop + 1e-9  # only the candidates that hold least pass
    assert len(memory) > 1 and main([*arguments, "--max-memory-ratio", str(limit)]) == 0
    row = json.loads((tmp_path / "cuts.json").read_text())["found"]["table"]["found by search"]
    key = next(k for k in results if json.loads(k)[3] == row["cuts"] and json.loads(k)[2]["head"] == row["head"])
    assert results[key]["peak_bytes"] <= limit * backprop


def test_transfer_reports_what_it_keeps(tmp_path, capsys):
    source = {**GOOD, "model": "convnet", "cuts": ["layer1.3", "layer2.3"], "objective": "bwbpf", "options": {}}
    file = write(tmp_path / "shallow.json", source)
    options = [*SMALL, "--epochs", "1", "--candidates", "3", "--seeds", "2", "--output", str(tmp_path / "deep.json")]
    assert main(["split", "convnet", "--from", str(file), *options]) == 0
    printed = capsys.readouterr().out
    found = cuts_file.read(tmp_path / "deep.json")
    assert (found.cuts, found.head, found.pool, found.objective) == (source["cuts"], "conv", 2, "bwbpf")
    table = found.found["table"]
    assert table["transferred"]["cuts"] == found.cuts and "found by search" in table
    results = json.loads((tmp_path / "deep.journal.json").read_text())["results"]
    searched = [json.loads(key)[2:4] for key in results if key.startswith('["validation", "bwbpf"')]
    assert len(searched) == 3 and [{"head": "conv", "pool": 2}, source["cuts"]] not in searched
    assert found.found["kept"] in printed and "kept by the transfer: " in printed
    assert main(["split", "convnet", "--from", str(file), *options, "--candidates", "0"]) == 0  # without a search
    again = cuts_file.read(tmp_path / "deep.json")
    assert again.cuts == found.cuts and "kept" not in again.found
    assert again.found["table"].keys() == {"even by layers", "even by cost", "transferred"}


def test_a_preset_and_what_replaces_it(tmp_path, capsys):
    arguments = [*SMALL, "--blocks", "3", "--epochs", "1", "--candidates", "1", "--seeds", "1", "--preset", "bwbpf"]
    assert main(["split", "convnet", *arguments, "--lr", "0.02", "--output", str(tmp_path / "cuts.json")]) == 0
    file = cuts_file.read(tmp_path / "cuts.json")
    assert (file.objective, file.head, file.options) == ("bwbpf", "linear", {"label_smoothing": 0.0})
    assert (file.found["protocol"]["optimizer"], file.found["protocol"]["lr"]) == ("sgd", 0.02)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["validation", "test"]
    assert lines[0].endswith("epochs 1  seed 0  layer1.3, layer3.3; linear, pool 4")


def test_the_share_kept():
    def report(layers, cost, direct, transferred):
        values = {"even by layers": layers, "even by cost": cost, "found by search": direct, "transferred": transferred}
        return {name: {"accuracy_mean": value, "accuracy_std": 0.01} for name, value in values.items()}

    assert split.kept(report(0.5, 0.6, 0.8, 0.7)) == pytest.approx(0.5)
    assert split.kept(report(0.5, 0.6, 0.6, 0.7)) is None
    assert split._verdicts(report(0.5, 0.6, 0.8, 0.609)) == {
        "found by search": "found by search: beats both even cuts by more than the seeds' spread",
        "transferred": "transferred: does not beat both even cuts by more than the seeds' spread",
        "kept": "kept by the transfer: 76% of the direct search's accuracy; 5% of its gain over the better even cut",
    }
    assert split._verdicts(report(0.5, 0.6, 0.608, 0.604))["kept"].endswith(
        " 99% of the direct search's accuracy; 50% of its gain over the better even cut, which is within the seeds' "
        "spread"
    )
    assert split._verdicts(report(0.5, 0.6, 0.5, 0.6))["kept"].endswith(
        " 120% of the direct search's accuracy; its gain over the better even cut is none"
    )


def test_help_has_examples(capsys):
    assert main(["split", "--help"]) == 0
    assert "examples:\n  bllkern split" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["--blocks", "--from"]),
        (["--blocks", "1"], ["--blocks", "'1'"]),
        (["--blocks", "9"], ["--blocks", "2 to 5", "9"]),
        (["--blocks", "3", "--candidates", "0"], ["--candidates", "--from"]),
        (["--blocks", "3", "--objective", "backprop"], ["--objective", "'backprop'"]),
        (["--blocks", "3", "--option", "nope=1"], ["'nope'"]),
        (["--blocks", "3", "--max-time-ratio", "0"], ["--max-time-ratio", "'0'"]),
        (["--blocks", "3", "--cuts", "layer1"], ["--cuts"]),
        (["--from", "nothing.json"], ["--from", "nothing.json"]),
        (["--from", "{file}", "--blocks", "4"], ["--blocks", "must be 3", "got 4"]),
        (["--blocks", "3", "--output", "/dev/null/x.json"], ["--output", "/dev/null"]),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, words, capsys):
    file = write(tmp_path / "shallow.json", GOOD)
    arguments = [argument.replace("{file}", str(file)) for argument in arguments]
    assert main(["split", "convnet", *SMALL, "--output", str(tmp_path / "new.json"), *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("bllkern split: error: ")
    assert [word for word in words if word not in lines[0]] == [] and os.listdir(tmp_path) == ["shallow.json"]


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": "bllkern journal 1", "arguments": {}, "results": {"a": 1}}']
)
def test_a_foreign_journal_is_refused(tmp_path, content, capsys):
    write(tmp_path / "cuts.journal.json", content)
    assert main(["split", "convnet", *SEARCH, "--output", str(tmp_path / "cuts.json")]) == 2
    assert "is not a journal of bllkern" in capsys.readouterr().err


def test_a_journal_of_other_arguments_is_refused(searched, capsys):
    before = (searched / "cuts.journal.json").read_bytes()
    assert main(["split", "convnet", *SEARCH, "--lr", "0.1", "--output", str(searched / "cuts.json")]) == 2
    assert "was made with lr=0.004, not 0.1" in capsys.readouterr().err
    assert (searched / "cuts.journal.json").read_bytes() == before


def test_what_diverges_is_dropped_and_does_not_end_the_search(tmp_path, monkeypatch):
    train_epoch = loop.Training.train_epoch

    def diverging(self, progress):
        if self.recipe.options.get("head") == "linear" and len(self.data.test_x) == 20:  # while searching
            raise FloatingPointError("the loss is not finite")
        return train_epoch(self, progress)

    monkeypatch.setattr(loop.Training, "train_epoch", diverging)
    arguments = [*SMALL, "--blocks", "3", "--epochs", "1", "--candidates", "5", "--seeds", "1"]
    assert main(["split", "convnet", *arguments, "--output", str(tmp_path / "cuts.json")]) == 0
    assert cuts_file.read(tmp_path / "cuts.json").head != "linear"
