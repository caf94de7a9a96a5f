"""The layers are those that CONTRIBUTING draws: nothing imports what stands above it, not even inside a function."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).parents[2]
PACKAGE = REPO / "fused_elbo"
DOORS = {"__init__", "__main__"}  # the public names, and the doctor, look at everything


def layers() -> list[str]:
    """Names in CONTRIBUTING's list, from the top down."""
    section = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Layers")[2]
    return re.findall(r"^    (\w+)(?:\.py|/) ", section.partition("\n## ")[0], flags=re.M)


def files() -> dict[Path, str]:
    """The Python files of the package, with the layer that each belongs to."""
    own = {path: path.stem for path in PACKAGE.glob("*.py") if path.stem not in DOORS}
    rooms = [folder for folder in PACKAGE.iterdir() if (folder / "__init__.py").is_file()]
    return own | {path: room.name for room in rooms for path in room.glob("**/*.py")}


def imported(path: Path) -> Iterator[str]:
    """The layers that a file imports by name."""
    here = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name.split(".") for alias in node.names]
            yield from (name[1] for name in found if name[0] == "fused_elbo" and len(name) > 1)
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".") if node.module else []
            if node.level:
                module = [*here[: len(here) + 1 - node.level], *module]
            elif module[:1] == ["fused_elbo"]:
                module = module[1:]
            else:
                continue
            yield from [module[0]] if module else [alias.name for alias in node.names]


def test_every_file_has_its_layer() -> None:
    assert set(files().values()) - {"csrc"} == set(layers())


def test_no_file_imports_what_stands_above_it() -> None:
    floor = {name: number for number, name in enumerate(reversed(layers()))} | {"csrc": -1}
    for path, layer in files().items():
        for other in imported(path):
            assert floor[other] <= floor[layer], f"{path.relative_to(REPO)} imports {other}"
