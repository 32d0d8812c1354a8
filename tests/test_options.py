"""diffusion/options.py: defaults and bounds of diffusion sampling, and that the command line agrees with them."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from conftest import ROOT

import cli
from diffusion import options, process, samplers
from diffusion.options import SamplingOptions


def resolved(timesteps: int = 1000, num_classes: int = 10, with_labels: bool = False, **given) -> SamplingOptions:
    return SamplingOptions(**given).resolved(timesteps, num_classes, with_labels)


def test_the_defaults_without_labels():
    assert resolved() == SamplingOptions("dpm-solver++", steps=15, guidance=1.0, eta=2.5, precision="fp32")


def test_the_defaults_with_labels():
    assert resolved(with_labels=True) == SamplingOptions("dpm-solver++", steps=10, guidance=1.0, eta=0.5, precision="fp32")


def test_guidance_scale_0_has_the_defaults_without_labels():
    assert resolved(with_labels=True, guidance=0.0).eta == options.UNCONDITIONAL_ETA


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 15), ("ddpm", 1000)])
def test_the_other_samplers_have_eta_0(sampler, steps, with_labels):
    assert resolved(sampler=sampler, with_labels=with_labels) == SamplingOptions(sampler, steps=steps, eta=0.0)


def test_a_model_of_few_timesteps_takes_all_of_them():
    assert resolved(timesteps=8).steps == 8


def test_given_options_are_kept():
    given = SamplingOptions("ddim", steps=7, guidance=2.0, eta=0.5, precision="bf16")
    assert given.resolved(1000, 10, with_labels=True) == given


@pytest.mark.parametrize(
    "given",
    [
        {"steps": 1},
        {"steps": 1000},
        {"guidance": 0.0},
        {"guidance": 100.0},
        {"eta": 0.0},
        {"eta": 10.0},
        {"sampler": "ddim", "eta": 1.0},
        {"sampler": "ddpm", "eta": 0.0},
    ],
)
def test_the_ends_of_every_range_are_accepted(given):
    (name, value), *_ = reversed(given.items())
    assert getattr(resolved(**given), name) == value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sampler": "euler"}, "sampler must be one of dpm-solver[+][+], ddim, ddpm, not 'euler'"),
        ({"precision": "fp16"}, "precision must be one of fp32, bf16, not 'fp16'"),
        ({"steps": 0}, r"steps must be an integer in 1\.\.1000"),
        ({"steps": 1001}, r"steps must be an integer in 1\.\.1000"),
        ({"steps": 2.0}, "steps must be an integer"),
        ({"steps": True}, "steps must be an integer"),
        ({"guidance": -0.1}, r"guidance must lie in 0\.\.100"),
        ({"guidance": 100.1}, r"guidance must lie in 0\.\.100"),
        ({"guidance": math.nan}, r"guidance must lie in 0\.\.100"),
        ({"eta": -0.1}, r"eta of dpm-solver[+][+] must lie in 0\.\.10"),
        ({"eta": 10.1}, r"eta of dpm-solver[+][+] must lie in 0\.\.10"),
        ({"eta": math.nan}, "eta of dpm-solver"),
        ({"eta": 1.1, "sampler": "ddim"}, r"eta of ddim must lie in 0\.\.1"),
        ({"eta": 0.1, "sampler": "ddpm"}, r"eta of ddpm must lie in 0\.\.0"),
        ({"guidance": 2.0, "num_classes": 0}, "this model is unconditional"),
    ],
)
def test_an_option_out_of_its_bounds_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        resolved(**given)


def test_the_option_names_are_the_fields():
    assert options.OPTION_NAMES == ("sampler", "steps", "guidance", "eta", "precision")


def test_the_module_imports_no_torch():
    code = "import sys, diffusion.options; assert not {'torch', 'numpy'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_sampler_has_a_largest_eta_and_a_grid():
    assert options.MAX_ETA.keys() == samplers.SAMPLERS.keys() == samplers.GRIDS.keys()


def choices(add_flags) -> dict[str, set[str]]:
    """The choices of each flag that has some."""
    parser = cli.ArgumentParser("")
    add_flags(parser)
    return {action.dest: set(action.choices) for action in parser._actions if action.choices}


def test_the_command_line_offers_every_sampler_schedule_and_prediction():
    found = choices(cli.add_diffusion_flags)
    assert found["sampler"] == set(options.MAX_ETA)
    assert found["schedule"] == set(process.SCHEDULES)
    assert found["prediction"] == set(process.PREDICTIONS)
    assert choices(cli.add_sampling_flags) == {"sampler": set(options.MAX_ETA), "precision": set(options.PRECISIONS)}


@pytest.mark.parametrize("add_flags", [cli.add_diffusion_flags, cli.add_sampling_flags])
def test_the_help_text_shows_the_default_steps_and_eta(add_flags):
    parser = cli.ArgumentParser("")
    add_flags(parser)
    text = " ".join(parser.format_help().split())
    assert f"(default: {options.DEFAULT_STEPS}, class-conditional {options.CONDITIONAL_STEPS}; ddim: 15; ddpm: every" in text
    assert f"(default: {options.UNCONDITIONAL_ETA:g}, class-conditional {options.CONDITIONAL_ETA:g}; ddim: 0)" in text
