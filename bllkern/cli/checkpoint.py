"""Files that are whole or not there, and checkpoints that are refused unless they continue this very training."""

from __future__ import annotations

import io
import json
import os
import warnings
from pathlib import Path

import torch

from .errors import UserError

FORMAT = "bllkern checkpoint 1"
KEYS = {"format", "arguments", "training"}


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file at once: a reader, or a kill at any moment, finds the old content or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: object) -> None:
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path) -> object:
    """What :func:`write_json` wrote.  Raises :class:`UserError` for a file that is missing or no JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as exception:
        raise UserError(f"--resume: {path} cannot be read: {exception}") from exception


def write_tensors(path: Path, content: object) -> None:
    """As ``torch.save``."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def save(path: Path, arguments: dict, training: dict) -> None:
    """Write a checkpoint: ``training`` is everything that changes, ``arguments`` everything that it depends on."""
    write_tensors(path, {"format": FORMAT, "arguments": arguments, "training": training})


def load(path: Path, arguments: dict) -> dict:
    """The ``training`` of the checkpoint.

    Raises :class:`UserError` for a file that is truncated or foreign, and for one that was made with other arguments.
    """
    try:
        with warnings.catch_warnings():  # what torch suspects of a foreign file; the error says it
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as exception:  # a damaged file can raise anything
        reason = str(exception).splitlines()[0] if str(exception) else type(exception).__name__
        raise UserError(f"--resume: {path} is truncated or not a checkpoint: {reason}") from exception
    if not _is_checkpoint(content):
        raise UserError(f"--resume: {path} is not a checkpoint of bllkern train")
    check_arguments(path, content["arguments"], arguments)
    return content["training"]


def check_arguments(path: Path, before: dict, arguments: dict) -> None:
    """Raise :class:`UserError` naming the option unless ``path`` was made with these arguments."""
    for name, value in arguments.items():
        if before.get(name) != value:
            option = {"options": "--option"}.get(name, "--" + name.replace("_", "-"))
            raise UserError(f"--resume: {path} was made with {option} {before.get(name)!r}, not {value!r}")


def _is_checkpoint(content: object) -> bool:
    return (
        isinstance(content, dict)
        and content.keys() == KEYS
        and content["format"] == FORMAT
        and isinstance(content["arguments"], dict)
    )
