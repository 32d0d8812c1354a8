"""cli.py: the types of the flags, recorded flags that are parsed again, sampling flags, and exit codes."""

from __future__ import annotations

import argparse
import math
import signal

import pytest
from test_models import small

import train_diffusion
from cli import (
    ETA,
    GUIDANCE,
    LEARNING_RATE,
    SEED,
    ArgumentParser,
    add_sampling_flags,
    integer,
    number,
    parse_again,
    run_script,
    sampling_options,
)
from diffusion.options import SCRIPT_GUIDANCE
from files import ExpectedError, Interrupted, UsageError

# --------------------------------------------------------------------------------------------------------------------
# Types


@pytest.mark.parametrize(("text", "value"), [("2", 2), ("5", 5), (" 3 ", 3), ("\uff14", 4)])
def test_integer_accepts_its_range_including_the_ends(text, value):
    assert integer(2, 5)(text) == value


@pytest.mark.parametrize("text", ["1", "6", "2.0", "1e0", "", "two", "nan", "0x3"])
def test_integer_refuses_other_text(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"is not an integer in 2\.\.5"):
        integer(2, 5)(text)


def test_integer_without_an_upper_end_accepts_any_larger_integer():
    assert integer(1)("9" * 25) == int("9" * 25)
    with pytest.raises(argparse.ArgumentTypeError, match="'0' is not an integer of at least 1"):
        integer(1)("0")


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[0, 1)", ["0", "0.5", "-0.0", "0.999"], ["-1e-9", "1", "nan", "inf", "", "half"]),
        ("(0, 1]", ["1e-300", "1"], ["0", "-0.0", "1.1", "nan", "-inf"]),
        ("[0, 100]", ["0", "100"], ["-1", "100.1", "1e400"]),
        ("[0, inf)", ["0", "1e300"], ["inf", "1e400", "-1", "nan"]),
        ("(0, inf)", ["1e-300", "1e300"], ["0", "inf", "nan"]),
    ],
)
def test_number_accepts_exactly_its_interval(interval, inside, outside):
    parse = number(interval)
    for text in inside:
        assert parse(text) == float(text)
    for text in outside:
        with pytest.raises(argparse.ArgumentTypeError) as error:
            parse(text)
        assert str(error.value) == f"{text!r} is not a number in {interval}"


@pytest.mark.parametrize(
    ("parse", "accepted", "refused"),
    [
        (SEED, str(2**63 - 1), str(2**63)),
        (LEARNING_RATE, "1", "0"),
        (ETA, "10", "10.1"),
        (GUIDANCE, "100", "100.1"),
    ],
)
def test_the_shared_types_have_their_bounds(parse, accepted, refused):
    assert str(parse(accepted)).removesuffix(".0") == accepted
    with pytest.raises(argparse.ArgumentTypeError):
        parse(refused)


# --------------------------------------------------------------------------------------------------------------------
# Parsing


@pytest.fixture
def parser():
    parser = ArgumentParser("A parser with a flag of each kind.")
    parser.add_argument("--epochs", type=integer(1, 10), default=3, help="passes")
    parser.add_argument("--lr", type=LEARNING_RATE, default=0.1, help="rate")
    parser.add_argument("--loss", choices=("bce", "hinge"), default="bce", help="loss")
    parser.add_argument("--ema", action=argparse.BooleanOptionalAction, default=True, help="average")
    parser.add_argument("--out-dir", default=None, help="folder")
    return parser


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"epochs": 7, "lr": 0.25, "loss": "hinge", "ema": False, "out_dir": "a folder"},
        {"ema": True, "out_dir": None},
        {"lr": 1e-07, "out_dir": "--looks-like-a-flag"},
    ],
)
def test_recorded_flags_are_parsed_to_the_same_values(flags, parser):
    defaults = {"epochs": 3, "lr": 0.1, "loss": "bce", "ema": True, "out_dir": None}
    assert vars(parse_again(parser, flags)) == defaults | flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"epochs": 0}, "--epochs"),
        ({"epochs": 2.5}, "--epochs"),
        ({"lr": math.nan}, "--lr"),
        ({"lr": [0.1]}, "lr is a list"),
        ({"loss": "wasserstein"}, "--loss"),
        ({"out_dir": ""}, "empty"),
        ({"out_dir": {"a": 1}}, "out_dir is a dict"),
    ],
)
def test_recorded_flags_that_the_command_line_refuses_raise_a_value_error(flags, message, parser):
    with pytest.raises(ValueError, match=message):
        parse_again(parser, flags)


