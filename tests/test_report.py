"""The report: drawn from the shipped figures alone, in one file, with the README's table beside it."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from conftest import ROOT, error_line, read_csv, tiny_ddpm
from test_outputs import full_disk

from checkpoint import file_sha256

MARKS = "<!-- results: written by report.py -->", "<!-- end of results -->"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the shipped figures and pictures, where tiny diffusion models stand in for the slow one."""
    folder = tmp_path_factory.mktemp("report")
    for name in ("samples", "reports"):
        shutil.copytree(ROOT / name, folder / name)
    shipped, tiny = ROOT / "checkpoints" / "best_DIFF.pt", tiny_ddpm(folder)
    old, new = file_sha256(shipped), file_sha256(tiny)
    for name in ("metrics.json", "samplers.csv", "pitfalls.csv"):
        text = (folder / "reports" / name).read_text().replace("checkpoints/best_DIFF.pt", str(tiny))
        (folder / "reports" / name).write_text(text.replace(old, new).replace(old[:16], new[:16]))
    for name in ("README.md", "README.pt-BR.md"):
        (folder / name).write_text(f"before\n{MARKS[0]}\nan older table\n{MARKS[1]}\nafter\n")
    return folder


def replace_once(path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new, 1))


def other_gan(folder) -> None:
    """Figures as they would be of another DCGAN than that in its file."""
    digest = file_sha256(ROOT / "checkpoints" / "best_GAN_G.pt")
    for name in ("metrics.json", "pitfalls.csv"):
        path = folder / "reports" / name
        path.write_text(path.read_text().replace(digest[:16], "0" * 16))


@pytest.fixture
def report(folder, mnist_dir, run):
    def call(**paths):
        paths = {"reports": folder / "reports", "samples": folder / "samples", "readme": folder / "README.md", **paths}
        args = [text for name, path in paths.items() for text in (f"--{name}", path)]
        return run("report.py", *args, "--data-dir", mnist_dir, "--device", "cpu")

    return call


def test_the_page_is_one_file_and_whole(report, folder):
    code, _, err = report()
    assert code == 0, err
    page = (folder / "reports" / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) > 12 and all(source.startswith("data:") for source in sources)
    assert not re.search(r"https?://|@import|<script|url\(", page)
    assert all(f'alt="{text}' in page for text in ("Bars of FID", "Samples of DCGAN", "Noise becoming digits"))
    for row in read_csv(folder / "reports" / "pitfalls.csv"):
        assert f"<td>{int(row['n']):,}</td><td>{float(row['fid']):,.2f}</td>" in page
    for row in read_csv(folder / "reports" / "self_check.csv"):
        assert f"<td>{row['damage']}</td><td>{row['level']}</td><td>{float(row['fid']):,.2f}</td>" in page
    for name in (
        "fid_comparison",
        "is_comparison",
        "loss_comparison",
        "quality_against_cost",
        "fid_by_digit",
        "nearest_neighbours",
    ):
        assert (folder / "reports" / f"{name}.png").stat().st_size > 5000, name
    first = {path.name: path.read_bytes() for path in (folder / "reports").iterdir()}
    assert report()[0] == 0  # drawn again, it is the same
    assert first == {path.name: path.read_bytes() for path in (folder / "reports").iterdir()}


def test_the_readme_gets_the_figures(report, folder):
    assert report()[0] == 0
    text = (folder / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "an older table" not in text
    rows = {row["model"]: row for row in json.loads((folder / "reports" / "metrics.json").read_text())["rows"]}
    fid = next(line for line in text.splitlines() if line.startswith("| FID |"))
    models = ("real training digits", "dcgan", "ddpm", "cdcgan", "ddpm, by digit")
    assert fid == "| FID | " + " | ".join(f"{rows[m]['fid']:.3f} ± {rows[m]['fid_std']:.3f}" for m in models) + " |"
    for row in read_csv(folder / "reports" / "pitfalls.csv"):
        mistake = row["mistake"] or "none"
        assert f"| {row['model']} | {mistake} | {int(row['n']):,} | {float(row['fid']):,.2f} | " in text
    accuracy = next(line for line in text.splitlines() if line.startswith("| label accuracy"))
    assert "|  |  |" in accuracy  # the DCGAN and the unconditional diffusion model have none
    portuguese = (folder / "README.pt-BR.md").read_text()
    assert portuguese.startswith("before\n") and portuguese.endswith("\nafter\n") and "an older table" not in portuguese
    assert fid.replace(".", ",") in portuguese and len(re.findall(r"^\*\*", portuguese, re.M)) == 4


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "samples" / "gan_progress.gif").unlink(), "gan_progress.gif"),
        (lambda folder: (folder / "reports" / "samplers.csv").unlink(), "samplers.csv"),
        (lambda folder: (folder / "reports" / "self_check.csv").unlink(), "self_check.csv"),
        (lambda folder: (folder / "reports" / "pitfalls.csv").write_text("a,b\n1,2\n"), "pitfalls.csv"),
        (
            lambda folder: (folder / "reports" / "gan_training_log.csv").write_text("epoch,fid,seconds\n"),
            "gan_training_log.csv",
        ),
        (lambda folder: replace_once(folder / "reports" / "samplers.csv", ",cpu,", ",cuda,"), "more than one protocol"),
        (lambda folder: replace_once(folder / "reports" / "samplers.csv", "\n", "\n0"), "another checkpoint"),
        (lambda folder: other_gan(folder), "evaluate.py again"),
        (lambda folder: (folder / "reports" / "metrics.json").write_text("5"), "evaluate.py"),
        (lambda folder: (folder / "reports" / "metrics.json").write_text('{"rows": [5]}'), "evaluate.py"),
    ],
)
def test_damaged_figures_are_refused(damage, reason, report, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cdist", lambda a, b: torch.zeros(len(a), len(b)))  # the slowest part, of no matter here
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damage(copy)
    code, _, err = report(reports=copy / "reports", samples=copy / "samples", readme=copy / "README.md")
    assert code == 1 and reason in error_line(err)


def test_what_is_missing_is_said(report, folder, tmp_path):
    code, _, err = report(reports=tmp_path)
    assert code == 1 and "run evaluate.py first" in error_line(err)
    (tmp_path / "README.md").write_text("no marks")
    code, _, err = report(readme=tmp_path / "README.md")
    assert code == 1 and "no results section" in error_line(err)


def test_a_full_disk_keeps_the_page(report, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cdist", lambda a, b: torch.zeros(len(a), len(b)))
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    page = copy / "reports" / "report.html"
    page.write_text("an older one")
    with full_disk(10**6):  # more than any picture
        code, _, err = report(reports=copy / "reports", samples=copy / "samples", readme=copy / "README.md")
    assert code == 1 and f"cannot write {page} " in error_line(err)
    assert page.read_text() == "an older one" and not list(copy.rglob(".*"))
