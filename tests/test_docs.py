"""The pages: their links, their commands, the figures that they quote, and the parts that report.py writes."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from test_structure import imports_of_rooms

from figures.measured import read_measured
from files import UsageError
from scoring.metrics import estimate

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
GENERATED = re.compile(r"<!-- [^>]*: written by report.py -->.*?<!-- end of [^>]* -->", re.DOTALL)
CODE = re.compile(r"```.*?```", re.DOTALL)


def page_ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --------------------------------------------------------------------------------------------------------------------
# Length, links, commands


def test_the_readme_has_at_most_1800_words():
    """Code blocks and generated parts do not count; tables written by hand do."""
    prose = CODE.sub("", GENERATED.sub("", (ROOT / "README.md").read_text()))
    assert len(prose.split()) <= 1800


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_ids)
def test_every_relative_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", page.read_text())):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


COMMAND = re.compile(r"(\w+=\S+ )?(python|torchrun \S+) (-- )?[\w/]+\.py")


def commands(page: Path) -> list[str]:
    """The command lines of the project's scripts in a page, with their continuation lines joined."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`(python [\w/]+\.py[^`]*)`", text)
    return [line for line in [*lines, *inline] if COMMAND.match(line) and "..." not in line]


@pytest.mark.parametrize("page", PAGES, ids=page_ids)
def test_every_command_in_a_page_is_accepted_by_its_script(page):
    for line in commands(page):
        words = shlex.split(line)
        place = next(i for i, word in enumerate(words) if word.endswith(".py"))
        if words[place].startswith("benchmarks/"):
            assert_benchmark_accepts(words[place], words[place + 1 :])
            continue
        try:
            runpy.run_path(str(ROOT / words[place]))["parse_args"](words[place + 1 :])
        except SystemExit as stop:
            assert stop.code == 0, line  # --help
        except UsageError as error:
            pytest.fail(f"{line}: {error}")


def assert_benchmark_accepts(script: str, args: list[str]) -> None:
    """The flags of the command stand in the source of the benchmark, or of what it shares with the others."""
    source = "".join((ROOT / "benchmarks" / name).read_text() for name in (Path(script).name, "timing.py"))
    for flag in (arg for arg in args if arg.startswith("--")):
        assert f'"{flag}"' in source, (script, flag)


def test_the_main_pages_have_commands():
    for name in ("README.md", "README.pt-BR.md", "docs/results.md", "docs/faq.md"):
        assert len(commands(ROOT / name)) > 5, name


def test_no_placeholder_is_left():
    for page in PAGES:
        assert not re.search(
            r"<!-- measure|\b(DEMO|FIRST|LAPTOP)_[A-Z]+|\b(MINUTES|TWO_SAMPLE|BLACK)\b", page.read_text()
        ), page


def test_the_readme_in_portuguese_has_the_same_structure():
    def headings(name: str) -> list[int]:
        return [len(marks) for marks in re.findall(r"^(#+) ", CODE.sub("", (ROOT / name).read_text()), re.MULTILINE)]

    assert headings("README.pt-BR.md") == headings("README.md")


# --------------------------------------------------------------------------------------------------------------------
# Quoted figures


@pytest.fixture(scope="module")
def measured():
    return read_measured(ROOT / "reports")


PERCENT = ("label_accuracy", "nearest_share_close", "two_sample", "black")


@pytest.fixture(scope="module")
def figures(measured) -> dict[str, object]:
    """What the sentences below are filled with: rows of metrics.json with shares in percent, minutes, samplers, mistakes."""

    def namespace(row: dict) -> SimpleNamespace:
        percent = {name: 100 * row[name] for name in PERCENT if row.get(name) is not None}
        return SimpleNamespace(**(row | percent))

    rows = {name: namespace(row) for name, row in measured.rows.items()}
    floor = measured.rows["real training digits"]

    def sampler(name: str, steps: int, eta: float) -> SimpleNamespace:
        key = ("unconditional", name, steps, eta)
        ratios = [r["fid_ratio"] for r in measured.samplers if (r["drawn"], r["sampler"], r["steps"], r["eta"]) == key]
        return SimpleNamespace(**estimate(ratios)._asdict())

    def weakest(model: str) -> SimpleNamespace:
        digits = [row for row in measured.metrics["rows_by_digit"] if row["model"] == model]
        return SimpleNamespace(**max(digits, key=lambda row: row["fid_ratio"]))

    mistakes = {(row["model"], row["mistake"] or ""): row for row in measured.pitfalls}
    wrong_schedules = [row["fid"] for (model, mistake), row in mistakes.items() if model == "DDPM" and mistake]
    return {
        "dcgan": rows["dcgan"],
        "ddpm": rows["ddpm"],
        "cdcgan": rows["cdcgan"],
        "labelled": rows["ddpm, by digit"],
        "floor": rows["real training digits"],
        "test": rows["real test digits"],
        "speed": rows["dcgan"].images_per_second / rows["ddpm"].images_per_second,
        "minutes": SimpleNamespace(**{name: measured.training_minutes(name) for name in ("dcgan", "cdcgan", "ddpm")}),
        "solver": sampler("dpm-solver++", 15, 2.5),
        "solver0": sampler("dpm-solver++", 15, 0.0),
        "ddim": sampler("ddim", 15, 0.0),
        "ancestral": sampler("ddpm", 100, 0.0),
        "weakest_labelled": weakest("ddpm, by digit"),
        "weakest_cdcgan": weakest("cdcgan"),
        "floor_error": 100 * floor["fid_std"] / floor["fid"] / floor["repeats"] ** 0.5,
        "cut": mistakes["real digits", "pixels in [0, 1], cut to integers"]["is"],
        "plain_gan": mistakes["DCGAN", ""]["fid"],
        "blind_gan": mistakes["DCGAN", "average of the parameters alone: BatchNorm's mean 0, variance 1"]["fid"],
        "plain_ddpm": mistakes["DDPM", ""]["fid"],
        "wrong_schedule": min(wrong_schedules),
    }


