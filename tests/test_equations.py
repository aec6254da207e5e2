"""Every numbered equation names a test that evaluates both of its sides, and that test exists."""

import ast
import re

import pytest
from markdown_text import documents
from notebooks import ROOT

LABEL = re.compile(r"\$\$[ \t]*\((?P<a>[\w:.-]+)\)|^[ \t]*:label:[ \t]*(?P<b>eq[\w:.-]*)[ \t]*$", re.M)
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def functions(source: str) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}


def unchecked(text: str, exists) -> tuple[int, list[str]]:
    """How many labelled equations a chapter has, and what is wrong with the tests named under them."""
    labels = list(LABEL.finditer(text))
    problems = []
    for here, following in zip(labels, [*labels, None][1:]):
        name = here["a"] or here["b"]
        until = text[here.end() : following.start() if following else len(text)]
        named = NAMED.findall(" ".join(re.findall(r"Checked by.*?(?:\n\s*\n|\Z)", until, re.S)))
        if not name.startswith("eq-"):
            problems.append(f"({name}): labels of equations begin with eq-")
        if not named:
            problems.append(f"({name}): no 'Checked by `tests/...py::test_...`' before the next labelled equation")
    problems += [f"{path}::{test} does not exist" for path, test in NAMED.findall(text) if not exists(path, test)]
    return len(labels), problems


def in_repository(path: str, test: str) -> bool:
    file = ROOT / path
    return test.startswith("test_") and file.exists() and test in functions(file.read_text(encoding="utf-8"))


def test_every_numbered_equation_has_its_test():
    count, problems = 0, []
    for name, text in documents().items():
        labels, found = unchecked(text, in_repository)
        count += labels
        problems += [f"{name}: {problem}" for problem in found]
    assert count, "no labelled equation found"
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "text, problem",
    [
        ("$$ a = b $$ (eq-a)\n\nChecked by `tests/t.py::test_a`.", None),
        ("$$ a = b $$ (eq-a)\n\nText.\n\nThat is so. Checked by\n`tests/t.py::test_a` and `tests/t.py::test_b`.", None),
        ("```{math}\n:label: eq-a\na = b\n```\n\nChecked by `tests/t.py::test_a`.", None),
        ("$$ a = b $$ (eq-a)\n\n$$ c = d $$ (eq-c)\n\nChecked by `tests/t.py::test_a`.", "(eq-a): no"),
        ("$$ a = b $$ (eq-a)\n\nSee `tests/t.py::test_a`.", "(eq-a): no"),
        ("$$ a = b $$ (eq-a)\n\nChecked by `tests/t.py::test_gone`.", "test_gone does not exist"),
        ("$$ a = b $$ (bellman)\n\nChecked by `tests/t.py::test_a`.", "begin with eq-"),
    ],
)
def test_missing_tests_are_found(text, problem):
    _, found = unchecked(text, lambda path, test: test in {"test_a", "test_b"})
    assert not found if problem is None else any(problem in f for f in found), found
