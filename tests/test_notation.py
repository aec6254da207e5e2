"""One source of notation: every symbol of every formula is in book/notation.yml, and all it has is used."""

import re

import bookext
import pytest
from markdown_text import documents, split
from notation import commands, defined_symbols, standard_commands, symbols, undefined
from notebooks import ROOT

ENTRIES = bookext.read_notation()


def formulas() -> dict[str, list[str]]:
    found = {name: split(text).math for name, text in documents().items()}
    assert any(found.values()), "no formula found"
    return found


def test_every_symbol_of_a_formula_is_explained():
    problems = []
    for name, math in formulas().items():
        for formula in math:
            if missing := undefined(formula, ENTRIES):
                problems.append(f"{name}: {sorted(missing)} in {' '.join(formula.split())[:80]}")
    assert not problems, "not in book/notation.yml:\n" + "\n".join(problems)


def test_every_macro_and_symbol_is_used():
    math = [formula for formulas in formulas().values() for formula in formulas]
    used_commands = set().union(*map(commands, math))
    used_symbols = set().union(*map(symbols, math))
    unused = []
    for entry in ENTRIES:
        macro = entry.get("macro", "").lstrip("\\")
        if macro in used_commands:
            continue
        shown = symbols(entry.get("example") or entry["symbol"])
        if macro or not shown <= used_symbols:
            unused.append(macro or entry["symbol"])
    assert not unused, f"book/notation.yml explains what no chapter uses: {unused}"


def test_every_group_has_its_table_on_the_page():
    shown = re.findall(r"^:group: (.*)$", (ROOT / "chapters/appendix/notation.md").read_text(encoding="utf-8"), re.M)
    assert sorted(shown) == sorted({entry.get("group", "general") for entry in ENTRIES})


def test_macros_are_new_names_and_symbols_are_explained_once():
    names = [e["macro"].lstrip("\\") for e in ENTRIES if e.get("macro")]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch("[A-Za-z]+", name) for name in names)
    shown = [(e.get("group"), e.get("example") or e["symbol"]) for e in ENTRIES]
    assert len(set(shown)) == len(shown)


def test_macros_reach_mathjax_in_its_form():
    entries = [
        {"symbol": r"\mathbb{E}", "macro": "E", "meaning": "m"},
        {"symbol": r"\hat{#1}", "macro": r"\est", "arguments": 1, "example": r"\est{\theta}", "meaning": "m"},
        {"symbol": r"\theta", "meaning": "m"},
    ]
    assert bookext.macros(entries) == {"E": r"\mathbb{E}", "est": [r"\hat{#1}", 1]}
    assert defined_symbols(entries) == {r"\mathbb{E}", r"\theta"}


@pytest.mark.parametrize(
    "formula, missing",
    [
        (r"\E_{\theta}[\text{profit of x}]", set()),
        (r"\E[\phi]", {r"\phi"}),
        (r"\argmaxx \theta", {r"\argmaxx"}),
        (r"\mathcal{T} \sim \mathbb E", {r"\mathcal{T}"}),
        (r"\begin{aligned} \frac{1}{2} \left( \theta \right) &\coloneqq \operatorname{var} \end{aligned}", set()),
        (r"r + \mathrm{Var}", {"r"}),
    ],
)
def test_undefined_symbols_are_found(formula, missing):
    entries = [{"symbol": r"\mathbb{E}", "macro": "E", "meaning": "m"}, {"symbol": r"\theta", "meaning": "m"}]
    assert undefined(formula, entries) == missing


def test_standard_commands_are_those_of_the_shipped_mathjax():
    known = standard_commands()
    assert {"frac", "sum", "mathbb", "theta", "lVert", "operatorname", "boldsymbol", "mid", "le", "sqrt"} <= known
    assert not known & {"argmaxx", "E", "undefinedmacro"}


def test_a_bad_notation_entry_is_named(tmp_path):
    file = tmp_path / "notation.yml"
    assert bookext.read_notation(file) == []
    for text, word in (("- {symbol: x, meaning: y, colour: z}", "colour"), ("- {symbol: x}", "meaning")):
        file.write_text(text)
        with pytest.raises(ValueError, match=word):
            bookext.read_notation(file)
