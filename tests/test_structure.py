"""The rooms and the arrows between them: parsed from the sources, so that a new import that turns back is caught."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from conftest import ROOT, run_process

# Who may import whom. Scripts may import every room, and nobody imports a script.
ROOMS = {
    "utils": set(),
    "flags": {"utils"},
    "training": {"utils"},
    "data": {"utils"},
    "metrics": {"utils"},
    "plots": {"utils"},
    "charts": {"utils"},
    "diffusion": set(),
    "unet": {"utils"},
    "interface": set(),
    "distributed": {"utils"},
    "guard": {"distributed"},
    "graphs": {"distributed"},
    "muon": set(),
    "classifier": {"interface"},
    "models": {"classifier", "diffusion", "interface", "unet", "utils"},
    "checkpoint": {"models", "utils"},
    "evaluation": {"checkpoint", "data", "distributed", "metrics", "utils"},
    "inception": {"checkpoint", "utils"},
    "callbacks": {"checkpoint", "data", "distributed", "plots", "training", "utils"},
    "resuming": {"checkpoint", "flags", "training", "utils"},
    "experiment": {"callbacks", "checkpoint", "data", "distributed", "evaluation", "resuming", "training", "utils"},
    "adversarial": {"distributed", "experiment", "graphs", "guard", "models", "training", "utils"},
    "denoising": {
        "checkpoint",
        "data",
        "diffusion",
        "distributed",
        "experiment",
        "graphs",
        "guard",
        "models",
        "muon",
        "training",
        "unet",
        "utils",
    },
}
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem not in ROOMS)


def imports(name: str) -> set[str]:
    """Every module that a file imports, also within functions."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may(room):
    assert imports(room) & (ROOMS.keys() | set(SCRIPTS)) <= ROOMS[room]


@pytest.mark.parametrize("script", SCRIPTS)
def test_nobody_imports_a_script(script):
    assert script not in set().union(*(imports(name) for name in [*ROOMS, *SCRIPTS]))


def test_files_stay_small():
    for path in ROOT.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, f"{path.name}: split it along what it talks about"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_no_torch(script):
    """`--help` answers at once: nothing heavy is imported before the arguments are parsed."""
    code = f"import sys, runpy; sys.argv = ['{script}', '--help']\ntry: runpy.run_path('{script}.py', run_name='__main__')\n"
    code += "finally: assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules), 'a heavy import'"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "usage" in result.stdout and "heavy" not in result.stderr, result.stderr


def test_help_shows_defaults():
    text = run_process("train_gan.py", "--help", COLUMNS="200").stdout
    assert "(default: 128)" in text and "(default: None)" not in text
    for line in ("--ema, --no-ema", "--early-stop, --no-early-stop", "--preset {default,reference}"):
        assert line in text
