"""The layering of the package, read from its imports."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "memjax"

FLOORS = {
    "_core": 0,
    "linalg": 1,
    "densities": 1,
    "networks": 1,
    "data": 1,
    "evaluate": 1,
    "calculus": 2,
    "diffusion": 3,
    "checkpoints": 4,
    "training": 5,
    "detect": 6,
    "localize": 6,
    "extract": 6,
    "mitigate": 6,
    "auditing": 7,
    "report": 7,
    "cli": 8,
}


def imported_rooms(source: str, room: str | None) -> set[str]:
    """Rooms of memjax that a module imports from, relative imports resolved against its room."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                base = [node.module]
            elif node.level == 1:
                base = ["memjax", room, node.module] if room else ["memjax", node.module]
            else:
                base = ["memjax", node.module]
            prefix = ".".join(part for part in base if part)
            names = [prefix, *(f"{prefix}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            if parts[0] == "memjax" and len(parts) > 1 and parts[1] in FLOORS:
                rooms.add(parts[1])
    return rooms


def violations(source: str, room: str) -> list[str]:
    return [
        f"{room} (floor {FLOORS[room]}) imports {other} (floor {FLOORS[other]})"
        for other in sorted(imported_rooms(source, room))
        if other != room and FLOORS[other] >= FLOORS[room]
    ]


MODULES = sorted(path for ending in ("py", "pyi") for path in PACKAGE.glob(f"*/**/*.{ending}"))


def test_every_folder_has_a_floor():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name[:2] != "__"}
    assert rooms <= set(FLOORS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_upward_or_sideways_import(path):
    room = path.relative_to(PACKAGE).parts[0]
    assert violations(path.read_text(), room) == []


@pytest.mark.parametrize(
    "source",
    [
        "from memjax.diffusion.combine import at",
        "import memjax.diffusion.combine",
        "from memjax import diffusion",
        "from ..diffusion import combine",
        "from memjax.networks.mlp import ResidualMLP",
    ],
)
def test_the_reader_sees_a_violation(source):
    assert violations(source, "densities")


def test_downward_and_own_imports_pass():
    source = "from memjax._core.errors import InputError\nfrom .gaussian import Gaussian"
    assert violations(source, "densities") == []


def test_no_function_shares_a_folders_name():
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text())
    names = {
        alias.asname or alias.name
        for node in ast.walk(stub)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert not names & set(FLOORS)
