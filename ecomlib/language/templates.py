"""Generated short texts: wordings with slots, from a small grammar that is read from plain text (chapter "Language
applications")."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

SLOT = re.compile(r"\{(\w+)\}")


def parse(block: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """{name: (text, wordings)} of a block of entries.

    An entry is a line ``# name``, an optional line ``= text``, and lines of wordings with ``|`` between them.
    """
    entries = {}
    for entry in block.strip().split("# ")[1:]:
        name, *lines = (line.strip() for line in entry.strip().splitlines())
        text = " ".join(line[2:] for line in lines if line.startswith("= "))
        wordings = [w.strip() for line in lines if not line.startswith("= ") for w in line.split("|")]
        entries[name] = (text, tuple(w for w in wordings if w))
    return entries


def fill(wording: str, slots: Mapping[str, Sequence[str]], generator: np.random.Generator) -> str:
    """``wording`` with every ``{slot}`` replaced by one of its words, drawn anew at each place."""
    return SLOT.sub(lambda match: str(generator.choice(slots[match[1]])), wording)


def typo(text: str, generator: np.random.Generator) -> str:
    """``text`` with one slip of the keyboard inside a word: a letter left out, doubled, or swapped with the next."""
    places = [i for i in range(1, len(text) - 1) if text[i - 1 : i + 2].isalpha()]
    if not places:
        return text
    i, kind = int(generator.choice(places)), int(generator.integers(3))
    middle = ("", text[i] * 2, text[i + 1] + text[i])[kind]
    return text[:i] + middle + text[i + 1 + (kind == 2) :]
