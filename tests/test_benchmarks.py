"""The benchmarks: what they write, what they refuse, and that they notice what they should."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import os
import re
import sys
from types import ModuleType

import pytest
import torch
from conftest import ROOT, error_line, read_csv, run_process, tiny_ddpm
from test_models import small
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import data
import train_gan
from checkpoint import file_sha256, save_model
from cli import run_script
from files import write_json
from scoring import metrics
from scoring.extractor import Extractor
from scoring.reference import Reference
from scoring.scorer import FullScorer

BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if "run_script(main)" in path.read_text())
RIGHT_DISTANCE = metrics.frechet_distance
RANGES = ("pixels in [0, 1], cut to integers", "pixels in [-1, 1], read as [0, 1]")

sys.path.append(str(BENCHMARKS))  # the benchmarks import each other


def load(name: str) -> ModuleType:
    """Import a benchmark."""
    return importlib.import_module(name)


@pytest.fixture
def run_benchmark(capsys):
    """Run a benchmark in this process. Gives (exit code, stdout, stderr)."""

    def call(name: str, *args: object):
        code = 0
        try:
            run_script(lambda: load(name).main([str(arg) for arg in args]))
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return call


@contextlib.contextmanager
def few_samples(name: str):
    """Let a benchmark score 50 samples. Their floor is not known, so the FID stands for the FID ratio."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load(name), "FLOOR_SIZES", (50,))
        patch.setattr(Reference, "ratio", lambda _self, fid, _n: fid)
        yield


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_the_command_of_the_benchmark(name, run_benchmark, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    code, out, _ = run_benchmark(name, "--help")
    assert code == 0
    assert f"python benchmarks/{name}.py" in out


# --------------------------------------------------------------------------------------------------------------------
# samplers.py


@pytest.fixture(scope="module")
def sampling(mnist_dir, tmp_path_factory):
    """The arguments of a run of samplers.py with an untrained model of five timesteps, after that run; and its folder."""
    folder = tmp_path_factory.mktemp("samplers")
    out = folder / "out"
    args = ["--model", tiny_ddpm(folder, timesteps=5), "--n", 50, "--steps", 4, 5, 15, "--eta", 0, 2]
    args += ["--guidance", 1, 1.3, "--digit-eta", 2, "--seeds", 1, "--data-dir", mnist_dir, "--out-dir", out]
    with few_samples("samplers"):
        load("samplers").main([*map(str, args)])
    return args, out


def rows_drawn(sampling, drawn: str) -> list[dict[str, str]]:
    """The rows of samplers.csv with this value in the column `drawn`."""
    _, out = sampling
    return [row for row in read_csv(out / "samplers.csv") if row["drawn"] == drawn]


def test_samplers_measures_every_unconditional_setting_once(sampling):
    curves = [("dpm-solver++", steps, eta) for steps in "45" for eta in "02"] + [("ddim", "4", "0"), ("ddim", "5", "0")]
    found = [(row["sampler"], row["steps"], row["eta"]) for row in rows_drawn(sampling, "unconditional")]
    assert found == [*curves, ("ddpm", "5", "0")]


def test_samplers_measures_every_conditional_setting_once(sampling):
    found = {(row["steps"], row["eta"], row["guidance"]) for row in rows_drawn(sampling, "class-conditional")}
    assert found == {("5", "0.5", "1"), ("5", "0.5", "1.3"), ("5", "2", "2.5"), ("4", "0.5", "2.5"), ("5", "0.5", "2.5")}
    assert len(rows_drawn(sampling, "class-conditional")) == len(found)


def test_only_conditional_samples_have_a_label_accuracy(sampling):
    assert all(row["label_accuracy"] for row in rows_drawn(sampling, "class-conditional"))
    assert not any(row["label_accuracy"] for row in rows_drawn(sampling, "unconditional"))


def test_every_sampling_option_changes_the_figures(sampling):
    rows = rows_drawn(sampling, "unconditional") + rows_drawn(sampling, "class-conditional")
    assert len({row["fid"] for row in rows}) == len(rows)


def test_samplers_drops_rows_of_another_protocol_and_measures_nothing_twice(sampling, run_benchmark, monkeypatch):
    args, out = sampling
    table = out / "samplers.csv"
    before = table.read_bytes()
    picture = (out / "samplers.png").read_bytes()
    first = table.read_text().splitlines()[1]
    checkpoint = read_csv(table)[0]["checkpoint"]
    changes = [(checkpoint, "0" * 16), ("noise below 2,", "noise below 3,"), (",cpu,", ",cuda,")]
    changes += [(",fp32,", ",bf16,"), (",50,", ",1000,")]
    with table.open("a") as file:
        file.writelines(first.replace(*change) + "\n" for change in changes)
    monkeypatch.setattr(load("samplers"), "score", None)  # a second measurement would call it
    with few_samples("samplers"):
        code, stdout, stderr = run_benchmark("samplers", *args)
    assert code == 0, stderr
    assert "(one seed)" in stdout
    assert table.read_bytes() == before
    assert (out / "samplers.png").read_bytes() == picture


# --------------------------------------------------------------------------------------------------------------------
# self_check.py


@pytest.fixture(scope="module")
def digits_to_check(mnist_dir):
    """A scorer against the test set, and 2,500 training digits. The two-sample test is left to `long`."""
    train, test = (data.load_digits("mnist", split, mnist_dir) for split in ("train", "test"))
    return FullScorer(test, test, train, Extractor()), train.subset(2500, "few")


def test_every_figure_gets_worse_with_damage(digits_to_check, run_benchmark, monkeypatch, mnist_dir, tmp_path):
    scorer, _ = digits_to_check
    monkeypatch.setattr(load("self_check"), "FullScorer", lambda *_: scorer)
    monkeypatch.setattr(load("self_check"), "TOLD_APART", [])
    monkeypatch.setattr(metrics, "kernel_distance", functools.partial(metrics.kernel_distance, subsets=10))  # saves seconds
    code, out, err = run_benchmark("self_check", "--n", 500, "--data-dir", mnist_dir, "--out", tmp_path / "a.csv")
    assert code == 0, err
    assert "every figure gets worse" in out
    assert "FID and inception score agree" in out
    assert len(read_csv(tmp_path / "a.csv")) == 18


def test_a_figure_that_does_not_see_damage_is_named(digits_to_check, run_benchmark, monkeypatch, mnist_dir, tmp_path):
    scorer, _ = digits_to_check
    self_check = load("self_check")
    monkeypatch.setattr(self_check, "FullScorer", lambda *_: scorer)
    monkeypatch.setattr(self_check, "TOLD_APART", [])
    monkeypatch.setattr(self_check, "DAMAGES", {self_check.shifted: ((0, 4, 1), ("fid",))})
    code, _, err = run_benchmark("self_check", "--n", 500, "--data-dir", mnist_dir, "--out", tmp_path / "a.csv")
    assert code == 1
    assert "fid of shifted digits" in error_line(err)


@pytest.mark.parametrize(("wanted", "code"), [((0.9, 1), 0), ((0.4, 0.6), 1)])
def test_the_two_sample_test_is_checked(wanted, code, digits_to_check, run_benchmark, monkeypatch, mnist_dir, tmp_path):
    """With a small budget, for digits with a haze that nobody can miss."""
    scorer, _ = digits_to_check
    self_check = load("self_check")
    monkeypatch.setattr(self_check, "FullScorer", lambda *_: scorer)
    monkeypatch.setattr(self_check, "DAMAGES", {self_check.shifted: ((0, 4), ("fid",))})
    monkeypatch.setattr(self_check, "TOLD_APART", [("hazy", 200, *wanted)])
    for name, value in {"TRAIN": 600, "JUDGED": 400, "NEEDED": 1000}.items():
        monkeypatch.setattr(self_check.two_sample, name, value)
    found, _, err = run_benchmark("self_check", "--n", 500, "--data-dir", mnist_dir, "--out", tmp_path / "a.csv")
    assert found == code, err
    assert ("two-sample accuracy of hazy digits" in err) == (code == 1)
    assert float(read_csv(tmp_path / "a.csv")[-1]["two_sample"]) > 0.9


def test_our_metrics_agree_with_the_independent_implementations(digits_to_check, capsys):
    assert load("self_check").compare(*digits_to_check, 500) == []
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 * 3  # undamaged and four damages; scipy's FID, torchmetrics' FID and inception score
    assert all("relative difference" in line for line in lines)


def wrong_distance(a: metrics.Gaussian, b: metrics.Gaussian) -> float:
    """The Fréchet distance with the difference of the means instead of its square."""
    difference = a.mean - b.mean
    return RIGHT_DISTANCE(a, b) - float(difference.square().sum()) + float(difference.norm())


def test_a_wrong_fid_is_found(digits_to_check, monkeypatch):
    monkeypatch.setattr(metrics, "frechet_distance", wrong_distance)
    different = load("self_check").compare(*digits_to_check, 500)
    assert len(different) == 5 * 2
    assert all(line.startswith("FID of ") for line in different)


def test_a_wrong_inception_score_is_found(digits_to_check, monkeypatch):
    monkeypatch.setattr(metrics, "inception_score", lambda *_, **__: metrics.Estimate(9.0, 0.0))
    different = load("self_check").compare(*digits_to_check, 500)
    assert len(different) == 5
    assert all(line.startswith("inception score of ") for line in different)


def test_a_difference_from_another_implementation_is_one_error_line(
    digits_to_check, run_benchmark, monkeypatch, mnist_dir, tmp_path
):
    scorer, _ = digits_to_check
    self_check = load("self_check")
    monkeypatch.setattr(self_check, "FullScorer", lambda *_: scorer)
    monkeypatch.setattr(self_check, "TOLD_APART", [])
    monkeypatch.setattr(self_check, "DAMAGES", {self_check.shifted: ((0, 4), ("fid",))})
    monkeypatch.setattr(metrics, "frechet_distance", wrong_distance)
    code, _, err = run_benchmark("self_check", "--n", 500, "--data-dir", mnist_dir, "--out", tmp_path / "a.csv")
    assert code == 1
    assert "FID of undamaged digits from scipy" in error_line(err)


# --------------------------------------------------------------------------------------------------------------------
# pitfalls.py


@pytest.fixture(scope="module")
def mistakes(mnist_dir, tmp_path_factory):
    """The rows of pitfalls.py, with an untrained diffusion model: (model, mistake) -> row."""
    folder = tmp_path_factory.mktemp("pitfalls")
    args = ["--gan", ROOT / "checkpoints" / "best_GAN_G.pt", "--diffusion", tiny_ddpm(folder), "--data-dir", mnist_dir]
    args += ["--n", 1000, "--diffusion-n", 500, "--steps", 2, "--out", folder / "pitfalls.csv"]
    load("pitfalls").main([*map(str, args)])
    return {(row["model"], row["mistake"]): row for row in read_csv(folder / "pitfalls.csv")}


def test_every_model_has_a_row_without_a_mistake(mistakes):
    models = {model for model, _ in mistakes}
    assert models == {"real digits", "DCGAN", "DDPM"}
    assert models == {model for model, mistake in mistakes if not mistake}


def test_pitfalls_has_a_row_for_each_mistake(mistakes):
    assert len(mistakes) == 12


def test_only_the_conditional_model_has_a_label_accuracy(mistakes):
    assert {model for (model, _), row in mistakes.items() if row["label_accuracy"]} == {"DDPM"}
    assert all(row["label_accuracy"] for (model, _), row in mistakes.items() if model == "DDPM")


@pytest.mark.parametrize("model", ["real digits", "DCGAN"])
def test_pixels_in_another_range_ruin_the_figures(model, mistakes):
    whole, cut, half = (mistakes[model, mistake] for mistake in ("", *RANGES))
    assert float(cut["is"]) < 1.1
    assert float(cut["fid_ratio"]) > 100
    assert float(whole["fid"]) < float(half["fid"]) < float(cut["fid"])


def test_an_average_without_batchnorm_statistics_ruins_the_figures(mistakes):
    blind = mistakes["DCGAN", "average of the parameters alone: BatchNorm's mean 0, variance 1"]
    assert float(blind["fid"]) > 10 * float(mistakes["DCGAN", ""]["fid"])


def test_fewer_samples_are_scored(mistakes):
    assert mistakes["DCGAN", "fewer samples"]["n"] == "500"


def test_every_wrong_schedule_changes_the_samples(mistakes):
    fids = [row["fid"] for (model, _), row in mistakes.items() if model == "DDPM"]
    assert len(set(fids)) == len(fids) == 4


def test_pitfalls_refuses_a_conditional_gan(mnist_dir, tmp_path, run_benchmark):
    args = ["--gan", ROOT / "checkpoints" / "best_CGAN_G.pt", "--diffusion", tiny_ddpm(tmp_path), "--data-dir", mnist_dir]
    code, _, err = run_benchmark("pitfalls", *args, "--out", tmp_path / "a.csv")
    assert code == 1
    assert "unconditional GAN" in error_line(err)


# --------------------------------------------------------------------------------------------------------------------
# ablation.py

COMPARED_RECIPES = {
    "diffusion": ["width=8 batch_size=8 steps=2 muon_lr=0 stable_targets=0", "width=16 batch_size=8 steps=2"],
    "gan": ["width=2 batch_size=8", "width=16 batch_size=8 no_ema loss=relativistic"],
}


@pytest.fixture(scope="module")
def study(mnist_dir, tmp_path_factory):
    """The arguments of runs of ablation.py, after the runs with `COMPARED_RECIPES`; and their table."""
    table = tmp_path_factory.mktemp("ablation") / "a.csv"
    args = ["--minutes", 0.01, "--n", 50, "--precision", "fp32", "--data-dir", mnist_dir, "--out", table]
    with few_samples("ablation"):
        for model, recipes in COMPARED_RECIPES.items():
            load("ablation").main([*map(str, ["--model", model, "--recipes", *recipes, "--seeds", 0, *args])])
    return args, table


@pytest.mark.parametrize("model", COMPARED_RECIPES)
def test_each_recipe_is_trained_with_its_own_flags(model, study):
    _, table = study
    small, large = (row for row in read_csv(table) if row["model"] == model)
    assert [small["recipe"], large["recipe"]] == COMPARED_RECIPES[model]
    assert float(small["parameters_m"]) < float(large["parameters_m"])
    assert small["fid"] != large["fid"]


@pytest.mark.parametrize("model", COMPARED_RECIPES)
def test_a_faster_recipe_takes_more_steps_in_the_same_minutes(model, study):
    _, table = study
    small, large = (row for row in read_csv(table) if row["model"] == model)
    assert int(small["steps"]) > int(large["steps"])


def test_a_diffusion_recipe_is_scored_without_labels_and_with_them(study):
    _, table = study
    for row in read_csv(table):
        if row["model"] == "diffusion":
            assert row["fid_unconditional"]
            assert row["fid_unconditional"] != row["fid"]
        else:
            assert not row["fid_unconditional"]


def test_a_recipe_that_was_measured_is_not_measured_again(study, run_benchmark):
    args, table = study
    before = table.read_text()
    recipe = COMPARED_RECIPES["gan"][0]
    with few_samples("ablation"):
        code, _, err = run_benchmark("ablation", "--model", "gan", "--recipes", recipe, "--seeds", 0, 1, *args)
    assert code == 0, err
    assert table.read_text().startswith(before)
    assert [row["seed"] for row in read_csv(table)] == ["0"] * 4 + ["1"]
    assert table.with_suffix(".png").stat().st_size > 1000


@pytest.mark.parametrize("model", ["gan", "cgan", "diffusion"])
def test_no_two_recipes_of_the_study_have_equal_flags(model):
    settings = settings_of_the_study(model)
    assert len(settings) > 10
    assert all(settings.count(setting) == 1 for setting in settings)


@pytest.mark.parametrize("model", ["gan", "cgan", "diffusion"])
def test_the_reference_recipe_is_the_classic_table(model):
    recipes = load("ablation").RECIPES[model]
    settings = dict(zip(recipes, settings_of_the_study(model)))
    reference = settings["preset=reference"]
    assert (reference["lr"], reference["batch_size"], reference["lr_schedule"]) == (1e-4, 128, "constant")
    assert settings["preset=cpu"].keys() == reference.keys()
    assert settings["preset=cpu"]["lr"] != reference["lr"]


def settings_of_the_study(model: str) -> list[dict[str, object]]:
    """The flags of each recipe of ablation.py that have an effect there."""
    ablation = load("ablation")
    knobs = (ablation.GAN_KNOBS | ablation.DIFFUSION_KNOBS) - {"preset"}
    trainers = [vars(ablation.trainer_args(model, recipe)) for recipe in ablation.RECIPES[model]]
    return [{name: flags[name] for name in knobs & flags.keys()} for flags in trainers]


@pytest.mark.parametrize(
    ("recipe", "code", "reason"),
    [
        ("widht=8", 2, "widht"),
        ("loss=bce", 2, "--loss"),  # the diffusion model has no such flag
        ("epochs=3", 1, "epochs would have no effect"),
        ("lr_schedule=plateau", 1, "lr_schedule=plateau would have no effect"),
    ],
)
def test_a_recipe_without_effect_is_refused(recipe, code, reason, tmp_path, run_benchmark):
    found, _, err = run_benchmark("ablation", "--out", tmp_path / "a.csv", "--recipes", recipe)
    assert found == code
    assert reason in error_line(err)


# --------------------------------------------------------------------------------------------------------------------
# Speed: timing.py, choices.py, growth.py, profile_steps.py, peers.py


def test_a_loop_in_its_own_process_has_the_default_allocator_settings(monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    setting = functools.partial(os.getenv, "THP_MEM_ALLOC_ENABLE")
    assert setting() == "1"
    while_it_is_set = load("timing").LoopApart(iter, setting, None)  # ends at once where the variable is not set
    with pytest.raises(StopIteration):
        while_it_is_set.flops()
    while_it_is_set.close()


class Recorder(TorchDispatchMode):
    """Records the operations while it is active, with the shapes and strides of their tensors."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, _types, args=(), kwargs=None):
        tensors = [(tuple(t.shape), t.stride()) for t in pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
        self.operations.append((str(operation), tensors))
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("what", ["gan", "cgan", "diffusion", "sampling", "call"])
def test_each_choice_that_is_undone_changes_the_computation(what, mnist_dir, monkeypatch):
    """All but torch.compile, which takes a minute, and the allocator's settings."""
    choices = load("choices")
    monkeypatch.setattr(choices, "our_network", lambda device: choices.ddpm.build("ddpm", width=8).to(device))
    monkeypatch.setattr(choices.models, "SamplingNoise", choices.models.SamplingNoise)  # which a choice replaces
    if what == "call":
        monkeypatch.setitem(choices.SAMPLED, "cpu", 8)
    loop, names = choices.TABLES[what]
    digits = data.load_digits("mnist", "train", mnist_dir).subset(64, "few")
    args = argparse.Namespace(batch_size=8, data_dir=mnist_dir)

    def operations(choice: str) -> list:
        with Recorder() as recorder:
            next(loop(args, digits, "fp32", choice))
        return recorder.operations

    as_it_is = operations(choices.AS_IS)
    assert operations(choices.AS_IS) == as_it_is
    undone = set(choices.possible(names, torch.device("cpu"))) - {"compiled", choices.ALLOCATOR}
    assert undone
    assert not [choice for choice in undone if operations(choice) == as_it_is]


@pytest.mark.parametrize("what", ["gan", "diffusion"])
def test_adam_without_fusion_takes_the_same_step(what, mnist_dir, monkeypatch):
    choices = load("choices")
    loop, _ = choices.TABLES[what]
    digits = data.load_digits("mnist", "train", mnist_dir).subset(64, "few")
    weights = []

    class Observed(choices.EMA):
        def __init__(self, model, decay):
            super().__init__(model, decay)
            self.note()

        def after_step(self, state):
            super().after_step(state)
            self.note()

        def note(self):
            weights.append(torch.cat([parameter.flatten() for parameter in self.model.parameters()]))

    monkeypatch.setattr(choices, "EMA", Observed)
    for choice in (choices.AS_IS, "Adam not fused"):
        next(loop(argparse.Namespace(batch_size=8, data_dir=mnist_dir), digits, "fp32", choice))
    before, fused, again, unfused = weights
    assert torch.equal(before, again)
    assert (fused - unfused).norm() < 0.01 * (fused - before).norm()  # they differ by rounding


@pytest.mark.long
def test_a_choice_is_timed_beside_the_step_as_it_is(mnist_dir):
    args = ["--batch-size", 8, "--steps", 1, "--repeats", 1, "--precisions", "fp32", "--data-dir", mnist_dir]
    undone = ["the other memory format", "the C library's allocator settings"]
    result = run_process("benchmarks/choices.py", "--what", "gan", "--undo", *undone, *args, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    (table,) = re.split("^torch .*$", result.stdout, flags=re.MULTILINE)[1:]
    assert re.findall(r"^(.*), fp32 +\d+ img/s .* x 1.00 ", table, re.MULTILINE) == ["as it is"]
    assert re.findall(r"^(.*?) +x [\d.]+ +\(", table, re.MULTILINE) == undone


def test_growth_repeats_the_error_line_of_the_trainer(tmp_path, run_benchmark):
    args = ["--trainers", "gan", "--images", 64, "--batch-sizes", 128, "--device", "cpu", "--out", tmp_path / "a.csv"]
    code, _, err = run_benchmark("growth", *args)
    assert code == 1
    assert "failed: --batch-size 128" in error_line(err)


def test_growth_refuses_a_variable_without_a_value(tmp_path, run_benchmark):
    code, _, err = run_benchmark("growth", "--environment", "OMP_NUM_THREADS", "--out", tmp_path / "a.csv")
    assert code == 2
    assert "is not NAME=VALUE" in error_line(err)


@pytest.mark.long
def test_convolutions_lead_every_profile(mnist_dir):
    args = ["--precisions", "fp32", "--batch-size", 16, "--steps", 1, "--rows", 2, "--data-dir", mnist_dir]
    result = run_process("benchmarks/profile_steps.py", "--device", "cpu", *args)
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r" ms\n +[\d.]+%  aten::\w*convolution\w*\n +[\d.]+%", result.stdout)) == 3, result.stdout


@pytest.fixture(scope="module")
def peers(mnist_dir, tmp_path_factory):
    """The folder of a run of peers.py, without the peer that is not in requirements-dev.txt."""
    folder = tmp_path_factory.mktemp("peers")
    args = ["--peers", "ours", "diffusers", "--precisions", "fp32", "--minutes", 0.01, "--batch-size", 4, "--n", 500]
    args += ["--ddim-steps", 2, "--dpm-solver-steps", 3, "--data-dir", mnist_dir, "--device", "cpu"]
    result = run_process("benchmarks/peers.py", *args, "--out", folder / "a.csv")
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.long
def test_each_peer_is_sampled_by_each_sampler(peers):
    rows = read_csv(peers / "a.csv")
    expected = [(peer, *how) for peer in ("ours", "diffusers") for how in (("ddim", "2"), ("dpm-solver++", "3"))]
    assert [(row["peer"], row["sampler"], row["evaluations"]) for row in rows] == expected
    assert len({row["fid"] for row in rows}) == 4
    assert len({path.read_bytes() for path in peers.glob("*.png")}) == 4


@pytest.mark.long
@pytest.mark.parametrize("measured", ["parameters_m", "gflop"])
def test_the_peers_are_of_like_size(peers, measured):
    ours, _, theirs, _ = (float(row[measured]) for row in read_csv(peers / "a.csv"))
    assert abs(ours / theirs - 1) < 0.02


# --------------------------------------------------------------------------------------------------------------------
# training_seeds.py

PROTOCOL = {"n": 10_000, "extractor": "mnist", "reference": "mnist test", "repeats": 3}


@pytest.fixture
def trained(tmp_path):
    """Write the scores of a DCGAN of a seed. Gives the folder of its metrics.json."""

    def write(seed: int, fid_ratio: float, n: int = 10_000, **flags):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        defaults = {name: getattr(train_gan.parse_args([]), name) for name in ("lr", "ema", "epochs", "precision")}
        save_model(folder / "gan.pt", "dcgan", small("dcgan"), {"flags": defaults | {"seed": seed} | flags})
        score = {"model": "dcgan", "fid_ratio": fid_ratio, "two_sample": 0.53, **PROTOCOL, "n": n}
        row = score | {"checkpoint": str(folder / "gan.pt"), "sha256": file_sha256(folder / "gan.pt")}
        write_json(folder / "metrics.json", {"rows": [{"model": "real training digits", "n": n}, row]})
        return folder

    return write


def test_every_seed_has_a_row_and_a_command(run_benchmark, trained, tmp_path):
    flags = {"lr": 0.002, "ema": False, "precision": "bf16"}
    folders = trained(0, 4.0, **flags), trained(2, 5.0, **flags | {"precision": "fp32"})
    code, _, err = run_benchmark("training_seeds", *folders, "--out", tmp_path / "seeds.csv")
    assert (code, err) == (0, "")
    rows = read_csv(tmp_path / "seeds.csv")
    assert [(row["training_seed"], row["fid_ratio"], row["label_accuracy"]) for row in rows] == [
        ("0", "4", ""),
        ("1", "", ""),
        ("2", "5", ""),
    ]
    assert rows[1]["command"] == "python train_gan.py --lr 0.002 --no-ema --black -1.0 --seed 1"


@pytest.mark.parametrize(
    "other, message",
    [
        ({"lr": 0.002}, "in lr, not in the seed alone"),
        ({"n": 500}, "in n, not in the seed alone"),
        ({"seed": 0, "epochs": 60}, "same seed"),
    ],
)
def test_trainings_that_differ_in_more_or_less_than_the_seed_are_refused(run_benchmark, trained, tmp_path, other, message):
    first, second = trained(0, 4.0, epochs=60), trained(**{"seed": 1, "fid_ratio": 5.0, "epochs": 60} | other)
    code, _, err = run_benchmark("training_seeds", first, second, "--out", tmp_path / "seeds.csv")
    assert code == 1
    assert message in error_line(err)
    assert not (tmp_path / "seeds.csv").exists()


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "metrics.json").unlink(), "run evaluate.py first"),
        (lambda folder: (folder / "metrics.json").write_text("[]"), "run evaluate.py first"),
        (lambda folder: save_model(folder / "gan.pt", "dcgan", small("dcgan"), {}), "is not the file"),
    ],
)
def test_figures_without_their_checkpoint_are_refused(run_benchmark, trained, tmp_path, damage, message):
    folder = trained(0, 4.0)
    damage(folder)
    code, _, err = run_benchmark("training_seeds", folder, "--out", tmp_path / "seeds.csv")
    assert code == 1
    assert message in error_line(err)
