"""files.py: text, paths, outputs, processes and signals, on this system and on others that are simulated."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import files
import utils
from files import ExpectedError, UsageError

# --------------------------------------------------------------------------------------------------------------------
# Other systems


@pytest.fixture
def windows(monkeypatch):
    """What this project asks a system for, as Windows answers: os.kill would send a signal, and fcntl is missing."""

    def sends_a_signal(*_):
        pytest.fail("os.kill on Windows ends the process")

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "kill", sends_a_signal)
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("umask means something else there"))
    monkeypatch.setitem(sys.modules, "fcntl", None)

    class NoLibrary:
        def __init__(self, name):
            raise TypeError("LoadLibrary() argument 1 must be str, not None")

    monkeypatch.setattr(ctypes, "CDLL", NoLibrary)


def test_a_cpu_can_be_chosen_on_windows(windows):
    assert utils.choose_device("cpu").type == "cpu"


def test_files_are_written_on_windows_beside_the_leftovers_of_others(windows, tmp_path):
    leftover = tmp_path / ".a.12345.xyz.txt"
    leftover.write_bytes(b"half")
    files.write_text(tmp_path / "a.txt", "whole")
    assert files.read_text(tmp_path / "a.txt") == "whole"
    assert leftover.exists()


def test_a_folder_is_used_without_a_lock_on_windows(windows, tmp_path):
    with files.exclusive(tmp_path / "lock"):
        assert not (tmp_path / "lock").exists()


def test_windows_has_no_hangup_signal(windows):
    assert files.stop_signals() == [signal.SIGINT, signal.SIGTERM]


# --------------------------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize(("handler", "asks"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_a_closed_terminal_asks_to_stop_unless_nohup_ignores_it(handler, asks):
    before = signal.signal(signal.SIGHUP, handler)
    try:
        assert (signal.SIGHUP in files.stop_signals()) == asks
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_thread_handles_no_signals():
    found = []
    thread = threading.Thread(target=lambda: found.append(files.stop_signals()))
    thread.start()
    thread.join()
    assert found == [[]]


# --------------------------------------------------------------------------------------------------------------------
# Text


def test_text_is_utf_8_whatever_the_locale_says(tmp_path):
    code = """if True:
        import files
        files.write_csv("a.csv", [{"checkpoint": "\\u00e9.pt"}])
        assert files.earlier_rows("a.csv", {"checkpoint"}) == [{"checkpoint": "\\u00e9.pt"}]
    """
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    env = {**os.environ, **locale, "PYTHONPATH": str(Path(files.__file__).parent)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)
    assert (tmp_path / "a.csv").read_bytes() == "checkpoint\né.pt\n".encode()


def test_a_file_name_of_any_bytes_survives_in_a_table(tmp_path):
    name = os.fsdecode(b"\xff.pt")
    files.write_csv(tmp_path / "a.csv", [{"checkpoint": name}])
    assert b"\xff.pt" in (tmp_path / "a.csv").read_bytes()
    assert files.earlier_rows(tmp_path / "a.csv", {"checkpoint"}) == [{"checkpoint": name}]


def test_json_keeps_a_file_name_of_any_bytes(tmp_path):
    name = os.fsdecode(b"\xff.pt")
    files.write_json(tmp_path / "a.json", {"checkpoint": name})
    assert json.loads(files.read_text(tmp_path / "a.json")) == {"checkpoint": name}


# --------------------------------------------------------------------------------------------------------------------
# torchrun's variables


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "1"}, (0, 1, 0)),  # left over from another job
        ({"WORLD_SIZE": "4"}, (0, 1, 0)),
        ({"RANK": "", "WORLD_SIZE": ""}, (0, 1, 0)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, (1, 2, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2, 0)),
    ],
)
def test_the_variables_of_torchrun_count_only_together(variables, expected, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert files.processes() == expected


@pytest.mark.parametrize(("rank", "total"), [("1", "1"), ("-1", "2"), ("x", "2"), ("0", "0")])
def test_contradictory_variables_are_refused(rank, total, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", total)
    with pytest.raises(UsageError, match="torchrun"):
        files.processes()
    assert files.is_first()  # somebody has to say so


# --------------------------------------------------------------------------------------------------------------------
# Paths, outputs


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert files.expanded("~/runs") == Path("/home/ada/runs")


def test_a_tilde_before_no_user_is_a_name():
    assert files.expanded("~nosuchuser/a.pt") == Path("~nosuchuser/a.pt")


def test_what_is_written_to_the_home_folder_is_read_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    files.write_text("~/a.txt", "whole")
    assert files.read_text("~/a.txt") == (tmp_path / "a.txt").read_text(encoding="utf-8") == "whole"


def test_a_default_input_is_looked_for_here_and_then_beside_the_scripts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    beside = files.find_default("checkpoints/classifier.pt")
    assert Path(beside) == Path(files.__file__).parent / "checkpoints" / "classifier.pt"
    assert beside in capsys.readouterr().out
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "classifier.pt").touch()
    assert files.find_default("checkpoints/classifier.pt") == "checkpoints/classifier.pt"


@pytest.mark.parametrize("name", ["a.bmp", "a", "a.png.txt"])
def test_an_output_of_another_format_is_refused(name, tmp_path):
    with pytest.raises(UsageError, match=r"--out .* must end in \.png"):
        files.check_outputs(("--out", tmp_path / name, files.PICTURES))


def test_an_output_that_is_a_folder_is_refused(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        files.check_outputs(("--out", tmp_path / "a.png", files.PICTURES))


def test_the_same_output_twice_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--out and --denoising-gif are the same file"):
        files.check_outputs(
            ("--out", tmp_path / "a.gif", (".gif",)), ("--denoising-gif", tmp_path / "b" / ".." / "a.gif", (".gif",))
        )


@pytest.mark.skipif(sys.platform == "win32", reason="it has no such files")
def test_an_output_that_is_a_device_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(UsageError, match="is no ordinary file"):
        files.check_outputs(("--out", tmp_path / "a.png", files.PICTURES))


def test_of_a_link_the_folder_of_its_target_is_checked(tmp_path):
    (tmp_path / "a.png").symlink_to("/proc/a.png")
    with pytest.raises(ExpectedError, match="cannot write in /proc"):
        files.check_outputs(("--out", tmp_path / "a.png", files.PICTURES))


def test_nothing_is_created_when_an_output_is_refused(tmp_path):
    with pytest.raises(UsageError):
        files.check_outputs(("--out", tmp_path / "new" / "a.png", files.PICTURES), ("--gif", "a.bmp", (".gif",)))
    assert not (tmp_path / "new").exists()


def test_an_output_in_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ExpectedError, match="cannot write in"):
        files.check_outputs(("--out", tmp_path / "file" / "a.png", files.PICTURES))


# --------------------------------------------------------------------------------------------------------------------
# Failures to read


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(13, "Permission denied"), "ask for the permission"),
        (OSError(5, "Input/output error"), "look at the disk"),
        (IsADirectoryError(21, "Is a directory"), "give the path of a file"),
        (FileNotFoundError(2, "No such file or directory"), "a.pt does not exist; train it"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("can't allocate memory: you tried to allocate 9 bytes"), "not enough memory"),
        (ValueError("wrong checksum"), r"is damaged \(wrong checksum\)"),
    ],
)
def test_a_failure_to_read_is_called_what_it_is(error, words):
    with pytest.raises(ExpectedError, match=words):
        raise files.cannot_read("a.pt", error, "is damaged ({reason}); train it")


def test_a_copy_inside_another_repository_has_no_commit(tmp_path):
    for name in ("files.py", "utils.py"):
        shutil.copy(Path(files.__file__).parent / name, tmp_path)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "copy").mkdir()
    for name in ("files.py", "utils.py"):
        (tmp_path / name).rename(tmp_path / "copy" / name)
    code = "import utils; print(utils.provenance()['git'])"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "copy", capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "unknown"
