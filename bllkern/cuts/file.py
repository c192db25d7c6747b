"""The file that ``bllkern split`` writes: where to cut a network, and what its blocks learn from."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from .. import objectives

FORMAT = "bllkern cuts 1"
OBJECTIVES = sorted(name for name, build in objectives.OBJECTIVES.items() if hasattr(build(), "head"))


@dataclass(frozen=True)
class CutsFile:
    """Cuts of the network ``model``, with the objective that they were found under.

    ``head`` and ``pool`` are those of the objectives; ``options`` are its other options.  ``found`` says how the cuts
    were found and how they scored; nothing reads it.
    """

    model: str
    cuts: list[str]
    objective: str
    head: str
    pool: int
    options: dict
    found: dict = field(default_factory=dict)

    def options_of(self, objective: str) -> dict:
        """Options for the objective of this name: head and pool, if it has them, and the others if it is the file's."""
        if objective not in OBJECTIVES:
            return {}
        others = self.options if objective == self.objective else {}
        return {**others, "head": self.head, "pool": self.pool}

    def content(self) -> dict:
        """What the file holds, for ``json``."""
        return {"format": FORMAT, **dataclasses.asdict(self)}


_KINDS = {"model": str, "objective": str, "head": str, "pool": int, "options": dict, "found": dict}


def read(path: str | os.PathLike) -> CutsFile:
    """The cuts in a file.

    Raises: ``FileNotFoundError``; ``ValueError`` that names the file and the field that is missing, superfluous or
    holds what it may not.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as exception:
        raise type(exception)(f"cuts: {path}: {exception.strerror}") from exception
    except ValueError as exception:  # not JSON, or not even text
        raise ValueError(f"cuts: {path} is not a JSON file: {exception}") from exception
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ValueError(f"cuts: {path}: field 'format' must be {FORMAT!r}, as bllkern split writes it")
    names = [f.name for f in dataclasses.fields(CutsFile)]
    for name in sorted(content.keys() ^ set(names)):
        raise ValueError(f"cuts: {path}: field {name!r} is {'unknown' if name in content else 'missing'}")
    for name, kind in _KINDS.items():
        if type(content[name]) is not kind:
            raise ValueError(f"cuts: {path}: field {name!r} must be of type {kind.__name__}, got {content[name]!r}")
    cuts = content["cuts"]
    if not isinstance(cuts, list) or not cuts or not all(isinstance(cut, str) for cut in cuts):
        raise ValueError(f"cuts: {path}: field 'cuts' must be a list of module names, got {cuts!r}")
    if content["objective"] not in OBJECTIVES:
        raise ValueError(f"cuts: {path}: field 'objective' must be one of {OBJECTIVES}, got {content['objective']!r}")
    file = CutsFile(**content)
    try:
        objectives.get(file.objective, **file.options_of(file.objective))
    except (TypeError, ValueError) as exception:
        raise ValueError(f"cuts: {path}: field 'head', 'pool' or 'options': {exception}") from exception
    return file
