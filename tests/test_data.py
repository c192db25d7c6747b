"""The data sets of the command line: what is read, in which order, and what is refused."""

import io
import os
import pickle

import numpy as np
import pytest
import torch

from bllkern.cli import data
from bllkern.cli.data import cifar
from bllkern.cli.errors import UserError

PER_FILE = 6
FILES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


class _Python2Pickler(pickle._Pickler):
    """Writes str and bytes as Python 2 wrote its str: what the published CIFAR-10 files contain."""

    dispatch = dict(pickle._Pickler.dispatch)

    def _save_string(self, text):
        content = text.encode("latin1") if isinstance(text, str) else text
        self.write(b"T" + len(content).to_bytes(4, "little") + content)
        self.memoize(text)

    dispatch[bytes] = dispatch[str] = _save_string


def _python2(content):
    file = io.BytesIO()
    _Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue().replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray")


DUMPS = {
    "python 2": _python2,
    "protocol 2, bytes": lambda content: pickle.dumps({key.encode(): v for key, v in content.items()}, protocol=2),
    "protocol 4, str": lambda content: pickle.dumps(content, protocol=4),
}


def _batch(i):
    """Images whose every pixel is different, labels 0, 1, 2, ..."""
    rng = np.random.default_rng(i)
    return {"data": rng.integers(0, 256, (PER_FILE, 3072), np.uint8), "labels": [(i + k) % 10 for k in range(PER_FILE)]}


def _write(folder, dumps=DUMPS["protocol 4, str"]):
    folder = folder / cifar.LAYOUTS["cifar10"].folder
    folder.mkdir(parents=True)
    for i, name in enumerate(FILES):
        (folder / name).write_bytes(dumps(_batch(i)))
    return folder


def test_digits():
    digits = data.load("digits")
    assert digits.train_x.shape == (1437, 1, 8, 8) and digits.test_x.shape == (360, 1, 8, 8)
    assert digits.train_x.dtype == torch.float32 and digits.train_y.dtype == torch.int64
    assert abs(digits.train_x.mean()) < 1e-6 and abs(digits.train_x.std(correction=0) - 1) < 1e-6
    train, test = digits.train_y.bincount(), digits.test_y.bincount()
    assert ((train + test) * 360 / 1797 - test).abs().max() < 1  # every class in proportion
    again = data.load("digits")
    assert torch.equal(digits.train_x, again.train_x) and torch.equal(digits.test_y, again.test_y)


def test_sizes_take_the_first_of_a_permutation():
    large, small = (data.load("digits", train_size=n, test_size=n) for n in (50, 20))
    assert len(large.train_y) == len(large.test_y) == 50
    assert torch.equal(large.train_y[:20], small.train_y) and torch.equal(large.test_y[:20], small.test_y)
    assert len(small.train_y.unique()) > 5


@pytest.mark.parametrize("sizes", [{"train_size": 1438}, {"test_size": 361}, {"train_size": 0}])
def test_sizes_beyond_the_data(sizes):
    (name,) = sizes
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} must be from 1 to"):
        data.load("digits", **sizes)


@pytest.mark.parametrize("dumps", DUMPS.values(), ids=DUMPS)
@pytest.mark.parametrize("inside", [False, True], ids=["parent", "folder itself"])
def test_cifar10(tmp_path, dumps, inside):
    folder = _write(tmp_path, dumps)
    cifar = data.load("cifar10", str(folder if inside else tmp_path))
    images = np.concatenate([_batch(i)["data"] for i in range(5)]).reshape(-1, 3, 32, 32).astype(np.float64)
    mean, std = images.mean((0, 2, 3), keepdims=True), images.std((0, 2, 3), keepdims=True)
    np.testing.assert_allclose(cifar.train_x.numpy(), (images - mean) / std, atol=1e-5)
    test = _batch(5)["data"].reshape(-1, 3, 32, 32)
    np.testing.assert_allclose(cifar.test_x.numpy(), (test - mean) / std, atol=1e-5)
    assert cifar.train_y.tolist() == [label for i in range(5) for label in _batch(i)["labels"]]
    assert cifar.test_y.tolist() == _batch(5)["labels"]


def test_constant_channel_stays_finite(tmp_path):
    folder = _write(tmp_path)
    content = {"data": np.zeros((3, 3072), np.uint8), "labels": [0, 1, 2]}
    for name in FILES[:-1]:
        (folder / name).write_bytes(pickle.dumps(content))
    assert torch.equal(data.load("cifar10", str(tmp_path)).train_x, torch.zeros(15, 3, 32, 32))


