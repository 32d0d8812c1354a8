"""The benchmarks whose results are shipped: what they measure, and that they notice what they should."""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import re

import pytest
import torch
from conftest import ROOT, error_line, read_csv, run_process, tiny_ddpm
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import data

RANGES = ("pixels in [0, 1], cut to integers", "pixels in [-1, 1], read as [0, 1]")


@pytest.fixture
def module(monkeypatch):
    """A function that imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def test_the_samplings_are_scored_and_go_on_where_they_were(mnist_dir, tmp_path):
    """benchmarks/samplers.py: a row for each measurement, none of them twice, and none of another protocol."""
    tiny, out = tiny_ddpm(tmp_path, timesteps=5), tmp_path / "out"
    args = ["--model", tiny, "--n", 500, "--steps", 4, 5, 15, "--eta", 0, 2, "--guidance", 1, 1.3, "--digit-eta", 2]
    args += ["--seeds", 1, "--data-dir", mnist_dir, "--out-dir", out]
    assert run_process("benchmarks/samplers.py", *args).returncode == 0
    rows = read_csv(out / "samplers.csv")
    free = [row for row in rows if row["drawn"] == "any digit"]
    curves = [("dpm-solver++", steps, eta) for steps in "45" for eta in "02"] + [("ddim", "4", "0"), ("ddim", "5", "0")]
    assert [(row["sampler"], row["steps"], row["eta"]) for row in free] == [*curves, ("ddpm", "5", "0")]
    assert not any(row["label_accuracy"] for row in free)
    asked = [row for row in rows if row["drawn"] == "on demand"]
    assert [(row["eta"], row["guidance"]) for row in asked] == [("0.8", "1"), ("0.8", "1.3"), ("2", "2.25")]
    assert all(row["label_accuracy"] for row in asked)
    assert len({row["fid"] for row in rows}) == len(rows)  # no option was ignored

    stale = [(rows[0]["checkpoint"], "0" * 16), ("renewed below 2,", "renewed below 3,"), (",cpu,", ",cuda,"),
             (",fp32,", ",bf16,"), (",500,", ",1000,")]  # fmt: skip
    first = (out / "samplers.csv").read_text().splitlines()[1]
    with (out / "samplers.csv").open("a") as file:
        file.writelines(first.replace(*change) + "\n" for change in stale)
    picture = (out / "samplers.png").read_bytes()
    result = run_process("benchmarks/samplers.py", *args)
    assert result.returncode == 0 and "(one seed)" in result.stdout, result.stderr
    assert read_csv(out / "samplers.csv") == rows
    assert (out / "samplers.png").read_bytes() == picture


def test_every_figure_gets_worse_with_damage(mnist_dir, tmp_path):
    """benchmarks/self_check.py: noise, blur, shifts and missing classes, each at several levels."""
    result = run_process("benchmarks/self_check.py", "--n", 500, "--data-dir", mnist_dir, "--out", tmp_path / "a.csv")
    assert result.returncode == 0, result.stderr
    assert "every figure gets worse" in result.stdout and len((tmp_path / "a.csv").read_text().splitlines()) == 19


@pytest.fixture(scope="module")
def mistakes(mnist_dir, tmp_path_factory):
    """benchmarks/pitfalls.py with an untrained diffusion model: (model, mistake) -> row."""
    folder = tmp_path_factory.mktemp("pitfalls")
    args = ["--diffusion", tiny_ddpm(folder), "--n", 1000, "--diffusion-n", 500, "--steps", 2, "--data-dir", mnist_dir]
    result = run_process("benchmarks/pitfalls.py", *args, "--out", folder / "pitfalls.csv")
    assert result.returncode == 0, result.stderr
    return {(row["model"], row["mistake"]): row for row in read_csv(folder / "pitfalls.csv")}


def test_mistakes_are_scored_beside_the_same_model_without_them(mistakes):
    assert (
        {model for model, _ in mistakes} == {"real digits", "DCGAN", "DDPM"} == {m for m, mistake in mistakes if not mistake}
    )
    assert len(mistakes) == 12
    assert all((row["label_accuracy"] != "") == (row["model"] == "DDPM") for row in mistakes.values())


def test_mistakes_cost_what_they_should(mistakes):
    for model in ("real digits", "DCGAN"):
        whole, cut, half = (mistakes[model, mistake] for mistake in ("", *RANGES))
        assert float(cut["is"]) < 1.1 and float(cut["fid_ratio"]) > 100
        assert float(whole["fid"]) < float(half["fid"]) < float(cut["fid"])
    blind = mistakes["DCGAN", "average of the parameters alone: BatchNorm's mean 0, variance 1"]
    assert float(blind["fid"]) > 10 * float(mistakes["DCGAN", ""]["fid"])
    assert mistakes["DCGAN", "fewer samples"]["n"] == "500"
    diffusion = [row["fid"] for (model, _), row in mistakes.items() if model == "DDPM"]
    assert len(set(diffusion)) == 4  # four ways of sampling


def test_the_models_are_the_right_way_round(mnist_dir, tmp_path):
    args = ["--gan", "checkpoints/best_CGAN_G.pt", "--diffusion", tiny_ddpm(tmp_path), "--data-dir", mnist_dir]
    result = run_process("benchmarks/pitfalls.py", *args, "--out", tmp_path / "a.csv")
    assert result.returncode == 1 and "unconditional GAN" in error_line(result.stderr)


def test_a_recipe_is_trained_as_its_flags_say(mnist_dir, tmp_path):
    """benchmarks/ablation.py: the same minutes for each, and a row with its own network and figures, each measured once."""
    out = tmp_path / "a.csv"
    args = ["--minutes", 0.02, "--n", 500, "--precision", "fp32", "--data-dir", mnist_dir, "--out", out]
    recipes = {
        "diffusion": ["width=8 batch_size=8 steps=2 muon_lr=0", "width=16 batch_size=8 steps=2"],
        "gan": ["width=2 batch_size=8", "width=8 batch_size=8 no_ema loss=relativistic"],
    }
    for model, wanted in recipes.items():
        result = run_process("benchmarks/ablation.py", "--model", model, "--recipes", *wanted, "--seeds", 0, *args)
        assert result.returncode == 0, result.stderr
        small, large = (row for row in read_csv(out) if row["model"] == model)
        assert [small["recipe"], large["recipe"]] == wanted
        assert float(small["parameters_m"]) < float(large["parameters_m"]) and int(small["steps"]) > int(large["steps"])
        assert small["fid"] != large["fid"]
        if model == "diffusion":
            assert small["fid"] != small["fid_asked"] != large["fid_asked"]
    before = out.read_text()
    result = run_process("benchmarks/ablation.py", "--model", "gan", "--recipes", recipes["gan"][0], "--seeds", 0, 1, *args)
    assert result.returncode == 0 and out.read_text().startswith(before)  # the first seed is there already
    assert [row["seed"] for row in read_csv(out)] == ["0"] * 4 + ["1"] and out.with_suffix(".png").stat().st_size > 1000


def test_every_recipe_of_the_study_is_another_one(module):
    study = vars(module("ablation"))
    knobs = (study["GAN_KNOBS"] | study["DIFFUSION_KNOBS"]) - {"preset"}
    for model, recipes in study["RECIPES"].items():
        trainers = [vars(study["trainer_args"](model, recipe)) for recipe in recipes]
        settings = [{name: flags[name] for name in knobs & flags.keys()} for flags in trainers]
        assert len(settings) == len(recipes) > 10 and all(settings.count(setting) == 1 for setting in settings)
        reference, defaults = (settings[recipes.index(recipe)] for recipe in ("preset=reference", "defaults"))
        assert (reference["lr"], reference["batch_size"], reference["lr_schedule"]) == (1e-4, 128, "constant")
        assert reference.keys() == defaults.keys() and reference["lr"] != defaults["lr"]


def test_a_recipe_without_effect_is_refused(tmp_path):
    args = ["--out", tmp_path / "a.csv", "--recipes"]
    result = run_process("benchmarks/ablation.py", *args, "widht=8")
    assert result.returncode == 2 and "widht" in error_line(result.stderr)
    result = run_process("benchmarks/ablation.py", *args, "loss=bce")  # a GAN's
    assert result.returncode == 2 and "--loss" in error_line(result.stderr)
    for recipe, named in (("epochs=3", "epochs"), ("lr_schedule=plateau", "lr_schedule=plateau")):
        result = run_process("benchmarks/ablation.py", *args, recipe)
        assert result.returncode == 1 and f"{named} would have no effect" in error_line(result.stderr)


def test_what_runs_apart_has_none_of_our_allocator_settings(module, monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    asked = functools.partial(os.getenv, "THP_MEM_ALLOC_ENABLE")
    assert asked() == "1"
    while_it_is_set = module("timing").LoopApart(iter, asked, None)
    with pytest.raises(StopIteration):
        while_it_is_set.flops()
    while_it_is_set.close()


class Computed(TorchDispatchMode):
    """What is computed while it is active: operations, with the shapes and strides of their tensors."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, _types, args=(), kwargs=None):
        tensors = [(tuple(t.shape), t.stride()) for t in pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
        self.operations.append((str(operation), tensors))
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("what", ["gan", "cgan", "diffusion", "sampling"])
def test_each_choice_is_undone(what, module, mnist_dir):
    """benchmarks/choices.py: each choice but torch.compile, which takes a minute, changes what a step computes."""
    choices = module("choices")
    loop, names = choices.TABLES[what]
    digits = data.load_digits("mnist", "train", mnist_dir)
    args = argparse.Namespace(batch_size=8, data_dir=mnist_dir)

    def computed(choice: str) -> list:
        with Computed() as mode:
            next(loop(args, digits, "fp32", choice))
        return mode.operations

    as_it_is = computed(choices.AS_IS)
    assert computed(choices.AS_IS) == as_it_is
    undone = set(choices.possible(names, torch.device("cpu"))) - {"compiled", choices.ALLOCATOR}
    assert undone and not [choice for choice in undone if computed(choice) == as_it_is]


def test_a_choice_is_timed_beside_the_step_as_it_is(mnist_dir):
    args = ["--batch-size", 8, "--steps", 1, "--repeats", 1, "--precisions", "fp32", "--data-dir", mnist_dir]
    undone = ["contiguous", "the C library's allocator settings"]
    result = run_process("benchmarks/choices.py", "--what", "gan", "--undo", *undone, *args, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    (table,) = re.split("^torch .*$", result.stdout, flags=re.MULTILINE)[1:]
    assert re.findall(r"^(.*), fp32 +\d+ img/s .* x 1.00 ", table, re.MULTILINE) == ["as it is"]
    assert re.findall(r"^(.*?) +x [\d.]+ +\(", table, re.MULTILINE) == undone


def test_what_a_training_cannot_do_is_said(tmp_path):
    """benchmarks/growth.py, by the line that the trainer says."""
    growth = functools.partial(run_process, "benchmarks/growth.py", "--trainers", "gan", "--out", tmp_path / "a.csv")
    result = growth("--images", 64, "--batch-sizes", 128, "--device", "cpu")
    assert result.returncode == 1 and "failed: --batch-size 128" in error_line(result.stderr)
    result = growth("--environment", "OMP_NUM_THREADS")
    assert result.returncode == 2 and "is not NAME=VALUE" in error_line(result.stderr)


def test_the_profile_names_what_costs(mnist_dir):
    """benchmarks/profile_steps.py: in every loop a convolution comes first."""
    args = ["--precisions", "fp32", "--batch-size", 16, "--steps", 1, "--rows", 2, "--data-dir", mnist_dir]
    result = run_process("benchmarks/profile_steps.py", "--device", "cpu", *args)
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r" ms\n +[\d.]+%  aten::\w*convolution\w*\n +[\d.]+%", result.stdout)) == 3, result.stdout


def test_the_peers_are_trained_and_drawn_by_each_sampler(mnist_dir, tmp_path):
    """benchmarks/peers.py, but for the peer that is in no requirements of the tests."""
    args = ["--peers", "ours", "diffusers", "--precisions", "fp32", "--minutes", 0.01, "--batch-size", 4, "--n", 500]
    args += ["--ddim-steps", 2, "--dpm-solver-steps", 3, "--data-dir", mnist_dir, "--device", "cpu"]
    result = run_process("benchmarks/peers.py", *args, "--out", tmp_path / "a.csv")
    assert result.returncode == 0, result.stderr
    rows = read_csv(tmp_path / "a.csv")
    drawn = [(peer, *how) for peer in ("ours", "diffusers") for how in (("ddim", "2"), ("dpm-solver++", "3"))]
    assert [(row["peer"], row["sampler"], row["evaluations"]) for row in rows] == drawn
    assert len({row["fid"] for row in rows}) == len({path.read_bytes() for path in tmp_path.glob("*.png")}) == 4
    for measured in ("parameters_m", "gflop"):  # of like size
        ours, _, theirs, _ = (float(row[measured]) for row in rows)
        assert abs(ours / theirs - 1) < 0.02
