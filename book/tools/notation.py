"""Symbols in formulas: which commands and letters a formula uses, and which of them nobody defined."""

from __future__ import annotations

import re
from functools import cache

from notebooks import ROOT

# Words inside a formula: their letters are no symbols.
WORDS = (
    r"\\(?:text(?:rm|it|bf)?|math(?:rm|sf|tt)|operatorname\*?|mbox|label|tag\*?|begin|end|hspace|color)\s*\{[^{}]*\}"
)
ALPHABETS = (
    r"\\(mathcal|mathbb|mathbf|mathfrak|mathscr|boldsymbol)\s*(?:\{\s*(\\?[A-Za-z]+)\s*\}|(\\[A-Za-z]+|[A-Za-z]))"
)
GREEK = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi pi varpi rho varrho "
    "sigma varsigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega "
    "ell nabla partial".split()
)


@cache
def standard_commands() -> frozenset[str]:
    """Every name MathJax's own file has as a key: a superset of its commands, and no macro of ours."""
    script = (ROOT / "book" / "mathjax" / "tex-svg-full.js").read_text(encoding="utf-8")
    return frozenset(re.findall(r'[{,]"?(?:\\\\)?([A-Za-z]+)"?:', script))


def commands(formula: str) -> set[str]:
    """Names of the control words of a formula, without the backslash."""
    return set(re.findall(r"\\([A-Za-z]+)", formula))


def symbols(formula: str) -> set[str]:
    """What stands for a quantity: letters, Greek letters, and letters of a special alphabet, as LaTeX."""
    formula = re.sub(WORDS, " ", formula)
    found = set()

    def special(match):
        found.add(f"\\{match[1]}{{{match[2] or match[3]}}}")
        return " "

    formula = re.sub(ALPHABETS, special, formula)
    found |= {f"\\{name}" for name in commands(formula) & GREEK}
    return found | set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", " ", formula)))


def defined_symbols(entries: list[dict]) -> set[str]:
    """What the notation file explains."""
    return set().union(*(symbols(e["symbol"]) | symbols(e.get("example", "")) for e in entries))


def undefined(formula: str, entries: list[dict]) -> set[str]:
    """Commands that are neither MathJax's nor a macro of the notation file, and symbols that file does not explain."""
    macros = {e["macro"].lstrip("\\") for e in entries if e.get("macro")}
    unknown = {f"\\{name}" for name in commands(formula) - standard_commands() - macros}
    return unknown | (symbols(formula) - defined_symbols(entries))
