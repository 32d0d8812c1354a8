"""infer.py as a user calls it: its pictures, and its messages when something is missing."""

from __future__ import annotations

import numpy as np
from conftest import SHIPPED, error_line, run_process, tiny_ddpm
from test_models import small

from checkpoint import load_generator, save_model
from data import to_uint8
from figures import images
from utils import sampling_rng


def test_infer_draws_real_gan_and_diffusion_digits_side_by_side(run, tmp_path):
    import imageio.v3 as imageio

    first, again, other = (tmp_path / name for name in ("a.png", "b.png", "c.png"))
    assert run("infer.py", "--n", 16, "--out", first)[0] == 0
    assert run("infer.py", "--n", 16, "--out", again)[0] == 0
    assert run("infer.py", "--n", 16, "--out", other, "--seed", 1)[0] == 0
    assert first.read_bytes() == again.read_bytes()
    assert first.read_bytes() != other.read_bytes()
    picture = np.asarray(imageio.imread(first))
    assert picture.shape[1] > 2.5 * picture.shape[0]
    assert picture.std() > 20


def test_the_denoising_gif_shows_the_stages_of_the_sampling(run, tmp_path):
    from PIL import Image, ImageSequence

    gif, tiny = tmp_path / "a.gif", tiny_ddpm(tmp_path)
    args = ["--diff-model", tiny, "--n", 9, "--out", tmp_path / "a.png", "--denoising-gif", gif]
    code, out, err = run("infer.py", *args, "--sampler", "ddim", "--steps", 4)
    assert code == 0, err
    assert str(gif) in out
    with Image.open(gif) as pictures:
        assert pictures.n_frames == 5
        assert pictures.size == (150, 3 * 30 + 2 + 18)  # wide enough for the caption
        frames = [np.asarray(frame.convert("L"))[18:, :92].astype(int) for frame in ImageSequence.Iterator(pictures)]
    stages = []
    options = {"sampler": "ddim", "steps": 4, "watch": lambda x, level: stages.append(x)}
    stages.append(load_generator(tiny).sample(9, rng=sampling_rng(0), **options))
    for frame, stage in zip(frames, stages, strict=True):
        assert np.abs(frame - images.image_grid(to_uint8(stage))).max() <= 1
    assert np.abs(frames[-1] - frames[0]).max() > 50


def test_the_denoising_gif_has_at_most_30_stages(run, tmp_path):
    from PIL import Image

    gif = tmp_path / "a.gif"
    args = ["--diff-model", tiny_ddpm(tmp_path), "--n", 9, "--out", tmp_path / "a.png", "--denoising-gif", gif]
    assert run("infer.py", *args, "--sampler", "ddpm")[0] == 0
    with Image.open(gif) as pictures:
        assert pictures.n_frames == 31  # and the final digits


def test_a_denoising_gif_of_a_gan_is_refused(run, tmp_path):
    args = ["--diff-model", SHIPPED, "--out", tmp_path / "a.png", "--denoising-gif", tmp_path / "a.gif"]
    code, _, err = run("infer.py", *args)
    assert code == 2
    assert "does not denoise" in error_line(err)


def test_a_gan_may_take_the_place_of_the_diffusion_model(run, tmp_path):
    import imageio.v3 as imageio

    out = tmp_path / "a.png"
    assert run("infer.py", "--gan-model", SHIPPED, "--diff-model", SHIPPED, "--n", 4, "--out", out)[0] == 0
    picture = imageio.imread(out)
    assert picture.shape[1] > 2.5 * picture.shape[0]


def test_dollar_signs_in_names_are_not_read_as_formulas(run, tmp_path):
    save_model(tmp_path / "a$\\x$.pt", "dcgan", small("dcgan"), {"epoch": "$\\y$"})
    args = ["--gan-model", tmp_path / "a$\\x$.pt", "--diff-model", SHIPPED, "--n", 4, "--out", tmp_path / "a.png"]
    code, _, err = run("infer.py", *args)
    assert code == 0, err


def test_without_mnist_the_embedded_digits_are_shown_with_a_note(run, tmp_path):
    args = ["--diff-model", tiny_ddpm(tmp_path), "--n", 400, "--steps", 2, "--out", tmp_path / "a.png"]
    code, out, _ = run("infer.py", "--data-dir", tmp_path, *args)
    assert code == 0
    assert "scikit-learn" in out
    assert "only 360 of these real digits" in out


def test_a_failure_in_a_fresh_process_prints_one_line(tmp_path):
    result = run_process("infer.py", "--gan-model", "none.pt", cwd=tmp_path)
    assert result.returncode == 1
    assert "none.pt" in error_line(result.stderr)
