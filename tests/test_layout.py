"""The import table of the house: arrows point down only."""

import ast
import pathlib
import re
from collections.abc import Callable, Iterable

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "jaxdiff"

# Each room, and the rooms that it may import, those below it.
ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "config": set(),
    "runtime": {"config"},
    "nn": {"types"},
    "models": {"nn", "types"},
    "build": {"models", "nn", "config", "types"},
    "families": {"build", "models", "config", "types"},
    "diffusion": {"config", "types"},
    "sampling": {"diffusion", "config", "types"},
    "adapters": {"types"},
    "io": {"adapters", "runtime", "config", "types"},
    "data": {"io", "config"},
    "prompts": {"data"},
    "model": {"families", "build", "nn", "data", "io", "runtime", "config", "types"},
    "training": {"build", "diffusion", "data", "io", "runtime", "config", "types"},
    "generation": {
        "model", "families", "prompts", "sampling", "diffusion", "nn", "data", "io", "runtime", "config", "types",
    },
    "evaluation": {
        "generation", "model", "models", "build", "families", "diffusion", "data", "io", "runtime", "config", "types",
    },
    "__init__": {"generation"},
}  # fmt: skip
# Tools may import every room, and no other tool but these.
TOOLS: dict[str, set[str]] = {"plan": {"hlo", "chips"}, "bench": {"hlo", "chips", "plan"}}
NEVER = {("sampling", "models"), ("models", "config"), ("training", "generation"), ("generation", "models")}
FAMILY_WORDS = r"(?i)\b\w*unet\w*|\bCLIPText\w*|\bAutoencoderKL\b"
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules(path: pathlib.Path) -> set[str]:
    """What a file imports, at its top or inside a function: jaxdiff's names by their full path."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports say the whole path"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def imported(path: pathlib.Path, below: str = "jaxdiff") -> set[str]:
    """The names directly below a package that a file imports from."""
    return {name.removeprefix(f"{below}.").split(".")[0] for name in modules(path) if name.startswith(f"{below}.")}


def offenders(files: Iterable[pathlib.Path], found: Callable[[pathlib.Path], Iterable[str]]) -> dict[str, list[str]]:
    """What is found in each file where anything is."""
    return {str(path.relative_to(ROOT)): sorted(names) for path in files if (names := found(path))}


def test_imports_point_down_only():
    files = [path for path in FILES if room(path) != "tools"]
    assert offenders(files, lambda path: imported(path) - ALLOWED[room(path)] - {room(path), "__version__"}) == {}


def test_a_tool_looks_into_no_other_tool_but_those_that_are_listed():
    def foreign(path: pathlib.Path) -> set[str]:
        tool = path.relative_to(PACKAGE).parts[1].removesuffix(".py")
        return imported(path, "jaxdiff.tools") - TOOLS.get(tool, set()) - {tool}

    assert offenders([path for path in FILES if room(path) == "tools"], foreign) == {}


def test_the_table_has_every_room_and_no_circle_and_none_of_the_arrows_that_must_not_be():
    assert {room(path) for path in FILES} == {*ALLOWED, "tools"}
    assert [arrow for arrow in NEVER if arrow[1] in ALLOWED[arrow[0]]] == []
    left = dict(ALLOWED)
    while left:
        floor = {name for name, below in left.items() if not below & set(left)}
        assert floor, f"a circle among {sorted(left)}"
        left = {name: below for name, below in left.items() if name not in floor}


def test_drawing_names_no_network_of_one_family():
    files = [path for path in FILES if room(path) in ("generation", "model")]
    assert offenders(files, lambda path: re.findall(FAMILY_WORDS, path.read_text())) == {}


def test_nothing_at_run_time_needs_torch_or_tensorflow():
    files = [ROOT / "sample.py", ROOT / "train.py", *(path for path in FILES if room(path) != "tools")]
    torch = {"torch", "tensorflow", "diffusers"}
    assert offenders(files, lambda path: {name.split(".")[0] for name in modules(path)} & torch) == {}


def test_only_networks_import_linen():
    files = [path for path in FILES if room(path) not in ("nn", "models", "build", "tools")]
    assert offenders(files, lambda path: re.findall("flax.linen", path.read_text())) == {}


def test_no_two_test_files_have_one_name():
    """pytest imports them by their names alone, and a run that collects both stops."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
