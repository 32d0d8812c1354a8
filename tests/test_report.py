"""report.py: it draws one page from the shipped figures alone, and rewrites the tables in README and docs."""

from __future__ import annotations

import json
import re
import runpy
import shutil

import pytest
import torch
from conftest import ROOT, error_line, read_csv, tiny_ddpm
from test_outputs import full_disk

from checkpoint import file_sha256

PARTS = {
    "README.md": ["overview", "colab"],
    "README.pt-BR.md": ["overview", "colab"],
    "docs/results.md": ["results", "shares", "training seeds", "pitfalls", "ablation", "self check"],
}
CONCLUSION = "## What the figures say\n\n**Cost.** Diffusion costs\n15 evaluations.\n\n## Next\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the shipped figures and pictures. A tiny diffusion model replaces the slow one."""
    folder = tmp_path_factory.mktemp("report")
    for name in ("samples", "reports"):
        shutil.copytree(ROOT / name, folder / name)
    shipped, tiny = ROOT / "checkpoints" / "best_DIFF.pt", tiny_ddpm(folder)
    old, new = file_sha256(shipped), file_sha256(tiny)
    for name in ("metrics.json", "samplers.csv", "pitfalls.csv"):
        text = (folder / "reports" / name).read_text().replace("checkpoints/best_DIFF.pt", str(tiny))
        (folder / "reports" / name).write_text(text.replace(old, new).replace(old[:16], new[:16]))
    (folder / "docs").mkdir()
    shutil.copy(ROOT / "CITATION.cff", folder)
    for name, parts in PARTS.items():
        marked = "".join(f"<!-- {part}: written by report.py -->\nolder\n<!-- end of {part} -->\n" for part in parts)
        (folder / name).write_text(f"before\n{marked}{CONCLUSION}after\n")
    return folder


def replace_once(path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new, 1))


def other_gan(folder) -> None:
    """Change the figures to those of another DCGAN than the one in its file."""
    digest = file_sha256(ROOT / "checkpoints" / "best_GAN_G.pt")
    for name in ("metrics.json", "pitfalls.csv"):
        path = folder / "reports" / name
        path.write_text(path.read_text().replace(digest[:16], "0" * 16))


@pytest.fixture
def report(folder, mnist_dir, run):
    def call(**paths):
        paths = {"reports": folder / "reports", "samples": folder / "samples", "readme": folder / "README.md", **paths}
        args = [text for name, path in paths.items() if path for text in (f"--{name}", path)]
        return run("report.py", *args, "--data-dir", mnist_dir, "--device", "cpu")

    return call


@pytest.fixture(scope="module")
def drawn(folder, mnist_dir):
    """The folder after one run of report.py."""
    paths = {"reports": folder / "reports", "samples": folder / "samples", "readme": folder / "README.md"}
    args = [str(text) for name, path in paths.items() for text in (f"--{name}", path)]
    runpy.run_path(str(ROOT / "report.py"))["main"]([*args, "--data-dir", mnist_dir, "--device", "cpu"])
    return folder


@pytest.fixture(scope="module")
def page(drawn) -> str:
    return (drawn / "reports" / "report.html").read_text()


def test_the_page_is_one_file(page):
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) > 12
    assert all(source.startswith("data:") for source in sources)
    assert not re.search(r"https?://|@import|<script|url\(", page)


def test_the_page_describes_its_pictures(page):
    for text in ("Bars of FID", "Samples of DCGAN", "Noise becoming digits"):
        assert f'alt="{text}' in page


def test_the_page_has_the_measured_tables(page, drawn):
    for row in read_csv(drawn / "reports" / "pitfalls.csv"):
        assert f"<td>{int(row['n']):,}</td><td>{float(row['fid']):,.2f}</td>" in page
    for row in read_csv(drawn / "reports" / "self_check.csv"):
        fid = f"{float(row['fid']):,.2f}" if row["fid"] else ""
        assert f"<td>{row['damage']}</td><td>{row['level']}</td><td>{fid}</td>" in page


def test_the_page_has_the_conclusions_written_by_hand(page):
    assert "<p><strong>Cost.</strong> Diffusion costs 15 evaluations.</p>" in page


@pytest.mark.parametrize(
    "name",
    ["fid_comparison", "is_comparison", "loss_comparison", "quality_against_cost", "fid_by_digit", "nearest_neighbours"],
)
def test_every_chart_is_drawn(name, drawn):
    assert (drawn / "reports" / f"{name}.png").stat().st_size > 5000


def test_the_report_drawn_again_has_the_same_bytes(report, drawn):
    first = {path.name: path.read_bytes() for path in (drawn / "reports").iterdir()}
    assert report()[0] == 0
    assert first == {path.name: path.read_bytes() for path in (drawn / "reports").iterdir()}


def test_a_report_of_other_figures_has_no_conclusions_of_ours(report, drawn, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(drawn / "reports", copy)
    (copy / "report.html").unlink()
    monkeypatch.setattr("torch.cdist", lambda a, b: torch.zeros(len(a), len(b)))  # the slowest part
    assert report(reports=copy, readme=None)[0] == 0
    assert "What the figures say" not in (copy / "report.html").read_text()


def table_rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]


