"""Results of trainings by key, in a JSON file that is whole after each: what is in it is not trained again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from .checkpoint import write_json
from .errors import UserError, user_errors

FORMAT = "bllkern journal 1"


class Journal:
    """``arguments`` is what every result depends on, beyond its key.

    Raises :class:`UserError` for a file that is damaged or foreign, or was made with other arguments.
    """

    def __init__(self, path: Path, arguments: dict):
        self.path = path
        self.content = {"format": FORMAT, "arguments": arguments, "results": {}}
        with user_errors("--output"):
            path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return
        try:
            before = json.loads(path.read_bytes())
            former = before["arguments"]
            if before["format"] != FORMAT or not all(isinstance(r, dict) for r in before["results"].values()):
                raise ValueError("it has another format")
        except (ValueError, LookupError, TypeError, AttributeError, OSError) as exception:
            raise UserError(f"--output: {path} is not a journal of bllkern: {exception!r:.200}") from exception
        for name, value in json.loads(json.dumps(arguments)).items():
            if former.get(name) != value:
                where, old, new = _difference(name, former.get(name), value)
                raise UserError(f"--output: {path} was made with {where}={old!r}, not {new!r}; choose another --output")
        self.content["results"] = before["results"]

    def result(self, key: str, compute: Callable[[], dict]) -> dict:
        """The result under ``key``: the one in the file, or a new one, which is in the file when this returns."""
        results = self.content["results"]
        if key not in results:
            results[key] = compute()
            write_json(self.path, self.content)
        return results[key]

    def finish(self, **summary) -> None:
        """Write what follows from the results beside them."""
        write_json(self.path, {**self.content, **summary})


def _difference(name: str, old: object, new: object) -> tuple[str, object, object]:
    """Where two values that are not equal differ first, such as ``name.key`` inside two dicts, and what is there."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return name, old, new
    key = next(key for key in [*new, *old] if not (key in old and key in new and old[key] == new[key]))
    return _difference(f"{name}.{key}", old.get(key), new.get(key))
