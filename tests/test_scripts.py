"""The scripts as a user calls them: a dry run writes every file, and a bad input gives one clear line."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, error_line, read_csv, tiny_ddpm

from checkpoint import file_sha256, load_generator
from models import DDPM
from recipes.ddpm import DiffusionStep
from scoring import reference


def test_train_gan_dry_run_writes_every_file(run, tmp_path):
    args = ["--dry-run", "--dataset", "digits", "--width", 8, "--out-dir", tmp_path]
    code, out, err = run("train_gan.py", *args)
    assert code == 0, err
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {
        "checkpoints/best_GAN_G.pt", "checkpoints/best_GAN_D.pt", "checkpoints/last_GAN.pt",
        "checkpoints/GAN_G_epoch_001.pt", "checkpoints/GAN_D_epoch_001.pt",
        "checkpoints/GAN_G_epoch_002.pt", "checkpoints/GAN_D_epoch_002.pt",
        "reports/gan_training_log.csv", "samples/gan_progress.gif",
    }  # fmt: skip
    assert "FID" in out
    assert "left" in out


def test_a_collapsed_gan_is_reported(run, tmp_path):
    """After four steps, all samples of a GAN look alike."""
    code, out, _ = run("train_gan.py", "--dry-run", "--dataset", "digits", "--width", 8, "--out-dir", tmp_path)
    assert code == 0
    assert "(mode collapse: only" in out
    assert all("mode collapse" in row["warning"] for row in read_csv(tmp_path / "reports" / "gan_training_log.csv"))


def test_train_cgan_scores_and_draws_each_digit(run, tmp_path):
    from PIL import Image

    args = ["--dry-run", "--dataset", "digits", "--width", 8, "--out-dir", tmp_path]
    code, out, err = run("train_cgan.py", *args)
    assert code == 0, err
    for file in ("checkpoints/best_CGAN_G.pt", "checkpoints/best_CGAN_D.pt", "checkpoints/last_CGAN.pt"):
        assert (tmp_path / file).exists(), file
    rows = read_csv(tmp_path / "reports" / "cgan_training_log.csv")
    assert len(rows) == 2
    assert 0 <= float(rows[0]["label_accuracy"]) <= 1
    assert {f"fid_ratio_{digit}" for digit in range(10)} <= rows[0].keys()
    width, height = Image.open(tmp_path / "samples" / "cgan_progress.gif").size
    assert (width, height) == (8 * 30 + 2, 10 * 30 + 2 + 18)  # a row for each digit, and the caption
    assert "label accuracy" in out
    assert load_generator(tmp_path / "checkpoints" / "best_CGAN_G.pt").config.num_classes == 10


def spy(function, calls: list):
    """The function, which also notes its keyword arguments."""

    def noting(*args, **kwargs):
        calls.append(kwargs)
        return function(*args, **kwargs)

    return noting


def test_train_diffusion_dry_run_writes_every_file(run, tmp_path, monkeypatch):
    flags = {"width": 8, "timesteps": 40, "schedule": "linear", "prediction": "eps", "grad_clip": 0.5, "label_dropout": 0.2,
             "muon_lr": 1e-3, "sampler": "ddim", "steps": 3, "eta": 0.5, "guidance": 2.0, "warmup_steps": 3,
             "stable_targets": 0.3}  # fmt: skip
    typed = [text for name, value in flags.items() for text in ("--" + name.replace("_", "-"), value)]
    sampled, steps = [], []
    monkeypatch.setattr(DDPM, "sample", spy(DDPM.sample, sampled))
    monkeypatch.setattr(DiffusionStep, "__init__", spy(DiffusionStep.__init__, steps))
    code, out, err = run("train_diffusion.py", "--dry-run", "--dataset", "digits", *typed, "--out-dir", tmp_path)
    assert code == 0, err
    options = {"sampler": "ddim", "steps": 3, "eta": 0.5, "guidance": 2.0, "precision": "fp32"}
    assert sampled == [options] * 7  # three frames, and two scorings without labels and with them
    assert [(call["grad_clip"], call["label_dropout"], call["stable_targets"].share) for call in steps] == [(0.5, 0.2, 0.3)]
    rates = [row["muon_lr"] for row in read_csv(tmp_path / "reports" / "diffusion_training_log.csv")]
    assert rates == ["0.0005", "0"]  # half a cosine
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {
        "checkpoints/best_DIFF.pt", "checkpoints/last_DIFF.pt",
        "checkpoints/DIFF_epoch_001.pt", "checkpoints/DIFF_epoch_002.pt",
        "reports/diffusion_training_log.csv", "samples/diffusion_progress.gif",
    }  # fmt: skip
    assert "label accuracy" in out
    model = load_generator(tmp_path / "checkpoints" / "best_DIFF.pt")
    assert {name: model.meta["flags"][name] for name in flags} == flags
    config = {name: getattr(model.config, name) for name in ("width", "timesteps", "schedule", "prediction")}
    assert config == {name: flags[name] for name in config} and model.config.num_classes == 10


def test_fine_tuning_starts_from_the_weights_of_a_checkpoint_and_resumes_from_its_own(run, tmp_path, monkeypatch):
    tiny, first = tiny_ddpm(tmp_path), []
    monkeypatch.setattr(DiffusionStep, "__call__", noting_weights(DiffusionStep.__call__, first))
    flags = ["--dry-run", "--dataset", "digits", "--width", 8, "--batch-size", 32, "--steps", 1, "--out-dir", tmp_path]
    assert run("train_diffusion.py", *flags, "--timesteps", 50, "--init", tiny)[0] == 0
    weights = load_generator(tiny).state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in first[0].items())
    meta = load_generator(tmp_path / "checkpoints" / "best_DIFF.pt").meta
    assert meta["flags"]["init"] == file_sha256(tiny)[:16]
    first.clear()
    tiny.unlink()
    assert run("train_diffusion.py", "--resume", "--epochs", 3, "--out-dir", tmp_path)[0] == 0
    assert not all(torch.equal(value, weights[name]) for name, value in first[0].items())


@pytest.mark.parametrize(
    ("model", "code", "reason"),
    [("missing", 1, "does not exist"), ("gan", 2, "holds a dcgan"), ("diffusion of 40 timesteps", 2, "timesteps=40")],
)
def test_fine_tuning_refuses_a_checkpoint_that_does_not_fit(model, code, reason, model_files, run, tmp_path):
    flags = ["--dry-run", "--dataset", "digits", "--width", 8, "--batch-size", 32, "--out-dir", tmp_path]
    found, _, err = run("train_diffusion.py", *flags, "--timesteps", 50, "--init", model_files[model])
    assert found == code
    assert reason in error_line(err)


def noting_weights(function, found: list):
    """The step, which also notes the weights before it."""

    def step(self, *args):
        found.append({name: value.clone() for name, value in self.model.state_dict().items()})
        return function(self, *args)

    return step


@pytest.mark.parametrize("loss", ["hinge", "relativistic"])
def test_train_gan_dry_run_on_mnist(mnist_dir, run, tmp_path, loss):
    args = ["--dry-run", "--data-dir", mnist_dir, "--width", 8, "--loss", loss, "--lr-schedule", "plateau", "--no-ema"]
    code, _, err = run("train_gan.py", *args, "--precision", "bf16", "--out-dir", tmp_path)
    assert code == 0, err
    flags = load_generator(tmp_path / "checkpoints" / "best_GAN_G.pt").meta["flags"]
    assert flags["loss"] == loss
    assert flags["precision"] == "bf16"
    assert flags["ema"] is False


def test_train_classifier_dry_run_writes_weights_and_statistics(mnist_dir, run, tmp_path, fewer_digits, monkeypatch):
    fewer_digits(train=8000, test=1000)
    monkeypatch.setattr(reference, "FLOOR_SIZES", (500,))  # the other floors take most of the time
    code, out, err = run("train_classifier.py", "--dry-run", "--data-dir", mnist_dir, "--out-dir", tmp_path)
    assert code == 0, err
    assert "test accuracy" in out
    assert "SHA-256" in out
    assert {path.name for path in tmp_path.iterdir()} == {"classifier.pt", "classifier_statistics.pt"}


def test_a_trial_without_a_folder_writes_to_runs(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["--dataset", "digits", "--limit", 256, "--width", 8, "--epochs", 1, "--eval-samples", 100]
    assert run("train_gan.py", *args)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_the_reference_preset_sets_the_classic_values(run, tmp_path):
    args = ["--preset", "reference", "--dry-run", "--dataset", "digits", "--width", 8, "--out-dir", tmp_path]
    assert run("train_gan.py", *args)[0] == 0
    flags = load_generator(tmp_path / "checkpoints" / "best_GAN_G.pt").meta["flags"]
    expected = {"batch_size": 128, "lr": 1e-4, "ema_decay": 0.999, "patience": 10, "loss": "bce", "width": 8}
    assert {name: flags[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("script", "epochs", "width"), [("train_gan.py", 100, 64), ("train_cgan.py", 80, 64), ("train_diffusion.py", 100, 16)]
)
def test_the_reference_preset_of_every_trainer(script, epochs, width):
    args = runpy.run_path(str(ROOT / script))["parse_args"](["--preset", "reference"])
    assert (args.epochs, args.batch_size, args.width, args.lr, args.warmup_steps) == (epochs, 128, width, 1e-4, 0)


@pytest.mark.parametrize(("script", "epochs", "batch_size"), [("train_cgan.py", 20, 128), ("train_diffusion.py", 12, 64)])
def test_the_cpu_preset_has_fewer_epochs_and_typed_flags_have_priority(script, epochs, batch_size):
    parse = runpy.run_path(str(ROOT / script))["parse_args"]
    args = parse(["--preset", "cpu"])
    assert (args.epochs, args.batch_size) == (epochs, batch_size)
    assert parse(["--preset", "cpu", "--epochs", "3"]).epochs == 3


def test_the_reference_preset_of_the_diffusion_model():
    args = runpy.run_path(str(ROOT / "train_diffusion.py"))["parse_args"](["--preset", "reference"])
    assert (args.timesteps, args.schedule, args.prediction, args.grad_clip) == (1000, "linear", "eps", 1.0)
    assert (args.time_power, args.muon_lr, args.stable_targets) == (1.0, 0, 0)


BAD_ARGUMENTS = [
    ("train_gan.py", ["--epochs", "0"], "--epochs"),
    ("train_gan.py", ["--batch-size", "-3"], "--batch-size"),
    ("train_gan.py", ["--lr", "nan"], "--lr"),
    ("train_gan.py", ["--d-lr", "1e300"], "--d-lr"),
    ("train_gan.py", ["--epochs", "1" + "0" * 12], "--epochs"),
    ("train_diffusion.py", ["--muon-lr", "-1"], "--muon-lr"),
    ("train_gan.py", ["--ema-decay", "1"], "--ema-decay"),
    ("train_gan.py", ["--dataset", "cifar"], "--dataset"),
    ("train_gan.py", ["--loss", "wasserstein"], "--loss"),
    ("train_gan.py", ["--epo", "3"], "unrecognized"),
    ("train_gan.py", ["--epochs", "2", "--eval-every", "3"], "--eval-every 3"),
    ("train_classifier.py", ["--epochs", "none"], "--epochs"),
    ("train_gan.py", ["--eval-samples", "9"], "--eval-samples"),
    ("train_gan.py", ["--seed", "9" * 30], "--seed"),
    ("train_cgan.py", ["--epochs", "0"], "--epochs"),
    ("train_cgan.py", ["--lr-schedule", "plateau", "--warmup-steps", "5"], "--warmup-steps"),
    ("train_diffusion.py", ["--timesteps", "5", "--steps", "10"], "steps must be an integer in 1..5, the timesteps, not 10"),
    ("train_diffusion.py", ["--sampler", "ddim", "--eta", "2"], "eta of ddim must lie in 0..1.0, not 2.0"),
    ("train_diffusion.py", ["--stable-targets", "1"], "--stable-targets"),
    ("train_diffusion.py", ["--grad-clip", "-1"], "--grad-clip"),
    ("train_diffusion.py", ["--label-dropout", "1"], "--label-dropout"),
    ("train_diffusion.py", ["--prediction", "x0"], "--prediction"),
    ("inference.py", ["--guidance", "-1"], "--guidance"),
    ("inference.py", ["--guidance", "0"], "--guidance 0"),
    ("inference.py", ["--guidance", "1e39"], "--guidance"),
    ("inference.py", ["--sampler", "euler"], "--sampler"),
    ("infer.py", ["--steps", "0"], "--steps"),
    ("infer.py", ["--eta", "11"], "--eta"),
    ("evaluate.py", ["--seeds", "0"], "--seeds"),
    ("infer.py", ["--n", "0"], "--n"),
    ("infer.py", ["--n", "100000"], "--n"),
    ("evaluate.py", ["--n", "100"], "--n 100"),
    ("inference.py", ["--digit", "10"], "--digit"),
    ("inference.py", ["--digit", "nine"], "--digit"),
    ("inference.py", ["--digit"], "--digit"),
    ("inference.py", ["--samples", "0"], "--samples"),
]


@pytest.mark.parametrize(("script", "args", "named"), BAD_ARGUMENTS)
def test_a_bad_argument_exits_with_2_and_is_named(run, script, args, named):
    code, _, err = run(script, *args)
    assert code == 2
    assert named in error_line(err)


@pytest.mark.parametrize(
    ("flag", "model", "args", "code", "reason"),
    [
        ("--gan-model", "missing", [], 1, "does not exist"),
        ("--gan-model", "truncated", [], 1, "damaged"),
        ("--gan-model", "classifier", [], 1, "cannot be sampled"),
        ("--gan-model", "discriminator", [], 1, "cannot be sampled"),
        ("--diff-model", "truncated", [], 1, "damaged"),
        ("--diff-model", "gan", ["--steps", 5], 2, "has no --steps"),
        ("--diff-model", "diffusion", ["--steps", 51], 2, "steps must be"),
        ("--diff-model", "diffusion", ["--sampler", "ddpm", "--eta", 1], 2, "eta of ddpm must"),
        ("--diff-model", "diffusion", ["--device", "cuda:99"], 2, "cuda:99"),
        ("--diff-model", "diffusion", ["--device", "toaster"], 2, "toaster"),
    ],
)
def test_a_failed_drawing_is_one_line_and_keeps_the_old_picture(flag, model, args, code, reason, model_files, run, tmp_path):
    picture = tmp_path / "picture.png"
    picture.write_text("before")
    found, _, err = run("infer.py", "--out", picture, flag, model_files[model], *args)
    assert found == code
    assert reason in error_line(err)
    assert picture.read_text() == "before"


def test_a_training_without_mnist_and_mirrors_fails_with_1(run, tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", [(tmp_path / "nothing").as_uri() + "/"])
    code, _, err = run("train_gan.py", "--data-dir", tmp_path / "nowhere", "--out-dir", tmp_path / "out")
    assert code == 1
    assert "train-images-idx3-ubyte.gz" in err.strip().splitlines()[-1]
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize(
    ("script", "args", "reason"),
    [
        ("train_gan.py", ["--batch-size", 5000], "--batch-size 5000"),
        ("train_gan.py", ["--limit", 5000], "--limit 5000"),
        ("train_gan.py", ["--device", "meta"], "meta"),
        ("train_gan.py", ["--limit", 1, "--batch-size", 1], "--limit"),
        ("train_gan.py", ["--loss", "relativistic", "--compile", "on"], "--compile on"),
        ("train_gan.py", ["--width", 513], "width must be"),
        ("train_gan.py", ["--latent-dim", 5000], "latent_dim must be"),
        ("train_diffusion.py", ["--width", 12], "multiple of 8"),
        ("train_diffusion.py", ["--width", 520], "width must be"),
        ("train_diffusion.py", ["--timesteps", 200_000], "timesteps must be"),
        ("train_diffusion.py", ["--timesteps", 1], "timesteps must be"),
    ],
)
def test_a_training_that_cannot_start_exits_with_2_and_writes_no_checkpoint(script, args, reason, run, tmp_path):
    code, _, err = run(script, "--dataset", "digits", *args, "--out-dir", tmp_path)
    assert code == 2
    assert reason in error_line(err)
    assert not list(tmp_path.rglob("*.pt"))


COUNTS_HUGE_PAGES = """
import runpy, sys
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
flags = [line.split() for line in open("/proc/self/smaps") if line.startswith("VmFlags")]
print("hg", sum("hg" in line for line in flags))  # proc(5)
"""
# A batch whose activations are as large as a huge page
HUGE_PAGE_RUN = ["--dry-run", "--dataset", "digits", "--width", 8, "--limit", 128, "--batch-size", 32, "--device", "cpu"]


def has_huge_pages(folder, script: str, setting: str) -> bool:
    """Whether a training has asked Linux for huge pages, with this THP_MEM_ALLOC_ENABLE."""
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    environment |= {"THP_MEM_ALLOC_ENABLE": setting} if setting else {}
    command = [sys.executable, "-c", COUNTS_HUGE_PAGES, script, *map(str, HUGE_PAGE_RUN), "--out-dir", str(folder)]
    printed = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    return int(printed.rpartition("hg ")[2]) > 0


needs_huge_pages = pytest.mark.skipif(
    not os.path.exists("/sys/kernel/mm/transparent_hugepage"), reason="this system has no huge pages"
)


@needs_huge_pages
def test_the_diffusion_model_trains_on_huge_pages(tmp_path):
    assert has_huge_pages(tmp_path, "train_diffusion.py", "")


@needs_huge_pages
@pytest.mark.long
@pytest.mark.parametrize(("script", "setting"), [("train_diffusion.py", "0"), ("train_gan.py", "")])
def test_a_training_has_no_huge_pages_if_they_are_refused_or_useless(script, setting, tmp_path):
    assert not has_huge_pages(tmp_path, script, setting)


@pytest.mark.parametrize(
    ("script", "before", "after"),
    [("train_diffusion.py", None, "1"), ("train_diffusion.py", "0", "0"), ("train_gan.py", None, None)],
)
def test_only_the_diffusion_trainer_asks_for_huge_pages_and_keeps_the_users_choice(
    script, before, after, run, tmp_path, monkeypatch
):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "restored afterwards")
    os.environ.pop("THP_MEM_ALLOC_ENABLE") if before is None else monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", before)
    code, _, err = run(script, "--dataset", "digits", "--width", 513, "--out-dir", tmp_path)  # refused after the call
    assert code == 2, err
    assert os.environ.get("THP_MEM_ALLOC_ENABLE") == after
