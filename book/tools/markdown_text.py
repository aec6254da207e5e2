"""The chapters as text: prose, math and labels, without code. What the text tests read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from notebooks import ROOT, read

# Directives whose body is not prose; of any other directive the title and the body are.
NOT_PROSE = {
    "code",
    "code-block",
    "code-cell",
    "sourcecode",
    "literalinclude",
    "eval-rst",
    "toctree",
    "bibliography",
    "glue",
    "glue:figure",
    "glue:math",
    "image",
    "raw",
    "mermaid",
    "notation",
    "run-times",
    "solution-start",
    "exercise-start",
}
FENCE = re.compile(
    r"^\s*(?:>\s*)?(?P<mark>`{3,}|~{3,}|:{3,})\s*(?:\{(?P<name>[\w:.-]+)\}\s*(?P<title>.*)|(?P<info>\S.*)?)$"
)
OPTION = re.compile(r"^\s*:[\w-]+:")
ENVIRONMENT = r"\\begin\{((?:align|aligned|equation|gather|multline|alignat|eqnarray)\*?)\}.*?\\end\{\1\}"


class Parts(NamedTuple):
    """What a chapter's Markdown consists of."""

    prose: str
    """Text a reader reads, math, code, roles and addresses left out."""
    math: list[str]
    """LaTeX of every formula, in order."""


def documents(root: Path = ROOT) -> dict[str, str]:
    """Markdown of every chapter by path; of a notebook its cells, captions and alternative texts, in order."""
    found = {}
    for path in sorted((root / "chapters").rglob("*")):
        if ".ipynb_checkpoints" in path.parts or path.suffix not in (".md", ".ipynb"):
            continue
        if path.suffix == ".md":
            text = path.read_text(encoding="utf-8")
        else:
            text = "\n\n".join(filter(None, map(_cell_text, read(path).cells)))
        found[path.relative_to(root).as_posix()] = text
    return found


def _cell_text(cell) -> str:
    if cell.cell_type == "markdown":
        return cell.source
    shown = cell.metadata.get("mystnb", {})
    return "\n\n".join(
        filter(None, [shown.get("figure", {}).get("caption"), shown.get("image", {}).get("alt")])
        if cell.cell_type == "code"
        else []
    )


def split(text: str) -> Parts:
    """Tell prose from math, and both from the rest."""
    lines, math = _without_fences(text.splitlines())
    text = "\n".join(lines)
    text = re.sub(r"<!--.*?-->", " ", text, flags=re.S)
    text = re.sub(r"^%.*$", " ", text, flags=re.M)
    text = re.sub(r"^\([\w:.-]+\)=\s*$", " ", text, flags=re.M)
    text = re.sub(r"\{math\}`([^`]+)`", lambda m: math.append(m[1]) or " ", text)
    text = re.sub(r"(\{[\w:.+-]+\})?(`+)(?!`)(.+?)(?<!`)\2(?!`)", " ", text, flags=re.S)
    text = re.sub(r"\$\$(.+?)\$\$(\s*\([\w:.-]+\))?", lambda m: math.append(m[1]) or " ", text, flags=re.S)
    text = re.sub(ENVIRONMENT, lambda m: math.append(m[0]) or " ", text, flags=re.S)
    text = re.sub(r"(?<![\\$])\$(?!\s)([^$]+?)(?<![\s\\])\$(?!\d)", lambda m: math.append(m[1]) or " ", text)
    text = re.sub(r"(!?)\[([^\]]*)\]\([^)]*\)", r"\2", text)
    text = re.sub(r"<(https?|mailto):[^>]*>|https?://\S+", " ", text)
    text = re.sub(r"</?[A-Za-z][^>]*>", " ", text)
    text = re.sub(r"^(\s*#+\s+)(\d+(\.\d+)*\.?\s+)", r"\1", text, flags=re.M)
    text = re.sub(r"^(\s*)\d+[.)]\s+", r"\1", text, flags=re.M)
    return Parts(re.sub(r"\s+", " ", text).strip(), math)


def _without_fences(lines: list[str]) -> tuple[list[str], list[str]]:
    """Drop code; keep titles and bodies of directives that hold prose; bodies of math directives are math."""
    kept, math, open_, i = [], [], [], 0
    while i < len(lines):
        fence = FENCE.match(lines[i])
        if fence and open_ and not fence["name"] and not fence["info"]:
            opener = next(
                (m for m in reversed(open_) if m[0] == fence["mark"][0] and len(fence["mark"]) >= len(m)), None
            )
            if opener:
                del open_[open_.index(opener) :]
                i += 1
                continue
        if not fence or (fence["mark"][0] == ":" and not fence["name"]):
            kept.append(lines[i])
            i += 1
            continue
        name, mark, i = fence["name"], fence["mark"], i + 1
        if name and name not in NOT_PROSE and name != "math":
            open_.append(mark)
            kept.append(fence["title"] or "")
            if i < len(lines) and lines[i].strip() == "---":
                i += 1
                while i < len(lines) and lines[i].strip() != "---":
                    i += 1
                i += 1
            while i < len(lines) and OPTION.match(lines[i]):
                i += 1
            continue
        body = []
        while i < len(lines) and not re.match(rf"^\s*(?:>\s*)?{re.escape(mark[0])}{{{len(mark)},}}\s*$", lines[i]):
            body.append(lines[i])
            i += 1
        i += 1
        if name == "math":
            math.append("\n".join(line for line in body if not OPTION.match(line)))
    return kept, math


NUMBER = re.compile(r"(?<![\w.])(?<![A-Za-z0-9]-)\d[\d,]*(?:\.\d+)?(?:\s?%)?")


def typed_numbers(prose: str) -> list[tuple[int, int, str]]:
    """Numbers that could be results: decimals, percentages, and integers from 10 on that are no years.

    Returns (start, end, text) of each. A year is an integer of 1950 to 2035 without separators, 2000 excepted.
    """
    found = []
    for match in NUMBER.finditer(prose):
        text = match[0].rstrip(",")
        value = text.rstrip("% ").replace(",", "")
        plain = value.isdigit() and text == value
        if plain and (int(value) < 10 or (1950 <= int(value) <= 2035 and value != "2000")):
            continue
        if not plain and "." not in value and "%" not in text and int(value) < 10:
            continue
        found.append((match.start(), match.start() + len(text), text))
    return found
