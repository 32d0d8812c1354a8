"""The report: drawn from the shipped figures alone, in one file, with the README's table beside it."""

from __future__ import annotations

import csv
import json
import re
import shutil

import pytest
import torch
from conftest import ROOT, error_line, read_csv, tiny_ddpm

MARKS = "<!-- results: written by report.py -->", "<!-- end of results -->"


def read_numbers(path) -> list[dict]:
    def number(cell: str):
        try:
            return float(cell)
        except ValueError:
            return cell or None

    with path.open() as file:
        return [{name: number(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The shipped GANs' figures with stand-ins for what this test does not measure."""
    folder = tmp_path_factory.mktemp("report")
    shutil.copytree(ROOT / "samples", folder / "samples")
    (folder / "reports").mkdir()
    for log in (ROOT / "reports").glob("*_training_log.csv"):
        shutil.copy(log, folder / "reports")
    rows = [row for row in read_numbers(ROOT / "reports" / "metrics.csv") if "ddpm" not in row["model"]]
    for row in rows:
        measured = {"device": "cpu"}
        if row["checkpoint"]:
            measured |= {"evaluations": 1.0, "images_per_second": 2000.0, "parameters": 900_000}
        row |= measured
    for model, like in (("ddpm", "dcgan"), ("ddpm, by digit", "cdcgan")):  # stand-ins, to be drawn
        row = next(row for row in rows if row["model"] == like)
        rows.append(row | {"model": model, "checkpoint": str(tiny_ddpm(folder)), "steps": 2, "guidance": 1.3})
    order = ["real training digits", "real test digits", "dcgan", "ddpm", "cdcgan", "ddpm, by digit"]
    rows.sort(key=lambda row: order.index(row["model"]))
    by_digit = [row for row in read_numbers(ROOT / "reports" / "metrics_by_digit.csv") if "ddpm" not in row["model"]]
    content = {
        "command": "python evaluate.py",
        "versions": {"torch": "2", "git": "0"},
        "rows": rows,
        "rows_by_digit": by_digit,
    }
    (folder / "reports" / "metrics.json").write_text(json.dumps(content))
    lines = ["drawn,sampler,steps,eta,guidance,seed,fid_ratio"]
    settings = ("dpm-solver++,2,0", "dpm-solver++,2,2", "ddim,2,0", "ddpm,1000,0")
    lines += [f"any digit,{setting},1,{seed},{5 + seed}" for setting in settings for seed in (0, 1)]
    (folder / "reports" / "samplers.csv").write_text("\n".join(lines))
    lines = [
        "model,mistake,n,fid,fid_ratio,is,label_accuracy",
        "DDPM,,500,2.5,1.7,9.5,0.99",
        "DCGAN,,1000,4.5,1.2,9.5,",
        '"DCGAN","average of the parameters alone: BatchNorm\'s mean 0, variance 1",1000,1234.5,9.25,1,',
        '"real digits","pixels in [0, 1], cut to integers",1000,3000.5,99.5,1,',
    ]
    (folder / "reports" / "pitfalls.csv").write_text("\n".join(lines))
    shutil.copy(folder / "samples" / "infer_side_by_side.png", folder / "reports" / "samplers.png")
    (folder / "README.md").write_text(f"before\n{MARKS[0]}\nan older table\n{MARKS[1]}\nafter\n")
    return folder


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


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "samples" / "gan_progress.gif").unlink(), "gan_progress.gif"),
        (lambda folder: (folder / "reports" / "samplers.csv").unlink(), "samplers.csv"),
        (lambda folder: (folder / "reports" / "pitfalls.csv").write_text("a,b\n1,2,3\n"), "pitfalls.csv"),
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
