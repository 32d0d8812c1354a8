"""Pictures of images: grids, GIFs, panels side by side. Images are uint8 [N, 1, H, W]. Files are written atomically."""

from __future__ import annotations

import math
import os

import numpy as np
import torch
from torch import Tensor

from files import atomic_path

PAD = 2  # pixels between the images of a grid
CAPTION_WIDTH = 150


def image_grid(images: Tensor, columns: int | None = None) -> np.ndarray:
    """uint8 [N, 1, H, W] -> one uint8 picture [h, w], row by row. Without `columns` it is nearly square.

    Raises:
        ValueError: another shape or type.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 1:
        raise ValueError(f"a grid needs uint8 [N, 1, H, W], not {images.dtype} {list(images.shape)}")
    count, _, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    padded = torch.nn.functional.pad(images[:, 0].cpu(), (0, PAD, 0, PAD))  # [N, H + PAD, W + PAD]
    blank = torch.zeros(rows * columns - count, height + PAD, width + PAD, dtype=torch.uint8)
    cells = torch.cat([padded, blank]).view(rows, columns, height + PAD, width + PAD)
    picture = cells.transpose(1, 2).reshape(rows * (height + PAD), columns * (width + PAD))
    return np.pad(picture.numpy(), ((PAD, 0), (PAD, 0)))


def captioned(picture: np.ndarray, caption: str) -> np.ndarray:
    """The picture [H, W] under a line of text, at least CAPTION_WIDTH pixels wide."""
    from PIL import Image, ImageDraw

    picture = np.pad(picture, ((0, 0), (0, max(0, CAPTION_WIDTH - picture.shape[1]))))
    strip = Image.new("L", (picture.shape[1], 18), 0)
    ImageDraw.Draw(strip).text((4, 3), caption, fill=255)
    return np.concatenate([np.asarray(strip), picture])


def write_png(path: str | os.PathLike[str], picture: np.ndarray) -> None:
    """Write a uint8 picture [H, W]."""
    from PIL import Image

    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")


def write_gif(path: str | os.PathLike[str], frames: Tensor, seconds: float = 8.0) -> None:
    """Write uint8 frames [F, H, W] as an endless GIF of about `seconds`. It rests on its last frame."""
    import imageio.v3 as imageio

    milliseconds = max(40, round(1000 * seconds / len(frames)))
    durations = [milliseconds] * (len(frames) - 1) + [max(1500, milliseconds)]
    content = imageio.imwrite("<bytes>", frames.numpy(), extension=".gif", duration=durations, loop=0)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)  # imageio itself would print a traceback on a full disk


def write_side_by_side(path: str | os.PathLike[str], panels: list[tuple[str, Tensor]]) -> None:
    """Draw grids of uint8 [N, 1, H, W] beside each other, each under its title."""
    from figures import canvas  # matplotlib is a slow import

    with canvas.figure(path, 4.2 * len(panels), 4.6) as figure:
        for axes, (title, images) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
            axes.imshow(image_grid(images), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            title = title.encode(errors="replace").decode()  # a file's name may hold any bytes,
            axes.set_title(title, fontsize=11, parse_math=False)  # and a $
            axes.set_axis_off()
