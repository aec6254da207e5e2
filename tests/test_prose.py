"""No result is typed into the text: numbers reach it from the code that computes them, or have a stated reason."""

import re

import pytest
import yaml
from markdown_text import documents, split, typed_numbers
from notebooks import ROOT

ALLOWED = ROOT / "tests" / "prose_allow.yml"


def read_allowed(text: str) -> list[dict]:
    entries = yaml.safe_load(text) or []
    for entry in entries:
        extra = set(entry) - {"file", "text", "pattern", "reason"}
        assert not extra and ("text" in entry) != ("pattern" in entry), f"need file, text or pattern, reason: {entry}"
        assert len(entry.get("reason", "").split()) >= 3, f"say why in words: {entry}"
    return entries


def unexplained(texts: dict[str, str], allowed: list[dict]) -> tuple[list[str], list[dict]]:
    """Numbers no entry covers, with their surroundings, and entries that cover nothing any more."""
    bad, used = [], set()
    for name, text in texts.items():
        prose = split(text).prose
        spans = []
        for i, entry in enumerate(allowed):
            if entry["file"] in ("*", name):
                pattern = entry["pattern"] if "pattern" in entry else re.escape(" ".join(entry["text"].split()))
                spans += [(m.start(), m.end(), i) for m in re.finditer(pattern, prose)]
        for start, end, number in typed_numbers(prose):
            covering = [i for a, b, i in spans if a <= start and end <= b]
            used.update(covering)
            if not covering:
                bad.append(f"{name}: {number!r} in '...{prose[max(0, start - 50) : end + 30]}...'")
    return bad, [entry for i, entry in enumerate(allowed) if i not in used]


def test_no_result_is_typed_into_prose():
    texts = documents()
    assert texts, "no chapters found"
    bad, _ = unexplained(texts, read_allowed(ALLOWED.read_text(encoding="utf-8")))
    assert not bad, "use glue, math or code, or give a reason in tests/prose_allow.yml:\n" + "\n".join(bad)


def test_no_exception_has_become_stale():
    _, stale = unexplained(documents(), read_allowed(ALLOWED.read_text(encoding="utf-8")))
    assert not stale, f"remove from tests/prose_allow.yml: {stale}"


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("The score is 0.82 after 14 days.", ["0.82", "14"]),
        ("A gain of 3 % over 1,200 tasks, 5% more", ["3 %", "1,200", "5%"]),
        ("{glue:text}`../a.ipynb::score:.2f` of the gap, $\\gamma = 0.99$, `lr=0.01`, {cite:t}`x2017`", []),
        ("$$\n x = 0.5 \n$$ (eq-x)\n\nIn 2017, two of 5 shops", []),
        ("```python\nprint(0.5)\n```\n\n```{note}\n:class: tip\nIt earns 17.5 more.\n```", ["17.5"]),
        ("::::{grid} 2\n:::{card}\nfrom 30 to 40\n:::\n::::\n", ["30", "40"]),
        ("## 12. Title 3\n\n11. item, RL2, x86-64, [link 12](http://a.b/99)", ["12"]),
        ("```{prf:theorem} Of 25\n:label: thm-99\nBody $12$\n```", ["25"]),
        ("```{math}\n:label: eq-y\nx = 12.5\n```", []),
        ("a \\$30 note and 2000 shoppers", ["30", "2000"]),
    ],
)
def test_typed_numbers_are_found(text, numbers):
    assert [number for _, _, number in typed_numbers(split(text).prose)] == numbers


def test_an_exception_covers_its_number_only_and_goes_stale():
    entry = {"file": "a.md", "text": "a 95 % interval", "reason": "the level, a convention"}
    assert unexplained({"a.md": "With a 95 %\ninterval."}, [entry]) == ([], [])
    bad, stale = unexplained({"a.md": "It won 95 % of days.", "b.md": "a 95 % interval"}, [entry])
    assert len(bad) == 2 and stale == [entry]