@pytest.mark.parametrize("argv", [["--epochs", "0"], ["--epo", "3"], ["--loss", "mse"], ["--out-dir", ""], ["--out-dir="]])
def test_a_bad_argument_raises_one_line_that_points_to_the_help(argv, parser):
    with pytest.raises(UsageError, match=r"; see .* --help$") as error:
        parser.parse_args(argv)
    assert len(str(error.value).splitlines()) == 1


# --------------------------------------------------------------------------------------------------------------------
# Sampling flags


def options_of(*argv: str, name: str = "ddpm", **config) -> dict:
    """What the sampling flags give for a small generator."""
    parser = ArgumentParser("Draw.")
    add_sampling_flags(parser)
    generator = small(name, **config)
    generator.model_name = name
    return sampling_options(parser.parse_args(list(argv)), generator, "model.pt")


def test_without_flags_a_diffusion_model_is_sampled_with_the_scripts_guidance():
    assert options_of() == {"guidance": SCRIPT_GUIDANCE}


def test_typed_flags_become_options():
    assert options_of("--guidance", "1", "--eta", "0.5", "--steps", "7") == {"guidance": 1.0, "eta": 0.5, "steps": 7}


def test_an_unconditional_model_gets_no_guidance():
    assert options_of("--sampler", "ddim", num_classes=0) == {"sampler": "ddim"}


def test_a_gan_has_no_sampling_options():
    assert options_of(name="dcgan") == {}
    with pytest.raises(UsageError, match="holds a dcgan, which has no --steps, --eta"):
        options_of("--steps", "5", "--eta", "1", name="dcgan")


def test_an_option_that_the_model_refuses_is_a_usage_error():
    with pytest.raises(UsageError, match=r"cannot be sampled in this way: steps must be an integer in 1\.\.50"):
        options_of("--steps", "51")


# --------------------------------------------------------------------------------------------------------------------
# Exit codes


def fail_with(error: BaseException):
    def main() -> None:
        raise error

    return main


def test_a_training_shorter_than_the_time_between_two_scorings_is_scored_at_its_end():
    assert train_diffusion.parse_args([]).eval_every == 8
    assert train_diffusion.parse_args(["--epochs", "3"]).eval_every == 3


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ExpectedError("a file is missing;\n  restore it"), 1, "error: a file is missing; restore it"),
        (UsageError("--n 0 is too small"), 2, "error: --n 0 is too small"),
        (OSError(28, "No space left on device", "a.pt"), 1, "error: [Errno 28] No space left on device: 'a.pt'"),
        (MemoryError(), 1, "error: out of memory; lower --batch-size, --width or the number of samples"),
        (Interrupted(15, "Continue with --resume."), 143, "stopped by signal 15. Continue with --resume."),
        (KeyboardInterrupt(), 130, "stopped by signal 2. No file is half written; give the same command again."),
    ],
)
def test_a_failure_is_one_line_and_an_exit_code(error, code, line, capsys):
    with pytest.raises(SystemExit) as stop:
        run_script(fail_with(error))
    assert stop.value.code == code
    assert capsys.readouterr().err == f"{line}\n"


def test_success_does_not_exit():
    run_script(lambda: None)


def test_an_unexpected_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script(fail_with(ZeroDivisionError()))


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_script_with_its_exit_code(signum, code, capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of pytest may ignore it
    try:
        with pytest.raises(SystemExit) as stop:
            run_script(lambda: signal.raise_signal(signum))
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == code
    assert f"stopped by signal {signum.value}." in capsys.readouterr().err
