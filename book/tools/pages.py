"""What can be told of the built pages without a browser: remote addresses, dead links, images without description."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup
from notebooks import ROOT

HTML = ROOT / "_build" / "html"
LOADS = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "video": "src",
         "audio": "src", "object": "data", "embed": "src", "image": "href", "use": "href"}  # fmt: skip
"""Elements that make a browser fetch something, and the attribute that says what."""


def built_pages(html: Path = HTML) -> list[Path]:
    """Every page of the site; not the parts that scripts and themes bring along."""
    return sorted(p for p in html.rglob("*.html") if "_static" not in p.relative_to(html).parts)


@cache
def soup(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def remote_loads(page: BeautifulSoup) -> list[str]:
    """Addresses of other hosts that opening the page would ask. Links that wait for a click are none."""
    found = []
    for tag, attribute in LOADS.items():
        for element in page.find_all(tag):
            address = element.get(attribute) or ""
            if re.match(r"(https?:)?//", address.strip()) and "canonical" not in (element.get("rel") or []):
                found.append(f"<{tag}> {address}")
    for element in page.find_all(["script", "style"]):
        if not element.get("src"):
            found += [
                f"<{element.name}> {m}"
                for m in re.findall(r"(?:import|url)\s*\(?\s*['\"]?(https?:[^'\")\s]+)", element.text)
            ]
    return found


def undescribed_images(page: BeautifulSoup) -> list[str]:
    """Images of the text whose alternative text is missing or empty, and of the frame where it is missing."""
    main = page.find("article") or page
    empty = [i for i in main.find_all("img") if not (i.get("alt") or "").strip()]
    return [str(i)[:120] for i in page.find_all("img") if i.get("alt") is None or i in empty]


def raw_math(page: BeautifulSoup) -> list[str]:
    """Dollar signs of formulas that no one recognised as math."""
    main = BeautifulSoup(str(page.find("article") or page), "html.parser")
    for element in main.select(".math, pre, code, script, style"):
        element.decompose()
    return re.findall(r".{0,40}(?:\$\$|\\begin\{|\\\(|\\\[).{0,40}", main.get_text(" "))


def _anchors(path: Path) -> set[str]:
    page = soup(path)
    return {e["id"] for e in page.find_all(id=True)} | {e["name"] for e in page.find_all("a", attrs={"name": True})}


_anchors = cache(_anchors)


def dead_links(path: Path, html: Path = HTML) -> list[str]:
    """Links and files of a page that lead nowhere inside the site."""
    found, page = [], soup(path)
    addresses = [e["href"] for e in page.find_all(["a", "link"], href=True)]
    addresses += [e["src"] for e in page.find_all(src=True)]
    for address in addresses:
        parts = urlsplit(address)
        if parts.scheme or parts.netloc or address in ("", "#"):
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        if target.is_dir():
            target /= "index.html"
        if not target.is_relative_to(html.resolve()) and target != path:
            found.append(f"{address}: outside the site")
        elif not target.exists():
            found.append(f"{address}: no such file")
        elif parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in _anchors(target):
            found.append(f"{address}: no such anchor")
    return found
