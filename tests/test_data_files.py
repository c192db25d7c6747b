"""Data sets in the layouts in which they are published: small files of each, whole, missing, cut off and foreign."""

import gzip

import numpy as np
import pytest
import torch
from PIL import Image

from bllkern.cli import data
from bllkern.cli.data import files, sequences
from bllkern.cli.errors import UserError

RNG = np.random.default_rng(0)
IDX = {
    "train-images-idx3-ubyte": RNG.integers(0, 256, (6, 28, 28), np.uint8),
    "train-labels-idx1-ubyte": np.arange(6, dtype=np.uint8),
    "t10k-images-idx3-ubyte": RNG.integers(0, 256, (4, 28, 28), np.uint8),
    "t10k-labels-idx1-ubyte": np.array([9, 0, 1, 2], np.uint8),
}


def _idx(array):
    """IDX: two zero bytes, 8 for uint8, the number of dimensions, the dimensions as big-endian integers, the values."""
    head = bytes([0, 0, 8, array.ndim]) + b"".join(side.to_bytes(4, "big") for side in array.shape)
    return head + array.tobytes()


def _write_idx(folder, compressed=False, dots=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in IDX.items():
        name = name.replace("-idx", ".idx") if dots else name
        content = _idx(array)
        (folder / (name + ".gz" * compressed)).write_bytes(gzip.compress(content) if compressed else content)
    return folder


@pytest.mark.parametrize("name, place", [("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw"), ("mnist", "")])
@pytest.mark.parametrize("compressed, dots", [(False, False), (True, False), (False, True)])
def test_idx(tmp_path, name, place, compressed, dots):
    _write_idx(tmp_path / place, compressed, dots)
    found = data.load(name, str(tmp_path))
    images = IDX["train-images-idx3-ubyte"].astype(np.float64)[:, None]
    np.testing.assert_allclose(found.train_x.numpy(), (images - images.mean()) / images.std(), atol=1e-5)
    assert found.train_y.tolist() == list(range(6)) and found.test_y.tolist() == [9, 0, 1, 2]
    assert found.test_x.shape == (4, 1, 28, 28) and found.augment.kind == "none" and found.num_classes == 10


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("file", IDX)
@pytest.mark.parametrize("keep", [0, 2, 0.5, 0.99])
def test_truncated_idx(tmp_path, file, compressed, keep):
    path = _write_idx(tmp_path, compressed) / (file + ".gz" * compressed)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(UserError, match=rf"--data-dir: .*{path.name} is truncated"):
        data.load("mnist", str(tmp_path))


def test_foreign_idx(tmp_path):
    _write_idx(tmp_path)
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte is missing, and so is its \.gz"):
        (tmp_path / "t10k-labels-idx1-ubyte").unlink()
        data.load("mnist", str(tmp_path))
    for array, message in (
        (np.array([0, 1, 2, 10], np.uint8), "must hold labels from 0 to 9"),
        (np.array([0, 1], np.uint8), "4 t10k images, but 2 labels"),
        (np.zeros((4, 1), np.uint8), "not an idx file of labels"),
    ):
        (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(_idx(array))
        with pytest.raises(UserError, match=message):
            data.load("mnist", str(tmp_path))
    with pytest.raises(UserError, match="no folder /nowhere"):
        data.load("mnist", "/nowhere")


def _image(path, color, size=(64, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def _tiny_imagenet(folder):
    root = folder / "tiny-imagenet-200"
    names = ["n02", "n01", "n03"]
    for i, name in enumerate(names):
        for k in range(2):
            _image(root / "train" / name / "images" / f"{name}_{k}.JPEG", (80 * i, 0, 255 - k))
        _image(root / "val" / "images" / f"val_{i}.JPEG", (80 * i, 0, 255))
    (root / "wnids.txt").write_text("".join(f"{name}\n" for name in names))
    lines = [f"val_{i}.JPEG\t{name}\t0\t0\t62\t62\n" for i, name in enumerate(names)]
    (root / "val" / "val_annotations.txt").write_text("".join(lines[::-1]))
    return root


def test_tiny_imagenet(tmp_path):
    root = _tiny_imagenet(tmp_path)
    for place in (tmp_path, root):
        found = data.load("tiny-imagenet", str(place))
        assert found.train_x.shape == (6, 3, 64, 64) and found.train_y.tolist() == [0, 0, 1, 1, 2, 2]
        assert found.test_y.tolist() == [2, 1, 0] and found.num_classes == 3 and found.augment.kind == "flip"
    red = found.train_x[:, 0, 0, 0]
    assert red[0] < red[2] < red[4]  # labels by wnids.txt go with their images
    assert (found.test_x[:, 0, 0, 0].diff() < 0).all()
    assert data.load("tiny-imagenet", str(root), image_size=16).train_x.shape == (6, 3, 16, 16)


def test_broken_tiny_imagenet(tmp_path):
    root = _tiny_imagenet(tmp_path)
    with pytest.raises(UserError, match="no folder .*/elsewhere/tiny-imagenet-200"):
        data.load("tiny-imagenet", str(tmp_path / "elsewhere"))
    annotations = root / "val" / "val_annotations.txt"
    good = annotations.read_text()
    annotations.write_text(good + "val_9.JPEG\tn99\n")
    with pytest.raises(UserError, match="val_annotations.txt: .*n99.* names no class of wnids.txt"):
        data.load("tiny-imagenet", str(tmp_path))
    annotations.write_text(good + "val_9.JPEG\tn01\n")
    with pytest.raises(UserError, match="val_9.JPEG is missing"):
        data.load("tiny-imagenet", str(tmp_path))
    annotations.unlink()
    with pytest.raises(UserError, match="val_annotations.txt is missing"):
        data.load("tiny-imagenet", str(tmp_path))
    (root / "wnids.txt").write_text("")
    with pytest.raises(UserError, match="wnids.txt is empty"):
        data.load("tiny-imagenet", str(tmp_path))


def test_truncated_image(tmp_path):
    root = _tiny_imagenet(tmp_path)
    path = root / "train" / "n03" / "images" / "n03_1.JPEG"
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(UserError, match="n03_1.JPEG is truncated or not an image"):
        data.load("tiny-imagenet", str(tmp_path))


def test_class_folders_with_a_split(tmp_path):
    for part, count in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            for k in range(count):
                _image(tmp_path / part / name / "deeper" / f"{k}.png", (255 * (name == "dog"), k, 0), (50, 20 + k))
    found = data.load("folder", str(tmp_path), image_size=8)
    assert found.train_x.shape == (6, 3, 8, 8) and found.train_y.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.test_y.tolist() == [0, 0, 1, 1] and found.num_classes == 2
    assert (found.test_x[:2, 0] < 0).all() and (found.test_x[2:, 0] > 0).all()


def test_class_folders_without_a_split_hold_out_every_fifth_image(tmp_path):
    for name in ("a", "b"):
        for k in range(10):
            _image(tmp_path / name / f"{k}.png", (10 * k + (name == "b"), 0, 0), (4, 4))
    found, again = (data.load("folder", str(tmp_path), image_size=4) for _ in range(2))
    assert len(found.train_y) == 16 and len(found.test_y) == 4
    assert torch.equal(found.train_x, again.train_x)
    everything = torch.cat([found.train_x, found.test_x])[:, 0, 0, 0]
    assert len(everything.unique()) == 20


def test_folders_that_are_no_classes(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        data.load("folder", str(tmp_path / "nowhere"))
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match=r"must hold a folder for each of at least 2 classes, got \['cat'\]"):
        data.load("folder", str(tmp_path))
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(UserError, match="has a folder train, but neither val nor test"):
        data.load("folder", str(tmp_path))
    (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match="cat holds no image"):
        data.load("folder", str(tmp_path))


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A folder of images that does not count as small; other processes read ahead."""
    for name in ("a", "b"):
        for k in range(10):
            noise = np.random.default_rng([k, name == "b"]).integers(0, 256, (8, 8, 3), np.uint8)
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(noise).save(tmp_path / name / f"{k}.png")
    small = data.load("folder", str(tmp_path), image_size=8)
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    monkeypatch.setattr(files, "READ_AHEAD", 12)
    return tmp_path, small, data.load("folder", str(tmp_path), image_size=8)


def test_large_folders_stay_in_their_files(large):
    _, small, lazy = large
    assert isinstance(lazy.train_x, data.ImageFiles) and lazy.train_x.shape == small.train_x.shape
    assert lazy.to(torch.device("cpu")).train_x.shape == small.train_x.shape
    torch.testing.assert_close(lazy.train_x[:3], small.train_x[:3])
    order = [torch.Generator().manual_seed(1) for _ in range(2)]
    before = torch.get_rng_state()
    read = list(data.batches(lazy.train_x, lazy.train_y, 5, lazy.augment, order[0]))
    assert torch.equal(torch.get_rng_state(), before)  # what the training draws does not depend on how data is read
    expected = list(data.batches(small.train_x, small.train_y, 5, small.augment, order[1]))
    assert len(read) == 3
    for (x, y), (expected_x, expected_y) in zip(read, expected, strict=True):
        torch.testing.assert_close(x, expected_x)
        assert torch.equal(y, expected_y)
    some = data.load("folder", str(large[0]), image_size=8, train_size=4, validation=6)
    assert some.train_x.shape[0] == 4 and some.test_x.shape[0] == 6


def test_a_file_that_another_process_finds_truncated_is_named(large):
    lazy = large[2]
    broken = lazy.train_x.paths[7]
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(UserError, match=f"^--data-dir: {broken} is truncated or not an image"):
        list(data.batches(lazy.train_x, lazy.train_y, 5, lazy.augment, torch.Generator()))


def test_text(tmp_path):
    text = "".join(chr(97 + i * i % 7) for i in range(4000)) + "é"
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    found = data.load("text", str(tmp_path / "book.txt"))
    characters = sorted(set(text))
    assert found.num_classes == len(characters) and found.causal
    length = sequences.CHARACTERS
    assert found.train_x.shape == found.train_y.shape == (28, length) and found.test_x.shape == (3, length)
    read = "".join(characters[i] for i in found.train_x.flatten())
    assert read == text[: len(read)]
    following = "".join(characters[i] for i in found.train_y.flatten())
    assert following == text[1 : len(read) + 1]
    held_out = "".join(characters[i] for i in found.test_x.flatten())
    assert held_out == text[3601 : 3601 + len(held_out)]  # nothing of the last tenth is trained on


def test_files_that_are_no_text(tmp_path):
    cases = {"short": b"abc" * 100, "binary": b"\xff\xfe" * 2000}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="short must hold at least 1,290 characters, got 300"):
        data.load("text", str(tmp_path / "short"))
    with pytest.raises(UserError, match="binary is not UTF-8 text"):
        data.load("text", str(tmp_path / "binary"))
    with pytest.raises(UserError, match="is a folder"):
        data.load("text", str(tmp_path))
    with pytest.raises(UserError, match="nothing is missing"):
        data.load("text", str(tmp_path / "nothing"))


def test_reversal():
    found = data.load("reversal")
    assert found.train_x.shape == (20_000, 10) and found.test_x.shape == (2_000, 10) and not found.causal
    assert torch.equal(found.train_y, found.train_x.flip(1)) and torch.equal(found.test_y, found.test_x.flip(1))
    assert found.num_classes == 8 and set(found.train_x.unique().tolist()) == set(range(8))
    assert torch.equal(found.train_x, data.load("reversal").train_x)
