"""The charts: figures with axes, drawn from the rows of metrics.json, of the training logs and of the benchmarks.

The colours are those of Okabe and Ito, which colour-blind readers tell apart. Markers and hatches differ too, for print.
"""

from __future__ import annotations

import itertools
import os
import textwrap
from typing import TYPE_CHECKING

import numpy as np

from figures import canvas  # before matplotlib, which it imports with a fixed backend
from figures.measured import ABLATION_TITLES, label_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

STYLES = {  # model of metrics.json -> colour, marker, hatch
    "dcgan": ("#e69f00", "s", "//"),
    "ddpm": ("#0072b2", "o", ""),
    "cdcgan": ("#d55e00", "D", "\\\\"),
    "ddpm, by digit": ("#56b4e9", "^", ".."),
}
UNKNOWN = ("#999999", "P", "")
Rows = list[dict]


def compare(path: str | os.PathLike[str], rows: Rows, name: str, axis: str, real: dict) -> None:
    """Bars of one metric with their deviation, and the value of real digits as a line."""
    with canvas.figure(path, 6.4, 3.6) as figure:
        axes = figure.subplots()
        for position, row in enumerate(rows):
            colour, _, hatch = STYLES.get(row["model"], UNKNOWN)
            deviation = row[f"{name}_std"]
            axes.bar(position, row[name], 0.6, color=colour, hatch=hatch, edgecolor="black", linewidth=0.8)
            axes.errorbar(position, row[name], deviation, color="black", capsize=4)
        axes.axhline(real[name], color="black", linestyle="--", label=f"{real['model']}: {real[name]:.2f}")
        if real.get(f"{name}_std"):
            low, high = (real[name] + sign * real[f"{name}_std"] for sign in (-1, 1))
            axes.axhspan(low, high, color="black", alpha=0.15, linewidth=0)
        labels = (textwrap.fill(label_of(row["model"]), 17, break_on_hyphens=False) for row in rows)
        axes.set_xticks(range(len(rows)), [f"{label}\n{row[name]:.2f}" for label, row in zip(labels, rows)])
        axes.set_ylabel(axis)
        axes.margins(y=0.15)
        axes.legend(frameon=False, loc="best")


def training_curves(path: str | os.PathLike[str], logs: dict[str, Rows]) -> None:
    """Losses above and the monitor's FID (logarithmic) below, over epochs. A column for each training."""
    with canvas.figure(path, 3.4 * len(logs), 5.0) as figure:
        for (title, rows), (upper, lower) in zip(logs.items(), figure.subplots(2, len(logs), squeeze=False).T):
            epochs = [row["epoch"] for row in rows]
            for (name, label), (colour, line) in zip(_loss_names(rows).items(), (("#0072b2", "-"), ("#d55e00", "--"))):
                upper.plot(epochs, [row[name] for row in rows], color=colour, linestyle=line, label=label)
            scored = [row for row in rows if row.get("fid") is not None]
            lower.plot(
                [row["epoch"] for row in scored], [row["fid"] for row in scored], color="black", marker="o", markersize=3
            )
            best = min(scored, key=lambda row: row["fid"])
            lower.plot(best["epoch"], best["fid"], color="black", marker="o", markersize=9, fillstyle="none")
            lower.annotate(
                f"best {best['fid']:.2f} at epoch {best['epoch']:g}", (0.96, 0.9), xycoords="axes fraction", ha="right"
            )
            upper.set_title(title)
            upper.set_ylabel("loss")
            upper.legend(frameon=False)
            lower.set(yscale="log", xlabel="epoch", ylabel="FID (mnist extractor,\ntraining set)")
            _plain_numbers(lower.yaxis)


