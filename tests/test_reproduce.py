"""The papers' tables: published figures, what is measured beside them, and what is not."""

import json

import pytest

from bllkern import models, objectives
from bllkern.cli import loop, main, measure, published, reproduce
from bllkern.cli.published import PAPERS, SCALES, Scale

QUICK = {"batch_size": 20, "lr": 4e-3, "weight_decay": 1e-2, "train_size": 60, "test_size": 40, "epochs": 1}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Trainings of a fraction of a second in place of the scales'."""
    monkeypatch.setitem(published.NAMES, "digits", "digits")
    monkeypatch.setattr(measure.gc, "collect", lambda: 0)  # which takes longer than these trainings
    for paper in PAPERS:
        monkeypatch.setitem(SCALES, (paper, "cpu"), Scale((("digits", "mlp"),), QUICK, seeds=2))


def run(output, *arguments, paper="bwbpf"):
    command = ["reproduce", paper, "--scale", "cpu", "--device", "cpu", "--output", str(output)]
    return main([*command, *arguments])


def cells(text, label):
    """The cells of the table's row that starts with ``label``."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {label} ")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


@pytest.mark.parametrize("paper", PAPERS)
def test_published_and_measured_side_by_side(paper, tmp_path, capsys):
    assert run(tmp_path, paper=paper) == 0
    report = json.loads((tmp_path / f"{paper}-cpu.json").read_text())
    text = (tmp_path / f"{paper}-cpu.md").read_text()
    assert text in capsys.readouterr().out and (tmp_path / f"{paper}-cpu.png").read_bytes().startswith(PNG)
    methods, columns = PAPERS[paper].methods, PAPERS[paper].columns
    assert len(report["results"]) == 2 * len(methods)
    row = next(row for row in report["table"] if row["data"] == "digits")
    for method in methods:
        first, second = (1 - report["results"][f"digits/mlp/{method}/{seed}"]["accuracy"] for seed in (0, 1))
        cell = row["measured"][method]
        assert cell["seeds"] == 2 and cell["error_mean"] == pytest.approx((first + second) / 2)
        assert cell["error_std"] == pytest.approx(abs(first - second) / 2**0.5)
        printed = f"{100 * cell['error_mean']:.2f} ± {100 * cell['error_std']:.2f}"
        assert cells(text, "digits, mlp")[len(columns) + list(methods).index(method)] == printed
    assert cells(text, "digits, mlp")[: len(columns)] == ["-"] * len(columns)
    assert "60 training and 40 test samples, 1 epochs" in text


def test_it_trains_as_bllkern_train_does(tmp_path):
    assert run(tmp_path, "--seeds", "1") == 0
    command = ["train", "--objective", "bwbpf", "--option", "label_smoothing=0.0", "--output", str(tmp_path / "train")]
    assert main([*command, "--train-size", "60", "--test-size", "40", "--batch-size", "20", "--epochs", "1"]) == 0
    results = json.loads((tmp_path / "bwbpf-cpu.json").read_text())["results"]
    metrics = json.loads((tmp_path / "train" / "metrics.json").read_text())
    assert results["digits/mlp/bwbpf, isolated/0"]["accuracy"] == metrics[-1]["accuracy"]


def test_an_interrupted_table_continues(tmp_path, monkeypatch):
    train_epoch, trained = loop.Training.train_epoch, []

    def interrupted(self, progress):
        trained.append((self.recipe.objective, self.recipe.seed))
        if len(trained) == 4:
            raise KeyboardInterrupt
        return train_epoch(self, progress)

    monkeypatch.setattr(loop.Training, "train_epoch", interrupted)
    assert run(tmp_path) == 130
    text = (tmp_path / "bwbpf-cpu.md").read_text()
    unmeasured = ["not measured"] * 4
    assert cells(text, "CIFAR-10, resnet50") == ["7.99", "8.93", "8.27", "7.53", "4.85", *unmeasured]
    assert cells(text, "Tiny-ImageNet, vgg19") == ["47.11", "55.30", "48.70", "43.44", "40.09", *unmeasured]
    partial = cells(text, "digits, mlp")[5:]
    assert partial[3] == "not measured" and all(cell.endswith(" (1 of 2 seeds)") for cell in partial[:3])
    before = json.loads((tmp_path / "bwbpf-cpu.json").read_text())["results"]
    assert len(before) == 3 and run(tmp_path) == 0
    assert len(trained) == 4 + 5 and trained[4] == ("deep_supervision", 0)
    after = json.loads((tmp_path / "bwbpf-cpu.json").read_text())["results"]
    assert {key: after[key] for key in before} == before and len(after) == 8
    assert run(tmp_path) == 0 and len(trained) == 9
    assert "not measured" not in cells((tmp_path / "bwbpf-cpu.md").read_text(), "digits, mlp")


def test_what_diverges_does_not_end_the_table(tmp_path, monkeypatch, capsys):
    train_epoch = loop.Training.train_epoch

    def diverging(self, progress):
        if self.recipe.objective == "predsim" or self.recipe.objective == "backprop" and self.recipe.seed:
            raise FloatingPointError("the loss is not finite")
        return train_epoch(self, progress)

    monkeypatch.setattr(loop.Training, "train_epoch", diverging)
    assert run(tmp_path) == 0
    backprop, predsim, *others = cells((tmp_path / "bwbpf-cpu.md").read_text(), "digits, mlp")[5:]
    assert backprop.endswith(" (1 of 2 seeds, 1 diverged)") and predsim == "diverged"
    assert all("diverged" not in cell and "seeds" not in cell for cell in others)
    assert "digits, mlp, predsim, seed 1: diverged\n" in capsys.readouterr().out


def test_data_that_is_missing_is_named(tmp_path, monkeypatch, capsys):
    rows = (("cifar10", "convnet"), ("digits", "mlp"))
    monkeypatch.setitem(SCALES, ("bwbpf", "cpu"), Scale(rows, QUICK, seeds=1))
    assert run(tmp_path, "--data-dir", "/nowhere") == 0
    assert "cifar10 convnet is not measured: --data-dir: no folder /nowhere" in capsys.readouterr().err
    text = (tmp_path / "bwbpf-cpu.md").read_text()
    assert cells(text, "CIFAR-10, convnet")[5:] == ["not measured"] * 4
    assert "not measured" not in cells(text, "digits, mlp")
    monkeypatch.setitem(SCALES, ("bwbpf", "cpu"), Scale(rows[:1], QUICK, seeds=1))
    assert run(tmp_path / "new") == 2 and "--data-dir" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_a_table_of_another_protocol_is_refused(tmp_path, monkeypatch, capsys):
    assert run(tmp_path, "--seeds", "1") == 0
    before = (tmp_path / "bwbpf-cpu.json").read_bytes()
    monkeypatch.setitem(SCALES, ("bwbpf", "cpu"), Scale((("digits", "mlp"),), {**QUICK, "lr": 1e-3}, seeds=1))
    assert run(tmp_path) == 2
    assert "was made with lr=0.004, not 0.001" in capsys.readouterr().err
    monkeypatch.setitem(SCALES, ("bwbpf", "cpu"), Scale((("digits", "mlp"),), QUICK, seeds=1))
    monkeypatch.setitem(PAPERS["bwbpf"].methods, "predsim", ("predsim", {"similarity": 1.0}))
    assert (
        run(tmp_path) == 2
        and "was made with methods.predsim.similarity=4.0, not 1.0; choose" in capsys.readouterr().err
    )
    assert (tmp_path / "bwbpf-cpu.json").read_bytes() == before


@pytest.mark.parametrize("arguments", [["nope", "--scale", "cpu"], ["bll"], ["bll", "--scale", "tpu"]])
def test_mistakes_are_one_line(arguments, capsys):
    assert main(["reproduce", *arguments]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_every_cell_of_every_scale_can_be_trained(monkeypatch):
    monkeypatch.undo()
    for (name, _), scale in SCALES.items():
        for row in scale.rows:
            for method, (objective, options) in PAPERS[name].methods.items():
                recipe = reproduce._recipe(PAPERS[name], scale, row, method, 0)
                assert recipe.cuts == models.default_cuts(row[1]) and recipe.epochs == scale.recipe["epochs"]
                objectives.get(objective, **options).build(10)
            assert row[0] in published.NAMES


def test_every_published_row_has_every_column():
    for paper in PAPERS.values():
        assert all(len(errors) == len(paper.columns) for errors in paper.published.values())
        assert {name for name, _ in paper.published} <= published.NAMES.keys()
    # the paper's own method, as the text of arXiv 2312.13311 gives it
    assert [errors[-1] for errors in PAPERS["bwbpf"].published.values()] == [
        *(6.52, 4.85, 4.53, 4.48),
        *(40.09, 35.83, 35.28, 35.01),
    ]
