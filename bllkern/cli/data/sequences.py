"""Sequences of tokens: the characters of a text file, and the reversal task."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from .dataset import Raw

CHARACTERS = 128  # in a sequence
TEST_SHARE = 10  # the last tenth of a text is for testing
LENGTH, SYMBOLS = 10, 8  # of the reversal task
REVERSALS = 20_000, 2_000  # to train on, to test on


def read_text(file: Path) -> Raw:
    """Sequences of ``CHARACTERS`` characters, and the character that follows each; one class per character of the text.

    The training sequences are from the beginning of the file, those for testing from its last tenth.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"--data-dir: {file} is missing") from None
    except IsADirectoryError:
        raise UserError(f"--data-dir: {file} is a folder; --data text takes one text file") from None
    except UnicodeDecodeError as exception:
        raise UserError(f"--data-dir: {file} is not UTF-8 text: {exception}") from None
    shortest = TEST_SHARE * (CHARACTERS + 1)
    if len(text) < shortest:
        raise UserError(f"--data-dir: {file} must hold at least {shortest:,} characters, got {len(text):,}")
    characters = {character: i for i, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([characters[character] for character in text])
    end = len(tokens) - len(tokens) // TEST_SHARE
    return Raw(_windows(tokens[:end]), _windows(tokens[end:]), len(characters), causal=True)


def _windows(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Sequences [N, T] that do not overlap, and the tokens that follow each of theirs."""
    end = (len(tokens) - 1) // CHARACTERS * CHARACTERS
    return tokens[:end].view(-1, CHARACTERS), tokens[1 : end + 1].view(-1, CHARACTERS)


def reversal() -> Raw:
    """Random sequences of ``LENGTH`` of ``SYMBOLS`` symbols; the targets are the sequence read backwards."""
    x = torch.randint(0, SYMBOLS, (sum(REVERSALS), LENGTH), generator=torch.Generator().manual_seed(0))
    train, test = x.split(REVERSALS)
    return Raw((train, train.flip(1)), (test, test.flip(1)), SYMBOLS)
