"""Every script as a user calls it: a dry run with all its files, and each bad input with one clear line."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SHIPPED, error_line, read_csv, tiny_ddpm

import evaluation
from checkpoint import file_sha256, load_generator
from recipes.ddpm import DiffusionStep
from models import DDPM
from utils import run_script


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
    assert "FID" in out and "left" in out


def test_a_run_that_goes_wrong_says_so(run, tmp_path):
    """After four steps a GAN draws one thing only."""
    code, out, _ = run("train_gan.py", "--dry-run", "--dataset", "digits", "--width", 8, "--out-dir", tmp_path)
    assert code == 0 and "(mode collapse: only" in out
    assert all("mode collapse" in row["warning"] for row in read_csv(tmp_path / "reports" / "gan_training_log.csv"))


def test_train_cgan_scores_and_draws_by_digit(run, tmp_path):
    from PIL import Image

    args = ["--dry-run", "--dataset", "digits", "--width", 8, "--out-dir", tmp_path]
    code, out, err = run("train_cgan.py", *args)
    assert code == 0, err
    for file in ("checkpoints/best_CGAN_G.pt", "checkpoints/best_CGAN_D.pt", "checkpoints/last_CGAN.pt"):
        assert (tmp_path / file).exists(), file
    rows = read_csv(tmp_path / "reports" / "cgan_training_log.csv")
    assert len(rows) == 2 and 0 <= float(rows[0]["label_accuracy"]) <= 1
    assert {f"fid_ratio_{digit}" for digit in range(10)} <= rows[0].keys()
    width, height = Image.open(tmp_path / "samples" / "cgan_progress.gif").size
    assert (width, height) == (8 * 30 + 2, 10 * 30 + 2 + 18)  # a row for each digit, and the caption
    assert "label accuracy" in out
    assert load_generator(tmp_path / "checkpoints" / "best_CGAN_G.pt").config.num_classes == 10


def spy(function, calls: list):
    """The function, whose keyword arguments are noted."""

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
    assert sampled == [options] * 7  # three frames and two scorings in two ways
    assert [(call["grad_clip"], call["label_dropout"], call["expected"].share) for call in steps] == [(0.5, 0.2, 0.3)]
    rates = [row["muon_lr"] for row in read_csv(tmp_path / "reports" / "diffusion_training_log.csv")]
    assert rates == ["0.0005", "0"]  # along half a cosine
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


def test_fine_tuning_starts_from_the_weights_of_a_checkpoint(run, tmp_path, monkeypatch):
    """And goes on from its own state when it is resumed; what does not fit is refused."""
    tiny, first = tiny_ddpm(tmp_path), []
    monkeypatch.setattr(DiffusionStep, "__call__", noting_weights(DiffusionStep.__call__, first))
    flags = ["--dry-run", "--dataset", "digits", "--width", 8, "--batch-size", 32, "--out-dir", tmp_path]
    assert run("train_diffusion.py", *flags, "--timesteps", 50, "--init", tiny)[0] == 0
    weights = load_generator(tiny).state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in first[0].items())
    meta = load_generator(tmp_path / "checkpoints" / "best_DIFF.pt").meta
    assert meta["flags"]["init"] == file_sha256(tiny)[:16]
    first.clear()
    tiny.unlink()
    assert run("train_diffusion.py", "--resume", "--epochs", 3, "--out-dir", tmp_path)[0] == 0
    assert not all(torch.equal(value, weights[name]) for name, value in first[0].items())
    for init, reason in ((tmp_path / "none.pt", "does not exist"), (SHIPPED, "holds a dcgan"),
                         (tiny_ddpm(tmp_path, timesteps=40), "timesteps=40")):  # fmt: skip
        code, _, err = run("train_diffusion.py", *flags, "--timesteps", 50, "--init", init)
        assert code == (1 if reason == "does not exist" else 2) and reason in error_line(err)


def noting_weights(function, found: list):
    """The step, which notes the weights before it."""

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
    assert flags["loss"] == loss and flags["precision"] == "bf16" and flags["ema"] is False


def test_train_classifier_dry_run(mnist_dir, run, tmp_path, fewer_digits, monkeypatch):
    fewer_digits(train=8000, test=1000)
    monkeypatch.setattr(evaluation, "FLOOR_SIZES", (500,))  # the other floors take most of the time
    code, out, err = run("train_classifier.py", "--dry-run", "--data-dir", mnist_dir, "--out-dir", tmp_path)
    assert code == 0, err
    assert "test accuracy" in out and "SHA-256" in out
    assert {path.name for path in tmp_path.iterdir()} == {"classifier.pt", "classifier_statistics.pt"}


def test_trials_stay_out_of_the_shipped_folders(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["--dataset", "digits", "--limit", 256, "--width", 8, "--epochs", 1, "--eval-samples", 100]
    assert run("train_gan.py", *args)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_the_reference_preset_is_the_table(run, tmp_path):
    args = ["--preset", "reference", "--dry-run", "--dataset", "digits", "--width", 8, "--out-dir", tmp_path]
    assert run("train_gan.py", *args)[0] == 0
    flags = load_generator(tmp_path / "checkpoints" / "best_GAN_G.pt").meta["flags"]
    expected = {"batch_size": 128, "lr": 1e-4, "ema_decay": 0.999, "patience": 10, "loss": "bce", "width": 8}
    assert {name: flags[name] for name in expected} == expected
    for script, epochs, width in (("train_gan.py", 100, 64), ("train_cgan.py", 80, 64), ("train_diffusion.py", 100, 16)):
        args = runpy.run_path(str(ROOT / script))["parse_args"](["--preset", "reference"])
        assert (args.epochs, args.batch_size, args.width, args.lr, args.warmup_steps) == (epochs, 128, width, 1e-4, 0)
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
    ("train_diffusion.py", ["--timesteps", "5", "--steps", "10"], "--steps 10 is more than the --timesteps 5"),
    ("train_diffusion.py", ["--sampler", "ddim", "--eta", "2"], "--eta 2.0 is more than ddim"),
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
def test_bad_arguments_exit_with_2(run, script, args, named):
    code, _, err = run(script, *args)
    assert code == 2 and named in error_line(err)


def test_failures_exit_with_1_or_2_and_overwrite_nothing(run, tmp_path):
    truncated, picture = tmp_path / "truncated.pt", tmp_path / "picture.png"
    truncated.write_bytes(SHIPPED.read_bytes()[:10_000])
    picture.write_text("before")
    for args, reason in (
        (["--gan-model", tmp_path / "none.pt"], "does not exist"),
        (["--gan-model", truncated], "damaged"),
        (["--gan-model", ROOT / "checkpoints" / "classifier.pt"], "cannot be sampled"),
        (["--gan-model", ROOT / "checkpoints" / "best_GAN_D.pt"], "cannot be sampled"),
        (["--diff-model", SHIPPED, "--steps", 5], "has no --steps"),
        (["--diff-model", tiny_ddpm(tmp_path), "--steps", 51], "steps must be"),
        (["--diff-model", tiny_ddpm(tmp_path), "--sampler", "ddpm", "--eta", 1], "eta of ddpm must"),
        (["--diff-model", truncated], "damaged"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "toaster"], "toaster"),
    ):
        code, _, err = run("infer.py", "--out", picture, *args)
        assert code == (2 if args[-2] in ("--steps", "--eta", "--device") else 1) and reason in error_line(err)
        assert picture.read_text() == "before"


def test_training_failures_exit_with_1_or_2(run, tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", [(tmp_path / "nothing").as_uri() + "/"])
    out = tmp_path / "out"
    for args, reason in (
        (["--data-dir", tmp_path / "nowhere"], "train-images-idx3-ubyte.gz"),
        (["--dataset", "digits", "--batch-size", 5000], "--batch-size 5000"),
        (["--dataset", "digits", "--limit", 5000], "--limit 5000"),
        (["--dataset", "digits", "--device", "meta"], "meta"),
        (["--dataset", "digits", "--limit", 1, "--batch-size", 1], "--limit"),
        (["--dataset", "digits", "--loss", "relativistic", "--compile", "on"], "--compile on"),
        (["--dataset", "digits", "--width", 513], "width must be"),
        (["--dataset", "digits", "--latent-dim", 5000], "latent_dim must be"),
    ):
        code, _, err = run("train_gan.py", *args, "--out-dir", out)
        assert code == (1 if args[0] == "--data-dir" else 2) and reason in err.strip().splitlines()[-1]
        assert not list(out.rglob("*.pt"))
    for args, reason in (
        (["--width", 12], "multiple of 8"),
        (["--width", 520], "width must be"),
        (["--timesteps", 200_000], "timesteps must be"),
        (["--timesteps", 1], "timesteps must be"),
    ):
        code, _, err = run("train_diffusion.py", "--dataset", "digits", *args, "--out-dir", out)
        assert code == 2 and reason in error_line(err) and not list(out.rglob("*.pt"))


ASKS_FOR_HUGE_PAGES = """
import runpy, sys
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
flags = [line.split() for line in open("/proc/self/smaps") if line.startswith("VmFlags")]
print("hg", sum("hg" in line for line in flags))  # proc(5)
"""


@pytest.mark.skipif(not os.path.exists("/sys/kernel/mm/transparent_hugepage"), reason="no huge pages here")
@pytest.mark.parametrize(
    ("trainer", "setting", "asked"), [("diffusion", "", True), ("diffusion", "0", False), ("gan", "", False)]
)
def test_the_diffusion_model_asks_for_huge_pages(tmp_path, trainer, setting, asked):
    args = [f"train_{trainer}.py", "--dry-run", "--dataset", "digits", "--width", "8", "--device", "cpu"]
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    environment |= {"THP_MEM_ALLOC_ENABLE": setting} if setting else {}
    command = [sys.executable, "-c", ASKS_FOR_HUGE_PAGES, *args, "--out-dir", str(tmp_path)]
    printed = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    assert (int(printed.rpartition("hg ")[2]) > 0) == asked


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_any_script_with_its_code(signum, code, capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of pytest's may ignore it
    try:
        with pytest.raises(SystemExit) as stop:
            run_script(lambda: signal.raise_signal(signum))
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == code and f"stopped by signal {signum.value}." in capsys.readouterr().err
