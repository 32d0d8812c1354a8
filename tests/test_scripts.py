"""Every script as a user calls it: a dry run with all its files, and each bad input with one clear line."""

from __future__ import annotations

import json
import runpy
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import ROOT, error_line, read_csv, run_process, tiny_ddpm
from test_models import small

import data
import evaluation
import plots
import utils
from checkpoint import file_sha256, load_generator, read_tensors, save_model, write_tensors
from data import to_uint8
from denoising import DiffusionStep
from models import DDPM
from utils import keyed_generator, run_script

SHIPPED = ROOT / "checkpoints" / "best_GAN_G.pt"


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


@pytest.fixture
def fewer_digits(monkeypatch):
    """A function that makes every script read so many digits of either split."""
    load = data.load_digits

    def limit(train: int, test: int) -> None:
        monkeypatch.setattr(
            data, "load_digits", lambda *args: load(*args).subset({"train": train, "test": test}[args[1]], "few")
        )

    return limit


def test_train_classifier_dry_run(mnist_dir, run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "FLOOR_SIZES", (500,))  # the other floors take most of the time
    code, out, err = run("train_classifier.py", "--dry-run", "--data-dir", mnist_dir, "--out-dir", tmp_path)
    assert code == 0, err
    assert "test accuracy" in out and "SHA-256" in out
    assert {path.name for path in tmp_path.iterdir()} == {"classifier.pt", "classifier_statistics.pt"}


def test_evaluate_puts_the_floor_beside_the_model(mnist_dir, run, tmp_path, fewer_digits):
    fewer_digits(train=8000, test=2000)
    models = [SHIPPED, ROOT / "checkpoints" / "best_CGAN_G.pt", tiny_ddpm(tmp_path)]
    args = ["--n", 500, "--seeds", 2, "--steps", 2, "--guidance", 1.5, "--data-dir", mnist_dir, "--out-dir", tmp_path]
    code, _, err = run("evaluate.py", "--models", *models, *args)
    assert code == 0, err
    rows = real, test, gan, ddpm, cgan, by_digit = read_csv(tmp_path / "metrics.csv")
    names = [row["model"] for row in rows]
    assert names == ["real training digits", "real test digits", "dcgan", "ddpm", "cdcgan", "ddpm, by digit"]
    assert [row["evaluations"] for row in rows] == ["", "", "1", "2", "1", "3"]  # guidance acts at one of two steps
    assert float(real["fid"]) < float(gan["fid"]) and float(real["is"]) > float(gan["is"])
    assert float(gan["fid_ratio"]) == pytest.approx(float(gan["fid"]) / float(real["fid"]), rel=1e-4)
    assert all(gan[f"{name}_std"] for name in ("fid", "kid", "recall", "coverage", "nearest_share_close"))
    assert all(row["label_accuracy"] for row in (real, test, cgan, by_digit))
    assert not gan["label_accuracy"] and not ddpm["label_accuracy"]
    assert (
        all(0 <= float(row["precision"]) <= 1 for row in (real, gan, ddpm, cgan, by_digit)) and float(gan["precision"]) > 0.5
    )
    assert [row["dtype"] for row in rows] == ["", "", *["fp32"] * 4]
    by_digit = read_csv(tmp_path / "metrics_by_digit.csv")
    assert [(row["model"], row["digit"]) for row in by_digit] == [
        (model, str(digit)) for model in ("real training digits", "cdcgan", "ddpm, by digit") for digit in range(10)
    ]
    for floor, row in zip(by_digit[:10], by_digit[10:20]):
        assert float(row["fid_ratio"]) == pytest.approx(float(row["fid"]) / float(floor["fid"]), rel=1e-4)
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert [row["model"] for row in content["rows"]] == names and len(content["rows_by_digit"]) == 30
    assert content["rows"][2]["fid"] == pytest.approx(float(gan["fid"]), rel=1e-5)
    assert content["rows"][2]["sha256"] == file_sha256(SHIPPED) and content["rows"][2]["images_per_second"] > 100
    assert (by_digit_row := content["rows"][5])["sampler"] == "dpm-solver++" and by_digit_row["guidance"] == 1.5
    assert content["command"].startswith("python evaluate.py --models") and content["versions"]["torch"] == torch.__version__
    for args, reason in (
        ([tmp_path / "none.pt"], "does not exist"),
        ([SHIPPED, "--steps", 20], "dcgan, which has no --steps"),
        ([models[2], "--steps", 51], "steps must be"),
        ([tiny_ddpm(tmp_path, num_classes=0), "--guidance", 2], "unconditional"),
        ([tiny_ddpm(tmp_path, num_classes=5)], "has 5 classes"),
    ):
        code, _, err = run("evaluate.py", "--models", *args, "--out-dir", tmp_path)
        assert code == (2 if len(args) > 1 else 1) and reason in error_line(err)