class _Touch:
    """Unpickled without care, creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_pickle_does_not_run(tmp_path):
    folder, victim = _write(tmp_path), tmp_path / "ran"
    (folder / "data_batch_2").write_bytes(pickle.dumps({"data": _Touch(str(victim))}))
    with pytest.raises(UserError, match=r"data_batch_2 .*posix\.mkdir"):
        data.load("cifar10", str(tmp_path))
    assert not victim.exists()


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("name", ["data_batch_4", "test_batch"])
def test_truncated_file(tmp_path, name, keep):
    file = _write(tmp_path) / name
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    with pytest.raises(UserError, match=f"{name} is truncated or not a CIFAR-10 file"):
        data.load("cifar10", str(tmp_path))


GOOD = {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 9]}


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {},
        {**GOOD, "labels": [0]},
        {**GOOD, "labels": [0, 10]},
        {**GOOD, "labels": [0, "1"]},
        {**GOOD, "data": np.zeros((2, 3072), np.float32)},
        {**GOOD, "data": np.zeros((2, 3071), np.uint8)},
        {**GOOD, "data": np.zeros((2, 3, 32, 32), np.uint8)},
        {"data": np.zeros((0, 3072), np.uint8), "labels": []},
    ],
)
def test_foreign_content(tmp_path, content):
    folder = _write(tmp_path)
    (folder / "data_batch_1").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="data_batch_1 is not a CIFAR-10 file"):
        data.load("cifar10", str(tmp_path))


def test_text_file(tmp_path):
    (_write(tmp_path) / "data_batch_1").write_text("<html>not found</html>")
    with pytest.raises(UserError, match="data_batch_1 is truncated or not a CIFAR-10 file"):
        data.load("cifar10", str(tmp_path))


def test_missing(tmp_path):
    with pytest.raises(UserError, match="--data cifar10 needs --data-dir"):
        data.load("cifar10")
    with pytest.raises(UserError, match=f"no folder {tmp_path}/cifar-10-batches-py"):
        data.load("cifar10", str(tmp_path))
    (_write(tmp_path) / "data_batch_5").unlink()
    with pytest.raises(UserError, match="data_batch_5 is missing"):
        data.load("cifar10", str(tmp_path))


def test_cifar100_has_fine_labels(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for i, name in enumerate(("train", "test")):
        content = {"data": _batch(i)["data"], "fine_labels": [0, 99, 7, 8, 9, 10], "coarse_labels": [1] * PER_FILE}
        (folder / name).write_bytes(pickle.dumps(content))
    found = data.load("cifar100", str(tmp_path))
    assert found.train_y.tolist() == [0, 99, 7, 8, 9, 10] and found.num_classes == 100
    assert found.augment.kind == "flip"
    (folder / "test").write_bytes(pickle.dumps({"data": _batch(1)["data"], "labels": [0] * PER_FILE}))
    with pytest.raises(UserError, match="test is not a CIFAR-100 file.*'fine_labels'.* from 0 to 99"):
        data.load("cifar100", str(tmp_path))


def test_validation_is_taken_from_the_training_data():
    plain, held = data.load("digits"), data.load("digits", validation=300)
    assert len(held.train_y) == 1137 and len(held.test_y) == 300 and held.held_out == "validation"
    assert plain.held_out == "test"

    joined = torch.cat([held.train_y, held.test_y]).bincount()
    assert torch.equal(joined, plain.train_y.bincount())
    assert not torch.equal(held.test_y, plain.test_y[:300])
    small = data.load("digits", validation=300, train_size=50)
    assert len(small.train_y) == 50 and torch.equal(small.test_y, held.test_y)
    for size in (0, 1437):
        with pytest.raises(UserError, match=f"--validation must be from 1 to 1436, got {size}"):
            data.load("digits", validation=size)


def test_options_that_do_not_fit_the_data():
    with pytest.raises(UserError, match="--augment flip is for images, not for --data reversal"):
        data.load("reversal", augment="flip")
    with pytest.raises(UserError, match="--image-size is for --data tiny-imagenet and folder, not for --data digits"):
        data.load("digits", image_size=8)


def _epoch(seed, kind="none", n=10, batch_size=4):
    x = torch.arange(n * 12, dtype=torch.float32).view(n, 2, 2, 3)
    order = torch.Generator().manual_seed(seed)
    augment = data.Augmentation(kind, torch.tensor([-1.0, -2.0]).view(2, 1, 1))
    return x, list(data.batches(x, torch.arange(n), batch_size, augment, order))


def test_batches_pair_images_with_labels_once():
    x, epoch = _epoch(0)
    assert [len(y) for _, y in epoch] == [4, 4]  # the last two images are left out
    labels = torch.cat([y for _, y in epoch])
    assert torch.equal(torch.cat([images for images, _ in epoch]), x[labels]) and len(labels.unique()) == 8
    _, other = _epoch(1)
    assert not torch.equal(labels, torch.cat([y for _, y in other]))


def test_in_order_takes_everything():
    x, y = torch.randn(10, 2), torch.arange(10)
    parts = list(data.in_order(x, y, 4))
    assert [len(part) for _, part in parts] == [4, 4, 2]
    assert torch.equal(torch.cat([part for part, _ in parts]), x)


def test_flips_mirror_some_images():
    x, epoch = _epoch(0, "flip", n=400)
    images, labels = (torch.cat(part) for part in zip(*epoch))
    same = (images == x[labels]).flatten(1).all(1)
    assert torch.equal(images[~same], x[labels][~same].flip(-1))
    assert 140 < same.sum() < 260  # 200 expected, standard deviation 10
    _, again = _epoch(0, "flip", n=400)
    assert torch.equal(images, torch.cat([images for images, _ in again]))


def test_crops_are_windows_of_the_image_padded_with_black():
    x, epoch = _epoch(0, "crop-flip", n=1600, batch_size=400)
    places = [(row, column, flip) for row in range(9) for column in range(9) for flip in (False, True)]
    seen = set()
    for images, labels in epoch:
        for image, label in zip(images, labels):
            padded = torch.tensor([-1.0, -2.0]).view(2, 1, 1).expand(2, 10, 11).clone()
            padded[:, 4:6, 4:7] = x[label]
            windows = torch.stack([padded[:, row : row + 2, column : column + 3] for row, column, _ in places[::2]])
            windows = torch.stack([windows, windows.flip(-1)], 1).flatten(0, 1)
            found = (windows == image).flatten(1).all(1).nonzero().flatten().tolist()
            assert found
            seen.update(found)
    assert len(seen) == len(places)
