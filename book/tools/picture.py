"""Take the README's picture from a chapter: python book/tools/picture.py FIGURE

FIGURE is the name of a figure in a chapter's cell metadata (mystnb.figure.name), such as fig-adaptation.
"""

from __future__ import annotations

import base64
import sys

import images
from notebooks import ROOT, chapters, read

PICTURE = ROOT / "book" / "picture.png"


def figures() -> dict[str, str]:
    """Every named figure stored in a chapter, as base64 of a PNG."""
    found = {}
    for path in chapters():
        for cell in read(path).cells:
            name = cell.metadata.get("mystnb", {}).get("figure", {}).get("name")
            stored = [data for _, data in images.stored(cell.get("outputs", []))]
            if name and stored:
                found[name] = stored[0]
    return found


if __name__ == "__main__":
    known = figures()
    if len(sys.argv) != 2 or sys.argv[1] not in known:
        sys.exit(f"name one of: {', '.join(known) or '(no chapter stores a named figure)'}")
    PICTURE.write_bytes(base64.b64decode(known[sys.argv[1]]))
    print(PICTURE.relative_to(ROOT))
