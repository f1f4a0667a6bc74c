"""The import table of the house: arrows point down only."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "jaxdiff"

BASE = {"types", "config", "sharding", "distributed", "decode", "compiling"}
ALLOWED = {
    "types": set(),
    "config": set(),
    "sharding": {"types"},
    "distributed": {"config"},
    "decode": set(),
    "compiling": set(),
    "cli": set(),
    "nn": {"types"},
    "diffusion": {"types", "config"},
    "models": {"nn", "types"},
    "sampling": {"diffusion", "types", "config"},
    "data": BASE,
    "prompts": {"data", *BASE},
    "io": BASE,
    "rows": {"io", "arguments", "settings", "sampling", *BASE},
    "build": {"models", "nn", *BASE},
    "training": {"diffusion", "models", "build", "io", *BASE},
    "generate": {"build", "models", "diffusion", "sampling", "io", "data", *BASE},
    "arguments": set(),
    "settings": {"arguments", "config", "sampling"},
    "scenes": {"generate", "io", "prompts", "sampling", "arguments", "settings", *BASE},
    "pipeline": {
        "scenes",
        "settings",
        "arguments",
        "prompts",
        "generate",
        "build",
        "models",
        "nn",
        "diffusion",
        "sampling",
        "io",
        "data",
        *BASE,
    },
    "tasks": {"arguments", "pipeline", "io"},
    "batch": {"tasks", "pipeline", "scenes", "rows", "settings", "arguments", "prompts", "io", *BASE},
    "__init__": {"pipeline"},
}


def room(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: pathlib.Path) -> set[str]:
    """The rooms of jaxdiff that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        else:
            continue
        names |= {name.split(".")[1] for name in found if name.startswith("jaxdiff.")}
    return names


FILES = sorted(path for path in PACKAGE.rglob("*.py") if room(path) != "tools")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_only(path):
    assert imported(path) - {room(path)} <= ALLOWED[room(path)]


def test_every_room_is_in_the_table():
    assert {room(path) for path in FILES} == set(ALLOWED)


@pytest.mark.parametrize("path", [*FILES, ROOT / "sample.py", ROOT / "train.py"], ids=lambda path: path.name)
def test_nothing_at_run_time_needs_torch_or_tensorflow(path):
    tree = ast.walk(ast.parse(path.read_text()))
    names = {a.name for n in tree if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.module}
    assert not {name.split(".")[0] for name in names} & {"torch", "tensorflow", "diffusers"}


def test_only_networks_import_linen():
    users = {room(path) for path in FILES if "flax.linen" in path.read_text()}
    assert users <= {"nn", "models", "build"}