def _plain_numbers(axis: Axis) -> None:
    """Label a logarithmic axis with a few plain numbers, such as 20 and 0.5, instead of powers of ten."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _loss_names(rows: Rows) -> dict[str, str]:
    names = {"loss": "diffusion", "loss_d": "discriminator", "loss_g": "generator"}
    return {name: label for name, label in names.items() if name in rows[0]}


def quality_against_cost(path: str | os.PathLike[str], rows: Rows) -> None:
    """FID ratio of the models over network evaluations and over images/s, all logarithmic."""
    with canvas.figure(path, 9.0, 4.0) as figure:
        for axes, cost, label in zip(
            figure.subplots(1, 2),
            ("evaluations", "images_per_second"),
            ("network evaluations per image", "images per second"),
        ):
            for row in rows:
                colour, marker, _ = STYLES.get(row["model"], UNKNOWN)
                style = {"color": colour, "marker": marker, "markersize": 8, "markeredgecolor": "black", "linestyle": ""}
                axes.errorbar(
                    row[cost], row["fid_ratio"], row["fid_ratio_std"], capsize=3, label=label_of(row["model"]), **style
                )
            axes.axhline(1, color="black", linewidth=1)
            axes.annotate("real digits", (0.01, 1), xycoords=("axes fraction", "data"), va="bottom")
            axes.set(xscale="log", yscale="log", xlabel=label, ylabel="FID / FID of real digits")
            _plain_numbers(axes.xaxis)
            _plain_numbers(axes.yaxis)
        axes.legend(frameon=False, fontsize=8)


def heat_map(path: str | os.PathLike[str], rows: Rows) -> None:
    """FID ratio of each digit (columns) for each class-conditional model (rows), as colour and number."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    values = np.array([[row["fid_ratio"] for row in rows if row["model"] == model] for model in models])
    with canvas.figure(path, 7.0, 1.2 + 0.55 * len(models)) as figure:
        axes = figure.subplots()
        brightest = max(1.0, np.log2(values).max())
        axes.imshow(np.log2(values), cmap="cividis", vmin=0, vmax=brightest, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            dark = np.log2(value) < 0.5 * brightest
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", color="white" if dark else "black")
        axes.set_xticks(range(10))
        axes.set_yticks(range(len(models)), [label_of(model) for model in models])
        axes.set_title("FID of a digit / FID of that digit's real images, at the same n", fontsize=10)


def neighbours(path: str | os.PathLike[str], panels: list[tuple[str, np.ndarray, np.ndarray]]) -> None:
    """Samples above their nearest training digits, a block for each model.

    Args:
        panels: title, uint8 samples [N, 28, 28], and their K nearest training digits [N, K, 28, 28].
    """
    rows = 1 + panels[0][2].shape[1]
    columns = len(panels[0][1])
    with canvas.figure(path, 0.55 * columns + 0.4, (0.55 * rows + 0.35) * len(panels)) as figure:
        for part, (title, samples, nearest) in zip(figure.subfigures(len(panels), 1, squeeze=False)[:, 0], panels):
            part.suptitle(title, fontsize=9)
            grid = part.subplots(rows, columns)
            for column in range(columns):
                for row, picture in enumerate([samples[column], *nearest[column]]):
                    _show_digit(grid[row, column], picture, framed=row == 0)


def _show_digit(axes: Axes, picture: np.ndarray, framed: bool) -> None:
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=framed, color="#d55e00", linewidth=1.5)


def sampler_curve(path: str | os.PathLike[str], curves: dict[str, dict[int, tuple[float, float]]], caption: str) -> None:
    """FID ratio over network evaluations, both logarithmic. `curves`: sampler -> evaluations -> (mean, deviation)."""
    with canvas.figure(path, 6.4, 4.4) as figure:
        axes = figure.subplots()
        colours, markers, lines = (
            ("#0072b2", "#d55e00", "#cc79a7", "#009e73", "#e69f00"),
            "osv^D",
            ("-", "--", ":", "-.", "-"),
        )
        styles = itertools.cycle(zip(colours, markers, lines))
        for (name, points), (colour, marker, line) in zip(curves.items(), styles):
            means, deviations = zip(*points.values())
            axes.errorbar(
                list(points), means, deviations, label=name, color=colour, marker=marker, linestyle=line, capsize=3
            )
        axes.axhline(1, color="black", linewidth=1)
        axes.annotate("real digits", (0.99, 1), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        ticks = sorted({steps for points in curves.values() for steps in points})
        axes.set(xscale="log", yscale="log", xlabel="network evaluations per image", ylabel="FID / FID of real digits")
        _plain_numbers(axes.yaxis)
        axes.set_xticks(ticks, [str(steps) for steps in ticks])
        axes.minorticks_off()
        axes.set_title(f"Quality against cost ({caption}; bars: deviation over seeds)", fontsize=10)
        axes.legend(frameon=False)


def ablation(path: str | os.PathLike[str], rows: Rows) -> None:
    """FID ratio of every recipe, a mark for each seed, best mean first. The DDPM has a panel for each way of sampling.

    Recipes that start from the classic table are blue. The others are red, with a diamond for the one that they start from.

    Args:
        rows: `model`, `recipe`, `fid_ratio`, and for a class-conditional DDPM `fid_ratio_unconditional`, else nan.
    """
    panels: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        two_ways = not np.isnan(row["fid_ratio_unconditional"])
        ways = {"fid_ratio": ", class-conditional" if two_ways else "", "fid_ratio_unconditional": ", unconditional"}
        for name, way in ways.items():
            if not np.isnan(row[name]):
                panels.setdefault(ABLATION_TITLES[row["model"]] + way, {}).setdefault(row["recipe"], []).append(row[name])
    heights = [len(recipes) + 2 for recipes in panels.values()]
    with canvas.figure(path, 6.4, 0.22 * sum(heights) + 0.4) as figure:
        grid = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
        for axes, (title, recipes) in zip(grid, panels.items()):
            order = sorted(recipes, key=lambda recipe: np.mean(recipes[recipe]), reverse=True)
            for position, recipe in enumerate(order):
                values, color = recipes[recipe], "#0072b2" if recipe.startswith("preset=reference") else "#d55e00"
                axes.plot(values, [position] * len(values), "D" if recipe == "preset=cpu" else "o", color=color)
                axes.plot(np.mean(values), position, "|", color="black", markersize=12)
            if "preset=cpu" in recipes:
                axes.axvline(np.mean(recipes["preset=cpu"]), color="#d55e00", linewidth=1, linestyle=":")
            axes.set_yticks(range(len(order)), order, fontsize=8)
            axes.set(xscale="log", ylim=(-1, len(order)))
            _plain_numbers(axes.xaxis)
            axes.set_title(title, fontsize=10)
        figure.supxlabel("FID / FID of real digits (a mark for each training seed, a bar at their mean)", fontsize=10)
