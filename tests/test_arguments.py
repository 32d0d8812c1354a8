"""Random combinations of arguments: a script runs, or it refuses them in one line with the reason."""

from __future__ import annotations

import argparse
import contextlib
import io
import runpy
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, tiny_ddpm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_models import small

from checkpoint import save_model
from cli import run_script
from recipes import run

TRAINERS = ("train_gan.py", "train_cgan.py", "train_diffusion.py")
SCRIPTS = (*TRAINERS, "train_classifier.py", "infer.py", "inference.py", "evaluate.py", "report.py")
PLAUSIBLE = ("0", "1", "2", "3", "7", "8", "16", "20", "24", "100", "1000", "0.5", "0.999", "1e-4")
ODD = ("-1", "1e-300", "1e300", "1e400", "nan", "-inf", "", " ", "nine", "0x10", "\uff11\uff12", "9" * 25)
# Flags that the runs leave out: they would write elsewhere, need another machine or a file, or take minutes
FIXED = {"--out-dir", "--data-dir", "--device", "--compile", "--dataset", "--dry-run", "--resume", "--width", "--init"}


def parser_of(script: str) -> argparse.ArgumentParser:
    """The parser that a script builds."""
    found = []
    main = runpy.run_path(str(ROOT / script))["parse_args"]
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(EOFError):

        def caught(self, *_):
            found.append(self)
            raise EOFError

        patch.setattr(argparse.ArgumentParser, "parse_args", caught)
        main([])
    return found[0]


def arguments(script: str, without: set[str] = frozenset()) -> st.SearchStrategy[list[str]]:
    """Lists of a script's flags, most of them with plausible values."""
    flags = []
    for action in parser_of(script)._actions:
        if without.intersection(action.option_strings) or "--help" in action.option_strings:
            continue
        for name in action.option_strings:
            if action.nargs == 0:
                flags.append(st.just([name]))
                continue
            usual, odd = (list(map(str, action.choices)), ["none"]) if action.choices else (PLAUSIBLE, ODD)
            values = st.sampled_from(usual) | st.sampled_from([*usual, *odd])
            flags.append(values.map(lambda value, name=name: [name, value]))
    return st.lists(st.one_of(flags), max_size=6).map(lambda parts: [text for part in parts for text in part])


def outcome(main: Callable[[], object]) -> tuple[int, str]:
    """Exit code and stderr of a function that `run_script` runs."""
    code, err = 0, io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            run_script(main)
        except SystemExit as stop:
            code = stop.code or 0
    return code, err.getvalue()


def call(script: str, args: list[str]) -> tuple[int, str]:
    """Exit code and stderr of a script's `main` in this process."""
    return outcome(lambda: runpy.run_path(str(ROOT / script))["main"](args))


@pytest.mark.parametrize("script", SCRIPTS)
def test_random_arguments_are_parsed_or_refused_in_one_line(script):
    parse = runpy.run_path(str(ROOT / script))["parse_args"]

    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(arguments(script))
    def check(args):
        code, err = outcome(lambda: parse(args))
        assert code in (0, 2)
        assert code == 0 or (len(err.splitlines()) == 1 and err.startswith("error: "))

    check()


def try_dry_runs(script: str, examples: int) -> None:
    """Run a trainer. Few samples are drawn, because they take most of the time."""
    fixed = ["--dry-run", "--dataset", "digits", "--device", "cpu", "--width", "8"]

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(arguments(script, without=FIXED))
    def check(args):
        with tempfile.TemporaryDirectory() as folder:
            code, err = call(script, [*fixed, "--batch-size", "32", *args, "--out-dir", folder])
        assert_run_or_refused(code, args, err)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(run.DRY_RUN, "eval_samples", 20)
        patch.setattr(run, "GIF_COLUMNS", 1)
        check()


def assert_run_or_refused(code: int, args: list[str], err: str) -> None:
    assert code in (0, 2), (args, err)
    assert code == 0 or err.strip().splitlines()[-1].startswith("error: "), (args, err)
    assert "Traceback" not in err


def try_drawing(script: str, folder: Path, examples: int) -> None:
    """Run infer.py or inference.py with untrained models that have few noise levels."""
    gan, digits, ddpm = tiny_gan(folder, "dcgan"), tiny_gan(folder, "cdcgan"), str(tiny_ddpm(folder, timesteps=8))
    models = {"--gan-model": [gan], "--diff-model": [ddpm], "--model": [digits, ddpm]}
    out = {"--out": "a.png", "--denoising-gif": "a.gif", "--outdir": "digits"}

    def placed(args: list[str], model: int) -> list[str]:
        """The arguments, and models and folders that exist."""
        fixed = {name: paths[model % len(paths)] for name, paths in models.items()}
        fixed |= {name: str(folder / path) for name, path in out.items()}
        known = {option for action in parser_of(script)._actions for option in action.option_strings}
        return [*args, *(text for name, path in fixed.items() if name in known for text in (name, path))]

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(arguments(script, without=FIXED | {"--n"} | models.keys() | out.keys()), st.integers(0, 1))
    def check(args, model):
        code, err = call(script, placed(args, model))
        assert_run_or_refused(code, args, err)

    check()


def tiny_gan(folder: Path, name: str) -> str:
    """The file of an untrained generator."""
    save_model(folder / f"{name}.pt", name, small(name), {})
    return str(folder / f"{name}.pt")


@pytest.mark.parametrize("script", ["infer.py", "inference.py"])
def test_random_arguments_are_drawn_or_refused(script, tmp_path, mnist_dir):
    try_drawing(script, tmp_path, 15)


@pytest.mark.long
@pytest.mark.parametrize("script", ["infer.py", "inference.py"])
def test_200_random_arguments_are_drawn_or_refused(script, tmp_path, mnist_dir):
    try_drawing(script, tmp_path, 200)


@pytest.mark.parametrize("script", TRAINERS)
def test_random_arguments_are_trained_with_or_refused(script):
    try_dry_runs(script, 20)


@pytest.mark.long
@pytest.mark.parametrize("script", TRAINERS)
def test_200_random_arguments_are_trained_with_or_refused(script):
    try_dry_runs(script, 200)
