"""inference.py as a user calls it, and the quality of the digits that it draws."""

from __future__ import annotations

import csv
import math
import re

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from conftest import ROOT, error_line
from forked import run_forked

from checkpoint import save_model
from diffusion.options import SCRIPT_GUIDANCE
from models import build
from scoring import metrics
from scoring.extractor import Extractor

SHIPPED = ROOT / "checkpoints" / "best_CGAN_G.pt"
DIFFUSION = ROOT / "checkpoints" / "best_DIFF.pt"


def pictures(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_digit_gets_a_picture_for_each_sample_and_a_strip(run, tmp_path):
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


@pytest.fixture
def drawn(run, tmp_path):
    """A function that draws with the shipped GAN. It returns the pictures by name."""

    def draw(folder: str, *args: object, model=SHIPPED) -> dict[str, bytes]:
        code, _, err = run("inference.py", "--model", model, "--outdir", tmp_path / folder, *args)
        assert code == 0, err
        return pictures(tmp_path / folder)

    return draw


def test_all_digits_with_seed_0_are_the_default(drawn):
    default = drawn("default", "--samples", 2)
    assert len(default) == 30
    assert default == drawn("typed", "--samples", 2, "--digit", "all", "--seed", 0)


def test_a_digit_looks_the_same_whatever_others_are_drawn(drawn):
    some = drawn("some", "--samples", 2, "--digit", 7, 0, 7)
    assert len(some) == 6
    assert some.items() <= drawn("all", "--samples", 2).items()


@pytest.mark.parametrize("model", [SHIPPED, DIFFUSION])
def test_a_sample_is_the_same_whatever_the_number_of_samples(model, drawn, tmp_path):
    for samples in (3, 10):
        drawn(str(samples), "--digit", 4, "--samples", samples, model=model)
    for number in (1, 2, 3):
        few, many = (imageio.imread(tmp_path / folder / f"digit_4_00{number}.png").astype(int) for folder in ("3", "10"))
        assert np.abs(few - many).max() <= 1, number


def test_every_script_samples_with_the_same_key():
    """So the same model, seed, labels and options mean the same pictures in each. The monitor of a training has its own."""
    files = ["infer.py", "inference.py", "evaluate.py", "report.py", "callbacks.py"]
    for file in files:
        text = (ROOT / file).read_text(encoding="utf-8")
        calls = [
            line
            for line in text.splitlines()
            if re.search(r"(generator|gan|diffusion|model|distributed|job)[.](sample|draw)[(]", line)
        ]
        assert calls, file
        assert all("sampling_rng(" in call for call in calls), (file, calls)


def test_another_seed_gives_other_pictures(drawn):
    first, other = drawn("first", "--samples", 2), drawn("other", "--samples", 2, "--seed", 1)
    assert all(first[name] != other[name] for name in first)


def test_a_long_strip_has_rows_of_20(drawn, tmp_path):
    drawn("ones", "--digit", 1, "--samples", 41)
    assert imageio.imread(tmp_path / "ones" / "digit_1.png").shape == (3 * 30 + 2, 20 * 30 + 2)


def test_guidance_and_sampler_change_the_digits_of_a_diffusion_model(drawn, tmp_path):
    default, same, plain, ddim = (
        drawn(folder, "--digit", 9, *args, model=DIFFUSION)
        for folder, args in (
            ("default", []),
            ("same", ["--guidance", SCRIPT_GUIDANCE]),
            ("plain", ["--guidance", 1.0]),
            ("ddim", ["--sampler", "ddim", "--steps", 15]),
        )
    )
    assert len(default) == 11
    assert default == same
    assert all(default[name] != plain[name] for name in default)
    assert all(default[name] != ddim[name] for name in default)
    images = torch.stack([torch.from_numpy(imageio.imread(path)) for path in sorted(tmp_path.glob("*/digit_9_*.png"))])
    _, probabilities = Extractor()(images[:, None])
    assert len(images) == 40
    assert metrics.label_accuracy(probabilities, torch.full((40,), 9)) >= 0.9


@pytest.fixture
def five_classes(tmp_path):
    """The file of an untrained model of five classes."""
    save_model(tmp_path / "five.pt", "cdcgan", build("cdcgan", width=4, num_classes=5), {})
    return tmp_path / "five.pt"


@pytest.mark.parametrize(
    ("args", "code", "reason"),
    [
        (["--model", ROOT / "checkpoints" / "best_GAN_G.pt", "--digit", 9], 2, "unconditional"),
        (["--model", ROOT / "checkpoints" / "best_CGAN_D.pt"], 1, "cannot be sampled"),
        (["--model", "none.pt"], 1, "does not exist"),
        (["--model", SHIPPED, "--guidance", 2], 2, "cdcgan, which has no --guidance"),
        (["--model", DIFFUSION, "--steps", 1001], 2, "steps must be"),
        (["--device", "toaster"], 2, "toaster"),
        (["--digit", 4, 5], 2, "no digit 5"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(args, code, reason, five_classes, run, tmp_path):
    found, out, err = run("inference.py", "--model", five_classes, *args, "--outdir", tmp_path / "out")
    assert found == code
    assert reason in error_line(err)
    assert not out
    assert not (tmp_path / "out").exists()


def test_all_means_the_classes_of_the_model(five_classes, drawn):
    strips = {name for name in drawn("out", "--samples", 1, model=five_classes) if len(name) == len("digit_0.png")}
    assert strips == {f"digit_{digit}.png" for digit in range(5)}


def test_a_thousand_nines_have_the_label_accuracy_of_the_reports(drawn, tmp_path):
    """Within three standard deviations."""
    with (ROOT / "reports" / "metrics_by_digit.csv").open() as file:
        (claimed,) = (
            float(row["label_accuracy"]) for row in csv.DictReader(file) if (row["model"], row["digit"]) == ("cdcgan", "9")
        )
    drawn("nines", "--digit", 9, "--samples", 1000)
    paths = sorted(tmp_path.glob("nines/digit_9_*.png"))
    images = torch.stack([torch.from_numpy(imageio.imread(path)) for path in paths])[:, None]
    assert len({image.numpy().tobytes() for image in images}) == 1000, "no two are equal"
    _, probabilities = Extractor()(images)
    chance = math.sqrt(claimed * (1 - claimed) / 1000)
    assert metrics.label_accuracy(probabilities, torch.full((1000,), 9)) >= claimed - 3 * chance


def test_the_default_command_draws_the_shipped_digit_samples(tmp_path):
    result = run_forked("inference.py", "--outdir", tmp_path, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    for digit in range(10):
        folders = (tmp_path, ROOT / "digit_samples")
        ours, shipped = (imageio.imread(folder / f"digit_{digit}.png").astype(int) for folder in folders)
        assert np.abs(ours - shipped).max() <= 2, digit  # machines round differently
