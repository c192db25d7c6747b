"""Each layer of the library imports only from layers below it."""

import ast
from pathlib import Path

import pytest

import bllkern

ROOT = Path(bllkern.__file__).parent
LAYERS = (  # from top to bottom
    ("__main__",),
    ("cli",),
    ("__init__",),
    ("parallel",),
    ("convert",),
    ("network", "cuts"),
    ("blocks",),
    ("objectives",),
    ("feedback",),
    ("execution",),
    ("functional",),
    ("backends",),
    ("_native",),
    ("_ops", "families", "models"),
)
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}


def imported(path):
    """Top-level modules of the library that the file imports when it runs (not for its annotations alone)."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + tuple(filter(None, (node.module,)))
            yield from [base[0].partition(".")[0]] if base else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from ["__init__" for alias in node.names if alias.name.partition(".")[0] == "bllkern"]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downward(path):
    own = path.relative_to(ROOT).with_suffix("").parts[0]
    upward = [name for name in imported(path) if name in LEVEL and name != own and LEVEL[name] <= LEVEL[own]]
    assert own in LEVEL and not upward
