"""inference.py as a user calls it, and what it promises of the shipped conditional DCGAN."""

from __future__ import annotations

import csv
import math

import imageio.v3 as imageio
import numpy as np
import torch
from conftest import ROOT, error_line, run_process

from scoring import metrics
from checkpoint import save_model
from evaluation import Extractor
from cli import DIGIT_GUIDANCE
from models import build

SHIPPED = ROOT / "checkpoints" / "best_CGAN_G.pt"
DIFFUSION = ROOT / "checkpoints" / "best_DIFF.pt"


def pictures(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def save(path, name: str, **config):
    save_model(path, name, build(name, width=4, **config), {})
    return path


def test_a_digit_has_its_samples_and_its_strip(run, tmp_path):
    code, out, err = run("inference.py", "--model", SHIPPED, "--digit", 9, "--outdir", tmp_path, "--samples", 3)
    assert code == 0, err
    names = ["digit_9_001.png", "digit_9_002.png", "digit_9_003.png", "digit_9.png"]
    assert out.split() == [str(tmp_path / name) for name in names]
    assert pictures(tmp_path).keys() == set(names)
    samples = [imageio.imread(tmp_path / name) for name in names[:3]]
    assert all(sample.shape == (28, 28) and sample.dtype == np.uint8 for sample in samples)
    strip = imageio.imread(tmp_path / "digit_9.png")
    assert strip.shape == (32, 92)
    for column, sample in enumerate(samples):
        assert np.array_equal(strip[2:30, 2 + 30 * column :][:, :28], sample)


def test_the_seed_decides_whatever_else_is_drawn(run, tmp_path):
    """Defaults are all digits and seed 0; three of them asked for, in any order, are the same."""
    for folder, args in (("all", []), ("again", ["--digit", "all"]), ("some", ["--digit", 7, 0, 7, "--seed", 0]),
                         ("other", ["--seed", 1])):  # fmt: skip
        assert run("inference.py", "--model", SHIPPED, "--outdir", tmp_path / folder, "--samples", 2, *args)[0] == 0
    every, again, some, other = (pictures(tmp_path / name) for name in ("all", "again", "some", "other"))
    assert len(every) == 30 and every == again
    assert len(some) == 6 and some.items() <= every.items()
    assert all(every[name] != other[name] for name in every)


def test_a_long_strip_wraps(run, tmp_path):
    assert run("inference.py", "--model", SHIPPED, "--digit", 1, "--samples", 41, "--outdir", tmp_path)[0] == 0
    assert imageio.imread(tmp_path / "digit_1.png").shape == (3 * 30 + 2, 20 * 30 + 2)


def test_a_diffusion_model_draws_digits_through_the_same_interface(run, tmp_path):
    """With the default guidance, or another; that and the sampler change the picture."""
    for folder, args in (("default", []), ("same", ["--guidance", DIGIT_GUIDANCE]), ("plain", ["--guidance", 1.0]),
                         ("ddim", ["--sampler", "ddim", "--steps", 15])):  # fmt: skip
        code, _, err = run("inference.py", "--model", DIFFUSION, "--digit", 9, *args, "--outdir", tmp_path / folder)
        assert code == 0, err
    default, same, plain, ddim = (pictures(tmp_path / name) for name in ("default", "same", "plain", "ddim"))
    assert len(default) == 11 and default == same
    assert all(default[name] != plain[name] and default[name] != ddim[name] for name in default)
    images = torch.stack([torch.from_numpy(imageio.imread(path)) for path in sorted(tmp_path.glob("*/digit_9_*.png"))])
    _, probabilities = Extractor()(images[:, None])
    assert len(images) == 40 and metrics.label_accuracy(probabilities, torch.full((40,), 9)) >= 0.9


def test_what_cannot_be_drawn_is_said_in_a_line(run, tmp_path):
    few = save(tmp_path / "few.pt", "cdcgan", num_classes=5)
    for args, reason in (
        (["--model", ROOT / "checkpoints" / "best_GAN_G.pt", "--digit", 9], "unconditional"),
        (["--model", few, "--digit", 4, 5], "no digit 5"),
        (["--model", ROOT / "checkpoints" / "best_CGAN_D.pt"], "cannot be sampled"),
        (["--model", tmp_path / "none.pt"], "does not exist"),
        (["--model", SHIPPED, "--guidance", 2], "cdcgan, which has no --guidance"),
        (["--model", DIFFUSION, "--steps", 1001], "steps must be"),
        (["--device", "toaster"], "toaster"),
    ):
        code, out, err = run("inference.py", *args, "--outdir", tmp_path / "out")
        assert (
            code == (1 if reason in ("cannot be sampled", "does not exist") else 2) and reason in error_line(err) and not out
        )
    assert not (tmp_path / "out").exists()


def test_all_means_the_classes_of_the_model(run, tmp_path):
    few = save(tmp_path / "few.pt", "cdcgan", num_classes=5)
    assert run("inference.py", "--model", few, "--samples", 1, "--outdir", tmp_path / "out")[0] == 0
    strips = {name for name in pictures(tmp_path / "out") if len(name) == len("digit_0.png")}
    assert strips == {f"digit_{digit}.png" for digit in range(5)}


def test_a_thousand_nines_read_as_nines(run, tmp_path):
    """The label accuracy that the reports claim for the nine holds, within chance, for the pictures that a user gets."""
    with (ROOT / "reports" / "metrics_by_digit.csv").open() as file:
        (claimed,) = (
            float(row["label_accuracy"]) for row in csv.DictReader(file) if (row["model"], row["digit"]) == ("cdcgan", "9")
        )
    assert run("inference.py", "--digit", 9, "--samples", 1000, "--model", SHIPPED, "--outdir", tmp_path)[0] == 0
    paths = sorted(tmp_path.glob("digit_9_*.png"))
    images = torch.stack([torch.from_numpy(imageio.imread(path)) for path in paths])[:, None]
    assert len(images) == 1000 and len({image.numpy().tobytes() for image in images}) == 1000
    _, probabilities = Extractor()(images)
    chance = math.sqrt(claimed * (1 - claimed) / 1000)
    assert metrics.label_accuracy(probabilities, torch.full((1000,), 9)) >= claimed - 3 * chance


def test_a_fresh_process_draws_the_shipped_digits(tmp_path):
    """What is shipped under digit_samples/ is what the default command draws."""
    result = run_process("inference.py", "--outdir", tmp_path, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    for digit in range(10):
        folders = (tmp_path, ROOT / "digit_samples")
        ours, shipped = (imageio.imread(folder / f"digit_{digit}.png").astype(int) for folder in folders)
        assert np.abs(ours - shipped).max() <= 2, digit  # another machine may round another way
