"""The rooms of the code and the imports between them, parsed from the sources; and what `--help` of each script does."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT, run_process

SCRIPTS = [
    "train_gan",
    "train_cgan",
    "train_diffusion",
    "train_classifier",
    "infer",
    "inference",
    "evaluate",
    "report",
]
FOLDERS = ["networks", "diffusion", "engine", "recipes", "scoring", "figures"]

# A room is a folder, or a file beside the scripts. These are the rooms that each may import. Scripts may import every room.
ALLOWED = {
    "files": set(),
    "utils": {"files"},
    "data": {"files", "utils"},
    "diffusion": set(),
    "cli": {"diffusion", "files"},
    "networks": {"utils"},
    "models": {"diffusion", "networks", "utils"},
    "engine": {"files"},
    "checkpoint": {"engine", "files", "models"},
    "figures": {"files"},
    "scoring": {"checkpoint", "data", "engine", "files", "utils"},
    "loop": {"files"},
    "callbacks": {"checkpoint", "data", "engine", "figures", "files", "loop", "utils"},
    "recipes": {
        "callbacks",
        "checkpoint",
        "cli",
        "data",
        "diffusion",
        "engine",
        "files",
        "loop",
        "models",
        "scoring",
        "utils",
    },
}


# Files that import nothing else of the project, so that they can be read, and used, alone
LEAVES = ["files", "diffusion/options", "diffusion/process", "engine/safe_archive", "engine/muon", "scoring/metrics"]


def files_of(room: str) -> list[Path]:
    folder = ROOT / room
    return sorted(folder.glob("*.py")) if folder.is_dir() else [ROOT / f"{room}.py"]


def imports(path: Path) -> set[str]:
    """Every module that a file imports, also within functions. `from a import b` counts as `a` and `a.b`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: write imports from the root, as everywhere"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def imports_of_rooms() -> dict[str, set[str]]:
    """The other rooms that each room imports."""
    found = {}
    for room in ALLOWED:
        modules = set().union(*map(imports, files_of(room)))
        found[room] = {module.partition(".")[0] for module in modules} & ALLOWED.keys() - {room}
    return found


IMPORTED = imports_of_rooms()


def test_the_table_has_every_file_and_folder():
    code = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert code == ALLOWED.keys() | set(SCRIPTS)
    assert ALLOWED.keys() >= set(FOLDERS)


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_the_rooms_in_its_table_entry(room):
    assert IMPORTED[room] - ALLOWED[room] == set()


@pytest.mark.parametrize("room", ALLOWED)
def test_every_room_in_a_table_entry_is_imported(room):
    assert ALLOWED[room] - IMPORTED[room] == set(), "take it out of the table"


def test_the_rooms_have_no_cycle():
    TopologicalSorter(ALLOWED).prepare()  # raises CycleError


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_files_of_a_folder_have_no_cycle(folder):
    names = {path: f"{folder}.{path.stem}" for path in files_of(folder)}
    TopologicalSorter({name: imports(path) & set(names.values()) - {name} for path, name in names.items()}).prepare()


def test_no_file_imports_a_script():
    for path in [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in files_of(folder))]:
        assert {module.partition(".")[0] for module in imports(path)} & set(SCRIPTS) == set(), path.name


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_imports_nothing_of_the_project(leaf):
    modules = {module.partition(".")[0] for module in imports(ROOT / f"{leaf}.py")}
    assert not modules & {*ALLOWED, *SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_no_torch_numpy_or_matplotlib(script):
    code = f"import sys, runpy; sys.argv = ['{script}', '--help']\ntry: runpy.run_path('{script}.py', run_name='__main__')\n"
    code += "finally: assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules), 'a heavy import'"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout
    assert "heavy" not in result.stderr


def test_help_shows_the_defaults():
    text = run_process("train_gan.py", "--help", COLUMNS="200").stdout
    assert "(default: 128)" in text
    assert "(default: None)" not in text
    for line in ("--ema, --no-ema", "--early-stop, --no-early-stop", "--preset {default,reference,cpu}"):
        assert line in text
