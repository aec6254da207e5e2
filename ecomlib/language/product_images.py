"""Generated product pictures, for a model that looks at products as well as reads (chapter "More than text").

No wheel holds photographs of the panel's products under a permissive licence, so the pictures are drawn by a rule and
everything that uses them says so.

================================  ========================  ====================================================
What a picture shows              Drawn from                Also said by
================================  ========================  ====================================================
form: box, bag, can, ...          words of text and size    the text
colour of the brand               brand, product id         the text, as store or national brand
sticker: on promotion this week   the promotion             the data feed, where it is complete; never the text
place, shade, speckles            product id                nothing, and it means nothing
================================  ========================  ====================================================

Category, department, price and tier are not in a picture.
"""

from __future__ import annotations

import colorsys

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray

from .. import noise
from ..families.base import require, whole

FORMS = {
    "can": "can cans canned cn soup soups tuna",
    "bottle": "l liter gallon ga pt qt milliliter btl bottle juice drink drinks liquid",
    "bag": "pound bag bags bagged",
    "pack": "count pack packs sq ft dz doz rolls",
}
"""Form -> words of description or size that mean it; the first form with a word wins, without one it is a box."""
BOX = "box"
PICTURE = 105
"""Stream of ``noise`` that places and speckles a picture."""
PAPER, STORE, RIM, STICKER = (0.93, 0.93, 0.91), (0.16, 0.36, 0.62), (0.85, 0.10, 0.10), (1.0, 0.9, 0.1)
"""Colours, as red, green and blue in 0..1: background, the store's own brand, rim and middle of the sticker."""


def forms(products: pd.DataFrame) -> list[str]:
    """The form of each product's package, from its words: "can", "bottle", "bag", "pack" or "box"."""
    words = (products["description"].astype(str) + " " + products["size"].astype(str)).str.lower().str.split()
    known = {form: set(own.split()) for form, own in FORMS.items()}
    return [next((form for form, own in known.items() if own & set(row)), BOX) for row in words]


def product_images(
    products: pd.DataFrame, promoted: ArrayLike = False, size: int = 16, seed: int = 0
) -> NDArray[np.float32]:
    """(products, 3, size, size) generated pictures, red, green and blue in 0..1.

    ``products`` has the columns product (id), description, size and brand; ``promoted`` is a bool, or (products,) of
    them. A picture depends on its own row, on ``seed`` and on nothing else: the promoted picture of a product is its
    usual one under a sticker. Raises ValueError where ``size`` is outside 8..64 or a shape does not fit.
    """
    require(whole(size, 8, 64), "size", size, "a whole number from 8 to 64")
    promoted, count = np.asarray(promoted, bool), len(products)
    require(promoted.shape in ((), (count,)), "promoted", promoted.shape, f"one flag, or one for each of {count}")
    ids = torch.tensor(products["product"].to_numpy(np.int64))
    draws = noise.uniform(
        seed, ids, torch.zeros(1, dtype=torch.int64), 0, 0, PICTURE, 7 + 3 * size * size, torch.float64
    )[:, 0].numpy()
    place, speckles = draws[:, :7], draws[:, 7:].reshape(count, 3, size, size)
    grid = (np.arange(size) + 0.5) / size
    x = grid[None, None, :] - 0.5 - 0.12 * (place[:, 0, None, None] - 0.5)  # from the middle of the package
    y = grid[None, :, None] - 0.55 - 0.12 * (place[:, 1, None, None] - 0.5)
    ink = _package(np.array(forms(products)), x, y, 0.85 + 0.3 * place[:, 2, None, None])
    shade = _colours(products["brand"].astype(str).to_numpy(), place)[:, :, None, None]
    picture = np.where(ink[:, None], shade, np.array(PAPER)[:, None, None])
    label = ink & (np.abs(y) < 0.07)
    picture = np.where(label[:, None], 0.5 + 0.5 * picture, picture)
    centre = 0.25 + 0.5 * place[:, 5, None, None], 0.2 + 0.25 * place[:, 6, None, None]
    distance = np.hypot(grid[None, None, :] - centre[0], grid[None, :, None] - centre[1])
    seen = np.broadcast_to(promoted, (count,))[:, None, None]
    picture = np.where((seen & (distance < 0.19))[:, None], np.array(RIM)[:, None, None], picture)
    picture = np.where((seen & (distance < 0.11))[:, None], np.array(STICKER)[:, None, None], picture)
    return np.clip(picture + 0.3 * (speckles - 0.5), 0, 1).astype(np.float32)


def _package(form: NDArray, x: NDArray, y: NDArray, scale: NDArray) -> NDArray[np.bool_]:
    """(products, size, size) where the package is, from places (x, y) relative to its middle."""
    x, y = np.broadcast_arrays(x / scale, y / scale)
    inside = lambda width, low, high: (np.abs(x) < width) & (y > low) & (y < high)
    drawn = {
        "can": inside(0.19, -0.22, 0.22),
        "bottle": inside(0.15, -0.12, 0.36) | inside(0.06, -0.36, 0.0),
        "bag": (np.abs(x) < 0.2 + 0.25 * y) & (y > -0.3) & (y < 0.32),
        "pack": inside(0.34, -0.16, 0.2) & (np.abs(x) > 0.04),
        BOX: inside(0.27, -0.33, 0.33),
    }
    return np.select([form[:, None, None] == name for name in drawn], list(drawn.values()))


def _colours(brand: NDArray, place: NDArray) -> NDArray[np.float64]:
    """(products, 3): the store's own brand has one colour, national brands each their own."""
    own = np.array([colorsys.hsv_to_rgb(hue, 0.75, 0.45 + 0.5 * value) for hue, value in place[:, 3:5]])
    return np.where((brand == "store brand")[:, None], np.array(STORE) + 0.1 * (place[:, 4:5] - 0.5), own)
