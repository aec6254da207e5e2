"""Draw book/diagrams/*.mmd as SVG: python book/tools/diagrams.py

Readers and builds use the committed drawings, so neither needs a browser or a network. Each drawing ends with a
digest of its source, by which a test finds a stale one. Drawing needs npm (for mermaid) and a Chromium.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DIAGRAMS = ROOT / "book" / "diagrams"
MERMAID = "11.17.2"
SETTINGS = """{startOnLoad: false, theme: 'base', htmlLabels: false, flowchart: {htmlLabels: false, padding: 12},
  fontFamily: 'Helvetica, Arial, sans-serif', deterministicIds: true, deterministicIDSeed: 'book',
  themeVariables: {background: '#ffffff', primaryColor: '#e8f0fe', primaryBorderColor: '#0b57c2',
    primaryTextColor: '#1a1a1a', lineColor: '#444444', secondaryColor: '#fff4d6', tertiaryColor: '#f4f4f4',
    fontSize: '15px'}}"""


def digest(source: str) -> str:
    """What marks a drawing as made from this source by this version of mermaid with these settings."""
    return hashlib.sha256(f"{MERMAID}\n{SETTINGS}\n{source}".encode()).hexdigest()[:16]


def problems(source: str, drawing: str | None) -> list[str]:
    """Why a drawing can't be published: missing, stale, without title and description, or with a remote address."""
    if drawing is None or f"<!-- mermaid:{digest(source)} -->" not in drawing:
        return ["missing or older than its source: run `make diagrams`"]
    found = []
    if "<title" not in drawing or "<desc" not in drawing:
        found.append("no title or description: put accTitle: and accDescr: into the source")
    if "<foreignObject" in drawing:
        found.append("foreignObject: browsers do not draw it in an image")
    if re.search(r"(href|src)=\"https?:|url\(https?:|@import", drawing):
        found.append("names a remote address")
    return found


def finish(svg: str, source: str) -> str:
    """A drawing that stands alone: sized by its view box, on a light ground that dark pages need too."""
    left, top, width, height = map(float, re.search(r'viewBox="([^"]+)"', svg)[1].split())
    svg = re.sub(r'(<svg\b[^>]*?) width="100%"', rf'\1 width="{width:.0f}" height="{height:.0f}"', svg, count=1)
    ground = f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="#ffffff"/>'
    svg = re.sub(r"(<svg\b[^>]*>)", rf"\1{ground}", svg, count=1)
    return f"{svg}\n<!-- mermaid:{digest(source)} -->\n"


def _mermaid() -> str:
    script = ROOT / "_build" / "npm" / "node_modules" / "mermaid" / "dist" / "mermaid.min.js"
    if not script.exists():
        script.parents[3].mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--silent", "--no-save", "--prefix", str(script.parents[3]), f"mermaid@{MERMAID}"]
        try:
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        except FileNotFoundError:
            sys.exit("error: npm was not found; drawing diagrams needs it (Node.js)")
    return script.read_text(encoding="utf-8")


def main() -> int:
    sources = sorted(DIAGRAMS.glob("*.mmd"))
    drawings = {p: p.with_suffix(".svg") for p in sources}
    text = {p: p.read_text(encoding="utf-8") for p in sources}
    stale = [p for p in sources if problems(text[p], drawings[p].read_text() if drawings[p].exists() else None)]
    print(f"{len(sources)} diagrams, {len(stale)} to draw")
    if not stale:
        return 0
    from browser import launch
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = launch(playwright)
        page = browser.new_page()
        page.set_content("<!DOCTYPE html><html><body></body></html>")
        page.add_script_tag(content=_mermaid())
        page.evaluate(f"mermaid.initialize({SETTINGS})")
        for path in stale:
            svg = page.evaluate("async source => (await mermaid.render('diagram', source)).svg", text[path])
            drawings[path].write_text(finish(svg, text[path]), encoding="utf-8")
            print(drawings[path].relative_to(ROOT))
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