# The sentences with figures, as they must stand in the pages. When a figure changes, the test of its sentence fails.
QUOTED = {
    "docs/results.md": [
        "with guidance scale {labelled.guidance}, like",
        "Its FID ratio is {ddpm.fid_ratio:.1f}, the DCGAN's is {dcgan.fid_ratio:.1f}.",
        "Its precision is {ddpm.precision:.3f} against {dcgan.precision:.3f}. Real digits reach {floor.precision:.3f}.",
        "Recall is nearly equal: {ddpm.recall:.3f} and {dcgan.recall:.3f}. Real digits reach {floor.recall:.3f}.",
        "With real shares of the digits, it would be {ddpm.fid_ratio_reweighted:.1f}.",
        "Its FID ratio is {labelled.fid_ratio:.1f}, the conditional DCGAN's is {cdcgan.fid_ratio:.1f}.",
        "The classifier reads {labelled.label_accuracy:.2f} % of the DDPM's samples as the chosen digit, and "
        "{cdcgan.label_accuracy:.2f} % of the conditional DCGAN's.",
        "It reads {test.label_accuracy:.2f} % of the real test digits",
        "its recall is {labelled.recall:.3f} against {cdcgan.recall:.3f}.",
        "of the DDPM is the {weakest_labelled.digit}, with a FID ratio of {weakest_labelled.fid_ratio:.1f}.",
        "of the conditional DCGAN is the {weakest_cdcgan.digit}, with a FID ratio of {weakest_cdcgan.fid_ratio:.1f}.",
        "The DDPM takes {ddpm.evaluations:.0f} unconditional, and {labelled.evaluations:.0f} with guidance",
        "the DCGAN in {dcgan.dtype} draws {speed:.0f} times as many images a second as the DDPM in {ddpm.dtype}.",
        "took {minutes.dcgan:.1f} minutes (DCGAN) and {minutes.cdcgan:.1f} minutes (conditional DCGAN) on one H200.",
        "The DDPM's took 3.6 minutes there, and then {minutes.ddpm:.1f} minutes on one CPU core.",
        "can tell the DCGAN's samples from real digits in {dcgan.two_sample:.1f} % of cases, and the conditional DCGAN's in "
        "{cdcgan.two_sample:.1f} %.",
        "For the DDPM it is {ddpm.two_sample:.1f} % unconditional and {labelled.two_sample:.1f} % class-conditional.",
        "Real digits against real digits give {floor.two_sample:.1f} %.",
        "{floor.black:.1f} % of the pixels of real training digits are black. The DDPM reaches {ddpm.black:.1f} and "
        "{labelled.black:.1f} %, the DCGAN {dcgan.black:.1f} % and the conditional DCGAN {cdcgan.black:.1f} %.",
        "{ddpm.steps} steps of DPM-Solver++ have a FID ratio of {solver.mean:.1f} ± {solver.std:.1f} with eta {ddpm.eta}, "
        "and of {solver0.mean:.1f} ± {solver0.std:.1f} with eta 0.",
        "15 steps of DDIM have {ddim.mean:.1f} ± {ddim.std:.1f}, and 100 steps of ancestral sampling "
        "{ancestral.mean:.1f} ± {ancestral.std:.1f}.",
        "These ratios are of 1,000 samples",
        "The smallest 1 % of these distances",
        "are below it: {dcgan.nearest_share_close:.2f} % (DCGAN), {ddpm.nearest_share_close:.2f} % (DDPM, unconditional), "
        "{cdcgan.nearest_share_close:.2f} % (conditional DCGAN) and "
        "{labelled.nearest_share_close:.2f} % (DDPM, class-conditional).",
        "of the unconditional DDPM is {ddpm.nearest_median_ratio:.2f} times that of test digits. But its first percentile "
        "is "
        "{ddpm.nearest_percentile_ratio:.2f} times theirs",
        "is uncertain by {floor_error:.2f} % (standard error)",
        "the inception score of real digits down to {cut:.2f}.",
        "raises the DCGAN's FID from {plain_gan:.1f} to {blind_gan:.0f}.",
        "raises the DDPM's FID from {plain_ddpm:.1f} to {wrong_schedule:.0f} or more.",
    ],
    "README.md": [
        "its FID ratio is {ddpm.fid_ratio:.1f}, the DCGAN's is {dcgan.fid_ratio:.1f}.",
        "its FID ratio is {labelled.fid_ratio:.1f}, the conditional DCGAN's is {cdcgan.fid_ratio:.1f}.",
        "{labelled.evaluations:.0f} to {ddpm.evaluations:.0f} network evaluations of an image",
    ],
}
SECTIONS = {"docs/results.md": "What the figures say", "README.md": "Results"}


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("page", QUOTED)
def test_every_quoted_figure_is_the_measured_one(page, figures):
    text = words((ROOT / page).read_text())
    for sentence in QUOTED[page]:
        assert sentence.format(**figures) in text