def test_only_the_generated_parts_are_rewritten(drawn):
    for name in PARTS:
        text = (drawn / name).read_text()
        assert text.startswith("before\n")
        assert text.endswith("after\n")
        assert "older" not in text


def test_the_overview_has_a_line_for_each_model(drawn):
    rows = {row["model"]: row for row in json.loads((drawn / "reports" / "metrics.json").read_text())["rows"]}
    lines = {line[0]: line for line in table_rows((drawn / "README.md").read_text())}
    for label, model in (("DCGAN", "dcgan"), ("DDPM, class-conditional", "ddpm, by digit")):
        row = rows[model]
        assert lines[label][1] == f"{row['fid_ratio']:.1f} ± {row['fid_ratio_std']:.1f}"
        assert lines[label][3] == f"{100 * row['two_sample']:.1f}"
        assert lines[label][8] == f"{row['images_per_second']:,.0f}"
    assert lines["real training digits"][1] == "1"
    assert lines["DCGAN"][6] == ""  # an unconditional model has no label accuracy
    seconds = float(read_csv(drawn / "reports" / "gan_training_log.csv")[-1]["seconds"])
    assert lines["DCGAN"][9] == f"{seconds / 60:.1f} min"


def test_the_portuguese_overview_has_decimal_commas(drawn):
    english, portuguese = (table_rows((drawn / name).read_text()) for name in ("README.md", "README.pt-BR.md"))
    swap = str.maketrans(",.", ".,")
    figures = [[cell.translate(swap) for cell in line[1:]] for line in english[2:]]
    assert [line[1:] for line in portuguese[2:]] == figures
    assert portuguese[-1][0] == "DDPM, condicional"


def test_the_results_page_has_every_figure(drawn):
    rows = {row["model"]: row for row in json.loads((drawn / "reports" / "metrics.json").read_text())["rows"]}
    text = (drawn / "docs" / "results.md").read_text()
    fid = next(line for line in text.splitlines() if line.startswith("| FID |"))
    models = ("real training digits", "dcgan", "ddpm", "cdcgan", "ddpm, by digit")
    assert fid == "| FID | " + " | ".join(f"{rows[m]['fid']:.3f} ± {rows[m]['fid_std']:.3f}" for m in models) + " |"
    for row in read_csv(drawn / "reports" / "pitfalls.csv"):
        mistake = row["mistake"] or "none"
        assert f"| {row['model']} | {mistake} | {int(row['n']):,} | {float(row['fid']):,.2f} | " in text


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "samples" / "gan_progress.gif").unlink(), "gan_progress.gif"),
        (lambda folder: (folder / "reports" / "samplers.csv").unlink(), "samplers.csv"),
        (lambda folder: (folder / "reports" / "self_check.csv").unlink(), "self_check.csv"),
        (lambda folder: (folder / "reports" / "ablation.csv").unlink(), "ablation.csv"),
        (lambda folder: (folder / "reports" / "pitfalls.csv").write_text("a,b\n1,2\n"), "pitfalls.csv"),
        (
            lambda folder: (folder / "reports" / "gan_training_log.csv").write_text("epoch,fid,seconds\n"),
            "gan_training_log.csv",
        ),
        (lambda folder: replace_once(folder / "reports" / "samplers.csv", ",cpu,", ",cuda,"), "more than one protocol"),
        (lambda folder: replace_once(folder / "reports" / "ablation.csv", ",cpu,", ",cuda,"), "ablation.csv holds more"),
        (lambda folder: replace_once(folder / "reports" / "samplers.csv", "\n", "\n0"), "another checkpoint"),
        (lambda folder: other_gan(folder), "evaluate.py again"),
        (lambda folder: (folder / "reports" / "metrics.json").write_text("5"), "evaluate.py"),
        (lambda folder: (folder / "reports" / "metrics.json").write_text('{"rows": [5]}'), "evaluate.py"),
    ],
)
def test_damaged_figures_are_refused(damage, reason, report, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cdist", lambda a, b: torch.zeros(len(a), len(b)))  # the slowest part
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damage(copy)
    code, _, err = report(reports=copy / "reports", samples=copy / "samples", readme=copy / "README.md")
    assert code == 1 and reason in error_line(err)


def test_missing_figures_are_named_with_their_command(report, tmp_path):
    code, _, err = report(reports=tmp_path)
    assert code == 1
    assert "run evaluate.py first" in error_line(err)


def test_a_page_without_marks_is_refused_before_any_is_rewritten(report, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cdist", lambda a, b: torch.zeros(len(a), len(b)))
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "README.md").write_text(
        "".join(f"<!-- {p}: written by report.py -->older<!-- end of {p} -->" for p in PARTS["README.md"])
    )
    (copy / "docs" / "results.md").write_text(CONCLUSION)
    code, _, err = report(reports=copy / "reports", samples=copy / "samples", readme=copy / "README.md")
    assert code == 1
    assert "has no part between <!-- results" in error_line(err)
    assert "older" in (copy / "README.md").read_text()


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
