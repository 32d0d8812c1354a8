"""Scripts under odd circumstances: closed streams, other locales and settings, threads, other folders."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import ROOT, SHIPPED, error_line, run_process, tiny_ddpm

import cli
from checkpoint import load_generator, save_model
from files import ExpectedError


def shell(line: str, cwd=ROOT, **env: str) -> subprocess.CompletedProcess:
    """Run a line of bash, in which `python` is this one."""
    line = f'set -o pipefail; python() {{ "{sys.executable}" "$@"; }}; {line}'
    return subprocess.run(
        ["bash", "-c", line], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )


# --------------------------------------------------------------------------------------------------------------------
# Streams


@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&-", "> /dev/full", "| head -n 1"])
def test_every_picture_is_written_whatever_happens_to_the_streams(streams, tmp_path):
    result = shell(
        f"python {ROOT}/inference.py --digit 3 5 --samples 3 --outdir {tmp_path}/digits {streams}", PYTHONUNBUFFERED="1"
    )
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "digits").glob("*.png"))) == 8
    assert "error" not in result.stderr.lower()


@pytest.mark.parametrize("streams", [">&-", ">&- 2>&-"])
def test_tables_are_written_without_a_terminal(streams, tmp_path, mnist_dir):
    command = f"python evaluate.py --models {SHIPPED} --n 200 --seeds 1 --out-dir {tmp_path}"
    result = shell(f"{command} {streams}", MNIST_DIR=mnist_dir)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.csv", "metrics_by_digit.csv", "metrics.json"}


class Narrow(io.StringIO):
    """A stream for ASCII alone, without a descriptor and without `reconfigure`."""

    def write(self, text):
        return super().write(text.encode("ascii").decode())


def test_a_narrow_stream_gets_every_line():
    narrow = Narrow()
    stream = cli._Unbreakable(narrow)
    for text in ("before\n", "é\n", "after\n"):
        stream.write(text)
    assert narrow.getvalue() == "before\n\\xe9\nafter\n"


def test_a_closed_stream_costs_no_descriptors():
    stream = cli._Unbreakable(io.StringIO())
    stream._stream.close()
    stream.write("lost")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        stream.write("lost")
    assert len(os.listdir("/proc/self/fd")) == before


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path):
    """Else a message of a C library would be written into it."""
    code = (
        f"import cli; cli.run_script(lambda: open({str(tmp_path / 'number')!r}, 'w').write(str(open('files.py').fileno())))"
    )
    result = shell(f'python -c "{code}" <&- >&- 2>&-', PYTHONPATH=str(ROOT))
    assert result.returncode == 0
    assert int((tmp_path / "number").read_text(encoding="utf-8")) > 2


# --------------------------------------------------------------------------------------------------------------------
# Locale, matplotlib's settings, left-over variables


def test_a_checkpoint_with_an_accent_is_scored_in_the_c_locale(tmp_path, mnist_dir):
    folder = tmp_path / "é"
    folder.mkdir()
    shutil.copy(SHIPPED, folder)
    locale = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    args = ["--models", folder / SHIPPED.name, "--n", 200, "--seeds", 1, "--out-dir", tmp_path / "out"]
    result = run_process("evaluate.py", *args, MNIST_DIR=mnist_dir, **locale)
    assert result.returncode == 0, result.stderr
    assert "é".encode() in (tmp_path / "out" / "metrics.csv").read_bytes()


def test_pictures_do_not_depend_on_matplotlibs_settings(tmp_path):
    settings = tmp_path / "matplotlibrc"
    settings.write_text("image.origin: lower\nfigure.facecolor: red\n", encoding="utf-8")
    pictures, tiny = [], tiny_ddpm(tmp_path)
    for name, env in (("plain", {}), ("odd", {"MATPLOTLIBRC": str(settings), "MPLBACKEND": "no_such_backend"})):
        out = tmp_path / f"{name}.png"
        result = run_process("infer.py", "--diff-model", tiny, "--n", 4, "--steps", 2, "--out", out, **env)
        assert result.returncode == 0, result.stderr
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1]


def test_a_left_over_rank_means_nothing(tmp_path):
    result = run_process("inference.py", "--digit", 3, "--samples", 1, "--outdir", tmp_path, RANK="1")
    assert result.returncode == 0, result.stderr
    assert "digit_3.png" in result.stdout


def test_contradictory_variables_of_torchrun_are_refused_in_a_line(tmp_path):
    result = run_process("inference.py", "--outdir", tmp_path / "a", RANK="3", WORLD_SIZE="2")
    assert result.returncode == 2
    assert "RANK=3, WORLD_SIZE=2" in error_line(result.stderr)


# --------------------------------------------------------------------------------------------------------------------
# Threads, hangups, folders


def test_a_training_runs_in_a_thread(tmp_path):
    """As the server of a notebook may start it: no signal can be handled there."""
    import train_gan

    args = ["--dry-run", "--dataset", "digits", "--width", "8", "--device", "cpu", "--out-dir", str(tmp_path)]
    errors = []

    def train() -> None:
        try:
            train_gan.main(args)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert not errors
    assert (tmp_path / "checkpoints" / "best_GAN_G.pt").exists()


def test_a_closed_terminal_saves_the_training(tmp_path):
    command = [
        sys.executable,
        "train_gan.py",
        "--dataset",
        "digits",
        "--width",
        "8",
        "--epochs",
        "100000",
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(
        [*command, "--no-early-stop", "--out-dir", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # under nohup it would be ignored
    )
    try:
        process.stdout.readline()  # the first epoch
        process.send_signal(signal.SIGHUP)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 129
    assert b"stopped by signal 1. To continue:" in err


def test_the_scripts_work_from_another_folder(tmp_path):
    result = shell(f"python {ROOT}/inference.py --digit 3 --samples 1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"using {ROOT}/checkpoints/best_CGAN_G.pt" in result.stdout
    assert (tmp_path / "digit_samples" / "digit_3.png").exists()


@pytest.mark.parametrize("flag", ["--out-dir", "--outdir"])
def test_every_script_takes_both_spellings_of_its_folder(flag, tmp_path):
    result = run_process("inference.py", "--digit", 3, "--samples", 1, flag, tmp_path / "digits")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "digits" / "digit_3.png").exists()


def test_a_tilde_in_a_flag_is_the_home_folder(tmp_path):
    result = run_process("inference.py", "--digit", 3, "--samples", 1, "--outdir=~/digits", HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "digits" / "digit_3.png").exists()


# --------------------------------------------------------------------------------------------------------------------
# Outputs, before the work


@pytest.mark.parametrize(
    ("args", "code", "reason"),
    [
        (["--out", "a.bmp"], 2, "must end in .png"),
        (["--out", "."], 2, "must end in .png"),
        (["--out", "a.png", "--denoising-gif", "a.png"], 2, "must end in .gif"),
        (["--out", "/proc/a.png"], 1, "cannot write in /proc"),
    ],
)
def test_a_bad_output_is_refused_before_any_sampling(args, code, reason, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("models.Generator.sample", lambda *_, **__: pytest.fail("it has sampled"))
    found, _, err = run("infer.py", *args)
    assert found == code
    assert reason in error_line(err)


@pytest.mark.parametrize(("suffix", "begins"), [("png", b"\x89PNG"), ("jpg", b"\xff\xd8\xff"), ("pdf", b"%PDF")])
def test_the_suffix_decides_the_format(suffix, begins, run, tmp_path):
    out = tmp_path / f"a.{suffix}"
    code, _, err = run("infer.py", "--diff-model", tiny_ddpm(tmp_path), "--n", 4, "--steps", 2, "--out", out)
    assert code == 0, err
    assert out.read_bytes().startswith(begins)


# --------------------------------------------------------------------------------------------------------------------
# What cannot be read


def test_a_training_state_is_called_one(run, tmp_path):
    args = ["--dry-run", "--dataset", "digits", "--width", 8, "--out-dir", tmp_path]
    assert run("train_gan.py", *args)[0] == 0
    assert run("train_gan.py", *args)[0] == 0  # now there are previous models too
    with pytest.raises(ExpectedError, match="is the state of a training") as caught:
        load_generator(tmp_path / "checkpoints" / "last_GAN.pt")
    assert "best_GAN_G.pt" in str(caught.value)


def test_a_weight_above_float16_is_kept_in_float32(tmp_path):
    from test_models import small

    network = small("dcgan")
    with torch.no_grad():
        network.conv28.bias[0] = 1e6
    save_model(tmp_path / "a.pt", "dcgan", network, {})
    assert load_generator(tmp_path / "a.pt").conv28.bias[0] == 1e6


# --------------------------------------------------------------------------------------------------------------------
# Dtypes and labels of the library


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["dcgan", "cdcgan", "ddpm"])
def test_a_network_of_any_dtype_samples_float32(name, dtype):
    from test_models import small

    samples = small(name).to(dtype).sample(2)
    assert samples.dtype == torch.float32
    assert samples.isfinite().all()


@pytest.mark.parametrize("name", ["dcgan", "ddpm"])
def test_samples_do_not_depend_on_torchs_default_dtype(name):
    from test_models import small

    network = small(name)
    plain = network.sample(2, rng=torch.Generator().manual_seed(0))
    torch.set_default_dtype(torch.float64)
    try:
        other = network.sample(2, rng=torch.Generator().manual_seed(0))
    finally:
        torch.set_default_dtype(torch.float32)
    assert other.dtype == torch.float32
    assert torch.allclose(plain, other, atol=1e-4)


@pytest.mark.parametrize(
    "labels", [3, [3, 3], (3, 3), np.array([3, 3]), np.int64(3), torch.tensor([3, 3], dtype=torch.uint8), np.uint16([3, 3])]
)
@pytest.mark.parametrize("name", ["cdcgan", "ddpm"])
def test_labels_are_integers_in_any_form(name, labels):
    from test_models import small

    network = small(name)
    ours, theirs = (network.sample(2, given, torch.Generator().manual_seed(0)) for given in (labels, torch.tensor([3, 3])))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("labels", [[3.0, 3.0], "33", [True, False], [3], [[3, 3]], [3, None]])
def test_labels_of_another_type_or_shape_are_refused(labels):
    from test_models import small

    with pytest.raises(ValueError, match="labels must"):
        small("cdcgan").sample(2, labels)