@pytest.mark.parametrize("page", SECTIONS)
def test_no_figure_of_the_conclusions_is_left_out_above(page, figures):
    section = words(re.split(r"\n## ", (ROOT / page).read_text().partition(f"## {SECTIONS[page]}\n")[2])[0])
    for sentence in QUOTED[page]:
        section = section.replace(sentence.format(**figures), "")
    assert not re.findall(r"\d[\d.,]*(?! ?H200)", section.replace("H200", ""))


def test_the_portuguese_readme_quotes_the_same_figures():
    def quoted(name: str, heading: str) -> list[str]:
        section = re.split(r"\n## ", (ROOT / name).read_text().partition(f"## {heading}\n")[2])[0]
        return re.findall(r"\d+[.,]?\d*", section)

    english = quoted("README.md", "Results")
    assert [figure.replace(",", ".") for figure in quoted("README.pt-BR.md", "Resultados")] == english


# --------------------------------------------------------------------------------------------------------------------
# What report.py writes


def test_the_generated_parts_are_what_the_report_writes(measured, tmp_path):
    names = ["README.md", "README.pt-BR.md", "docs/results.md", "CITATION.cff", "notebooks/gan_versus_diffusion.ipynb"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    runpy.run_path(str(ROOT / "report.py"))["write_tables"](tmp_path / "README.md", measured)
    for name in names:
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), name


def test_one_line_sets_the_address_of_the_repository(measured, tmp_path):
    for name in ("README.md", "README.pt-BR.md", "docs/results.md", "CITATION.cff", "notebooks/gan_versus_diffusion.ipynb"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    pattern, citation = r"^(# )?repository-code: .*$", (tmp_path / "CITATION.cff").read_text()
    changed = re.sub(pattern, "repository-code: https://github.com/ada/digits", citation, flags=re.MULTILINE)
    assert changed != citation
    (tmp_path / "CITATION.cff").write_text(changed)
    runpy.run_path(str(ROOT / "report.py"))["write_tables"](tmp_path / "README.md", measured)
    colab = "https://colab.research.google.com/github/ada/digits/blob/main/notebooks/gan_versus_diffusion.ipynb"
    assert colab in (tmp_path / "README.md").read_text()
    notebook = json.loads((tmp_path / "notebooks" / "gan_versus_diffusion.ipynb").read_text())
    assert 'REPOSITORY = "https://github.com/ada/digits"' in "".join("".join(cell["source"]) for cell in notebook["cells"])


# --------------------------------------------------------------------------------------------------------------------
# The picture of the rooms, and the versions


def reachable(arrows: set[tuple[str, str]], start: str) -> set[str]:
    found, border = set(), {start}
    while border:
        border = {b for a, b in arrows if a in border} - found
        found |= border
    return found


def test_the_picture_of_the_rooms_shows_their_imports():
    picture = (ROOT / "docs" / "architecture.md").read_text().partition("```mermaid")[2].partition("```")[0]
    drawn = {pair for pair in re.findall(r"(\w+) --> (\w+)", picture) if pair[0] != "scripts"}
    imported = {(room, other) for room, others in imports_of_rooms().items() for other in others}
    assert drawn <= imported
    assert all(other in reachable(drawn, room) for room, other in imported)


def requirements(name: str) -> dict[str, Requirement]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    parsed = [Requirement(line) for line in lines if line and not line.startswith("-r")]
    return {requirement.name.lower(): requirement for requirement in parsed}


def test_every_requirement_admits_its_exact_version():
    exact = requirements("constraints.txt")
    for name, requirement in (requirements("requirements.txt") | requirements("requirements-dev.txt")).items():
        if "==" in str(requirement):
            continue  # exact already
        (version,) = (specifier.version for specifier in exact[name].specifier)
        assert requirement.specifier.contains(version), name


def test_the_exact_versions_are_those_of_the_reports(measured):
    assert f"torch=={measured.metrics['versions']['torch'].partition('+')[0]}" in (ROOT / "constraints.txt").read_text()
