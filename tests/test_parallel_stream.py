"""Messages as bytes on a socket: without zeros every bit comes through, and what does not fit its header is refused."""

from dataclasses import replace

import pytest
import torch

from bllkern import _native
from bllkern.backends import reference
from bllkern.parallel import stream
from bllkern.parallel.messages import CHECKSUM_BYTES, HEADER_BYTES, Header, MessageError, decode, describe

ISAS = [] if _native.error else list(_native._C.isas)
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
DTYPES = [*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool]
SIZES = [0, 1, 7, 63, 64, 65, 128, 1000, 4099]


@pytest.fixture(params=["reference", *ISAS])
def kernels(request, monkeypatch):
    monkeypatch.setattr(stream, "_kernels", reference if request.param == "reference" else _native)
    if request.param != "reference":
        before = _native._C.isa()
        _native._C.set_isa(request.param)
        yield
        _native._C.set_isa(before)
    else:
        yield


def drawn(dtype, size, density):
    """Random bits, each word of which is 0 with probability 1 - density."""
    words = torch.randint(1, 256, (size, dtype.itemsize), dtype=torch.uint8)
    words[torch.rand(size) >= density] = 0
    return words.bool()[:, 0] if dtype == torch.bool else words.view(-1).view(dtype)


def sent(*tensors):
    """The message with these tensors, and what its receiver reads in it."""
    data = stream.join(Header("train", 3, tensors=[describe(tensor) for tensor in tensors]), list(tensors))
    header = decode(data[:HEADER_BYTES])
    assert stream.length(header) == len(data)
    return data, header, stream.split(header, data)


def assert_same_bits(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert torch.equal(stream.flat(found), stream.flat(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_comes_through(dtype, kernels):
    for size in SIZES:
        for density in (0.0, 0.05, 0.5, 0.95, 1.0):
            x, y = drawn(dtype, size, density), drawn(torch.float32, 9, 0.5)  # which then begins at an odd place
            data, _, tensors = sent(x, y)
            for found, tensor in zip(tensors, (x, y), strict=True):
                assert_same_bits(found, tensor)
            assert len(data) <= HEADER_BYTES + x.nbytes + y.nbytes + CHECKSUM_BYTES


@pytest.mark.parametrize("dtype", FLOATS[:4], ids=str)
def test_signed_zeros_and_nans_come_through(dtype, kernels):
    x = torch.zeros(6, 50, dtype=dtype)
    x[1, 3], x[2, 5], x[3, 7], x[4, 9] = -0.0, float("nan"), float("-inf"), torch.finfo(dtype).smallest_normal / 2
    stream.flat(x)[-1] |= 0x7F  # a NaN of another payload
    stream.flat(x)[-2] |= 0xF1
    _, header, (found,) = sent(x)
    assert header.packed and torch.signbit(found[1, 3]) and found[5, -1].isnan()
    assert_same_bits(found, x)


@pytest.mark.parametrize("dtype", DTYPES[:-1], ids=str)
def test_kernels_pack_what_the_reference_packs(dtype, kernels):
    for size in SIZES:
        for density in (0.0, 0.5, 0.97, 1.0):
            x = drawn(dtype, size, density)
            word_bytes = dtype.itemsize if dtype.is_floating_point else 1
            rooms = [torch.zeros(x.nbytes + size + 8, dtype=torch.uint8) for _ in range(2)]
            used = [packer.pack(x, word_bytes, room) for packer, room in zip((stream._kernels, reference), rooms)]
            assert used[0] == used[1] > 0 or size == 0
            assert torch.equal(rooms[0][: used[0]], rooms[1][: used[0]])
            for room in range(used[0] - 1, 0, -max(1, used[0] // 20)):  # what does not fit is not begun to overrun
                guarded = torch.full((room + 64,), 99, dtype=torch.uint8)
                assert stream._kernels.pack(x, word_bytes, guarded[:room]) == -1
                assert (guarded[room:] == 99).all()


def test_activations_behind_a_relu_and_labels_are_short_and_others_as_they_are(kernels):
    x, labels, dense = torch.randn(16, 1024).relu(), torch.randint(1, 11, (64,)), torch.randn(16, 1024)
    assert sent(x)[1].packed == [x.numel() // 8 + 4 * int((x != 0).sum())]
    assert sent(labels)[1].packed == [8 * 8 + 64]
    assert sent(x.bfloat16())[1].packed == [x.numel() // 8 + 2 * int((x.bfloat16() != 0).sum())]
    data, header, _ = sent(dense)
    assert header.packed == [] and torch.equal(data[HEADER_BYTES:-CHECKSUM_BYTES], stream.flat(dense))
    assert sent(dense, labels)[1].packed == [0, 8 * 8 + 64]


def test_what_does_not_fit_its_header_is_refused(kernels):
    x, y = torch.randn(8, 33).relu(), torch.randn(8, 3)
    data, header, _ = sent(x, y)
    for cut in range(HEADER_BYTES, len(data) - 3):  # the end is missing; its last bytes are 0
        with pytest.raises(MessageError):
            stream.split(header, torch.cat([data[:cut], torch.zeros(len(data) - cut, dtype=torch.uint8)]))
    for place in range(HEADER_BYTES, len(data) - CHECKSUM_BYTES):  # something is there that the header does not know
        with pytest.raises(MessageError):
            stream.split(header, torch.cat([data[:place], data[:1], data[place:]])[: len(data)])
    for bit in range(8 * 5 * 8):  # a bit of the masks
        damaged = data.clone()
        damaged[HEADER_BYTES + bit // 8] ^= 1 << bit % 8
        with pytest.raises(MessageError, match="the masks of its .* bytes do not fit"):
            stream.split(header, damaged)


def test_a_wrong_size_with_a_right_header_is_refused(kernels):
    x = torch.randn(8, 33).relu()
    good, true, _ = sent(x)
    masks = good[HEADER_BYTES : HEADER_BYTES + 5 * 8]
    for size in range(1, x.nbytes):
        if size == true.packed[0]:
            continue
        header = replace(true, packed=[size])
        content = torch.cat([masks, torch.randint(0, 256, (x.nbytes,), dtype=torch.uint8)])[:size]
        data = torch.cat([header.encode(), content, header.encode()[8 : 8 + CHECKSUM_BYTES]])
        with pytest.raises(MessageError, match="do not fit"):
            stream.split(header, data)


@pytest.mark.parametrize("packed", [[0, 0], [4 * 12], [-1], [True], ["8"], 8, None])
def test_sizes_that_cannot_be_are_refused(packed):
    with pytest.raises(MessageError):
        decode(Header("train", tensors=[["float32", [4, 3]]], packed=packed).encode())
