"""Whether two stored figures look the same: tolerant of another machine's antialiasing, not of another curve."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import numpy as np

MIMES = ("image/png", "application/papermill.record/image/png")
"""A shown figure and a glued one."""
BLOCKS = (24, 16)
"""Columns and rows of the colour averages that are compared."""
TOLERANCE = 12.0
"""Levels of 255 in the channel that differs most. One-percent noise and a shift by one pixel stay below 10; in
the house style, two curves exchanged give more than 15, whatever their colours."""
PIXELS = 12
"""Largest difference in width or height: text of another font release is a little wider."""


def stored(outputs: list[dict]) -> Iterator[tuple[str, str]]:
    """Every image of a cell's outputs, as (mime, base64)."""
    for output in outputs:
        for mime in MIMES:
            if mime in output.get("data", {}):
                yield mime, output["data"][mime]


def _blocks(encoded: str) -> tuple[tuple[int, int], np.ndarray]:
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    return image.size, np.asarray(image.resize(BLOCKS, Image.Resampling.BOX), dtype=float)


def alike(first: str, second: str) -> bool:
    """About the same size, and all but 1 % of the blocks within ``TOLERANCE`` in red, green and blue."""
    (size, blocks), (other_size, other) = _blocks(first), _blocks(second)
    near = max(abs(a - b) for a, b in zip(size, other_size, strict=True)) <= PIXELS
    return bool(near and np.percentile(np.abs(blocks - other).max(axis=-1), 99) <= TOLERANCE)


def difference(stored_outputs: list[dict], fresh_outputs: list[dict]) -> str | None:
    """What differs between the images of a stored and a fresh cell; None when they look alike."""
    old, new = list(stored(stored_outputs)), list(stored(fresh_outputs))
    if [mime for mime, _ in old] != [mime for mime, _ in new]:
        return f"images differ in number or kind: stored {len(old)}, fresh {len(new)}"
    for i, ((_, a), (_, b)) in enumerate(zip(old, new, strict=True)):
        if not alike(a, b):
            return f"image {i} of the cell looks different from the stored one"
    return None