def test_more_samples_than_test_digits_are_compared_with_the_training_set(mnist_dir, run, tmp_path, fewer_digits):
    fewer_digits(train=900, test=300)
    models = [SHIPPED, ROOT / "checkpoints" / "best_CGAN_G.pt", tiny_ddpm(tmp_path)]
    args = ["--n", 400, "--seeds", 1, "--steps", 2, "--data-dir", mnist_dir, "--out-dir", tmp_path]
    code, out, err = run("evaluate.py", "--models", *models, *args)
    assert code == 0 and f"to do: {400 * (1 + 1 + 2 + 3):,} network evaluations" in out, err
    real, gan, *_ = read_csv(tmp_path / "metrics.csv")
    assert (real["model"], real["reference"], gan["model"]) == ("real training digits", "mnist train", "dcgan")
    assert float(real["is"]) > 9 and float(gan["fid"]) > 0 and "fid_ratio" not in gan
    by_digit = read_csv(tmp_path / "metrics_by_digit.csv")
    assert len(by_digit) == 20 and all("fid_ratio" not in row for row in by_digit)


def test_an_interrupted_evaluation_goes_on_and_gives_the_same_figures(mnist_dir, run, tmp_path, fewer_digits, monkeypatch):
    """What was scored is not scored again, unless its file is damaged or belongs to something else."""
    fewer_digits(train=900, test=300)
    args = ["--models", SHIPPED, tiny_ddpm(tmp_path), "--seeds", 2, "--steps", 2, "--data-dir", mnist_dir]
    unfinished, score, calls, floors = tmp_path / "out" / "scores.unfinished.pt", evaluation.RealDigits.score, [], 8

    def scoring(self, *args, **kwargs):
        calls.append(1)
        if not unfinished.parent.with_name("whole").exists() and len(calls) == floors + 4:
            raise KeyboardInterrupt
        return score(self, *args, **kwargs)

    def evaluated(folder, n=200, commit="0123"):
        calls.clear()
        monkeypatch.setattr(utils, "provenance", lambda: {"git": commit})
        code = run("evaluate.py", *args, "--n", n, "--out-dir", tmp_path / folder)[0]
        return code, len(calls) - floors

    monkeypatch.setattr(evaluation.RealDigits, "score", scoring)
    assert evaluated("out", commit="0123-dirty") == (130, 4) == evaluated("out", commit="0123-dirty")
    assert evaluated("out") == (130, 4) and [path.name for path in unfinished.parent.iterdir()] == [unfinished.name]
    for folder in ("whole", "damaged", "larger", "hostile"):
        (tmp_path / folder).mkdir()
    content = read_tensors(unfinished)
    write_tensors(
        tmp_path / "hostile" / unfinished.name, content | {"scores": dict.fromkeys(content["scores"], ({"fid": "x"}, []))}
    )
    (tmp_path / "damaged" / unfinished.name).write_bytes(unfinished.read_bytes()[:-100])
    shutil.copy(unfinished, tmp_path / "larger")
    assert evaluated("out") == (0, 3) and not unfinished.exists()
    assert evaluated("damaged") == evaluated("whole") == evaluated("larger", n=210) == evaluated("hostile") == (0, 6)
    for table in ("metrics.csv", "metrics_by_digit.csv"):
        whole, resumed, damaged = (
            [{name: value for name, value in row.items() if "images_per_second" not in name} for row in read_csv(file)]
            for file in (tmp_path / folder / table for folder in ("whole", "out", "damaged"))
        )
        assert whole == resumed == damaged


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


