"""A canvas for figures with axes, the same on every machine: no user's settings, no display, no pyplot."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from files import atomic_path

with mock.patch.dict(os.environ, MPLBACKEND="agg"):  # matplotlib's import fails where that of a notebook is not installed
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

# What each format would otherwise record: a version, or the time
METADATA = {".png": {"Software": None}, ".pdf": {"Creator": None, "Producer": None, "CreationDate": None}}


@contextlib.contextmanager
def figure(path: str | os.PathLike[str], width: float, height: float) -> Iterator[Figure]:
    """Give a blank figure of `width` x `height` inches. It is written to `path` after the block; the suffix is the format.

    matplotlib's own defaults hold inside, whatever the user's file says. Equal figures give equal bytes.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        blank = Figure(figsize=(width, height), dpi=150, layout="constrained")
        FigureCanvasAgg(blank)
        yield blank
        suffix = Path(path).suffix.lower()
        with atomic_path(path) as temporary:
            blank.savefig(temporary, format=suffix.removeprefix("."), metadata=METADATA.get(suffix))