def test_infer_draws_real_gan_and_diffusion_digits_side_by_side(run, tmp_path):
    import imageio.v3 as imageio

    first, second, other = (tmp_path / name for name in ("a.png", "b.png", "c.png"))
    assert run("infer.py", "--out", first)[0] == 0
    assert run("infer.py", "--out", second)[0] == 0
    assert run("infer.py", "--out", other, "--seed", 1)[0] == 0
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()
    picture = np.asarray(imageio.imread(first))
    assert picture.shape[1] > 2.5 * picture.shape[0] and picture.std() > 20


def test_infer_draws_the_denoising(run, tmp_path):
    from PIL import Image, ImageSequence

    gif, tiny = tmp_path / "a.gif", tiny_ddpm(tmp_path)
    args = ["--diff-model", tiny, "--n", 9, "--out", tmp_path / "a.png", "--denoising-gif", gif]
    code, out, err = run("infer.py", *args, "--sampler", "ddim", "--steps", 4)
    assert code == 0 and str(gif) in out, err
    with Image.open(gif) as pictures:
        assert pictures.n_frames == 5 and pictures.size == (150, 3 * 30 + 2 + 18)  # wide enough for the caption
        frames = [np.asarray(frame.convert("L"))[18:, :92].astype(int) for frame in ImageSequence.Iterator(pictures)]
    stages, rng = [], keyed_generator("cpu", 0, "infer")
    options = {"sampler": "ddim", "steps": 4, "watch": lambda x, level: stages.append(x)}
    stages.append(load_generator(tiny).sample(9, rng=rng, **options))
    assert torch.equal(stages[0], torch.randn(9, 1, 28, 28, generator=keyed_generator("cpu", 0, "infer")))
    for frame, stage in zip(frames, stages, strict=True):
        assert np.abs(frame - plots.image_grid(to_uint8(stage))).max() <= 1
    assert np.abs(frames[-1] - frames[0]).max() > 50
    code, _, _ = run("infer.py", *args, "--sampler", "ddpm")
    with Image.open(gif) as pictures:
        assert code == 0 and pictures.n_frames == 31  # not all of the steps
    args[1] = SHIPPED
    code, _, err = run("infer.py", *args)
    assert code == 2 and "does not denoise" in error_line(err)


def test_two_models_of_a_kind_have_two_panels(run, tmp_path):
    import imageio.v3 as imageio

    out = tmp_path / "a.png"
    assert run("infer.py", "--gan-model", SHIPPED, "--diff-model", SHIPPED, "--n", 4, "--out", out)[0] == 0
    picture = imageio.imread(out)
    assert picture.shape[1] > 2.5 * picture.shape[0]


def test_names_are_shown_as_they_are(run, tmp_path):
    """A title is no formula, whatever a file and its content are called."""
    save_model(tmp_path / "a$\\x$.pt", "dcgan", small("dcgan"), {"epoch": "$\\y$"})
    args = ["--gan-model", tmp_path / "a$\\x$.pt", "--diff-model", SHIPPED, "--n", 4, "--out", tmp_path / "a.png"]
    code, _, err = run("infer.py", *args)
    assert code == 0, err


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_any_script_with_its_code(signum, code, capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of pytest's may ignore it
    try:
        with pytest.raises(SystemExit) as stop:
            run_script(lambda: signal.raise_signal(signum))
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == code and f"stopped by signal {signum.value}." in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_said_before_the_work(run, tmp_path):
    (tmp_path / "file").write_text("")
    code, out, err = run("evaluate.py", "--models", SHIPPED, "--out-dir", tmp_path / "file" / "reports")
    assert code == 1 and "cannot write in" in error_line(err) and "to do" not in out


def test_infer_without_mnist_says_so(run, tmp_path):
    code, out, _ = run("infer.py", "--data-dir", tmp_path, "--out", tmp_path / "a.png", "--n", 400)
    assert code == 0 and "scikit-learn" in out and "only 360 of these real digits" in out


def test_a_process_of_its_own_prints_one_line(tmp_path):
    result = run_process("infer.py", "--gan-model", "none.pt", cwd=tmp_path)
    assert result.returncode == 1 and "none.pt" in error_line(result.stderr)
