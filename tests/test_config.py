"""Jupyter Book takes a misspelt key in silence: here every key of _config.yml has to be known to someone."""

import configparser
import json
import subprocess
import sys
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from notebooks import ROOT


def jupyter_book_defaults() -> dict:
    return yaml.safe_load(files("jupyter_book").joinpath("default_config.yml").read_text(encoding="utf-8"))


LIST_VALUES = """
import io, json, sys
from pathlib import Path
import yaml
from jupyter_book.config import get_final_config
from sphinx.application import Sphinx

folder, config = Path(sys.argv[1]), yaml.safe_load(Path(sys.argv[2]).read_text(encoding="utf-8"))
(folder / "_toc.yml").write_text("format: jb-book\\nroot: index\\n")
(folder / "index.md").write_text("# Title\\n")
final, _ = get_final_config(user_yaml=config, cli_config={"latex_individualpages": False}, sourcedir=folder)
others = [name for name in final["extensions"] if name not in config["sphinx"]["local_extensions"]]
given = {"extensions": others, "external_toc_path": "_toc.yml", "bibtex_bibfiles": []}
quiet = {"status": io.StringIO(), "warning": io.StringIO()}
app = Sphinx(folder, None, folder / "out", folder / "doctrees", "html", confoverrides=given, **quiet)
print(json.dumps(list(app.config.values)))
"""


@pytest.fixture(scope="module")
def sphinx_values(tmp_path_factory) -> set[str]:
    """Every configuration value of Sphinx and of the extensions the book uses, asked of a process of its own."""
    command = [sys.executable, "-c", LIST_VALUES, tmp_path_factory.mktemp("sphinx"), ROOT / "_config.yml"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return set(json.loads(ran.stdout.splitlines()[-1]))


def theme_options() -> set[str]:
    names = set()
    for theme, path in (
        ("sphinx_book_theme", "theme/sphinx_book_theme/theme.conf"),
        ("pydata_sphinx_theme", "theme/pydata_sphinx_theme/theme.conf"),
    ):
        parser = configparser.RawConfigParser()
        parser.read(Path(find_spec(theme).origin).parent / path)
        names |= set(parser["options"])
    return names


def unknown_keys(config: dict, sphinx: set[str], options: set[str]) -> list[str]:
    """Keys that neither Jupyter Book nor Sphinx nor an extension nor the theme reads, with their path."""
    defaults = jupyter_book_defaults()
    defaults["bibtex_bibfiles"] = []
    found = []
    for key, value in config.items():
        if key not in defaults:
            found.append(key)
        elif isinstance(defaults[key], dict) and key != "sphinx":
            for inner, below in (value or {}).items():
                if inner not in defaults[key]:
                    found.append(f"{key}.{inner}")
                elif isinstance(defaults[key][inner], dict):
                    found += [f"{key}.{inner}.{k}" for k in below or {} if k not in defaults[key][inner]]
    given = config.get("sphinx") or {}
    found += [f"sphinx.{key}" for key in given if key not in defaults["sphinx"]]
    for key, value in (given.get("config") or {}).items():
        if key not in sphinx:
            found.append(f"sphinx.config.{key}")
        elif key == "html_theme_options":
            found += [f"sphinx.config.{key}.{k}" for k in value if k not in options]
    return found


def test_every_key_is_known(sphinx_values):
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    assert not unknown_keys(config, sphinx_values, theme_options())


@pytest.mark.parametrize(
    "text, key",
    [
        ("foo_bar: 1", "foo_bar"),
        ("html: {favicon: a.svg, favicom: b.svg}", "html.favicom"),
        ("html: {comments: {hypotesis: true}}", "html.comments.hypotesis"),
        ("execute: {execute_notebook: off}", "execute.execute_notebook"),
        ("sphinx: {extra_extension: []}", "sphinx.extra_extension"),
        ("sphinx: {config: {language: en, mathjax_pth: x}}", "sphinx.config.mathjax_pth"),
        ("sphinx: {config: {html_theme_options: {navbar_persistant: []}}}",
         "sphinx.config.html_theme_options.navbar_persistant"),
    ],
)  # fmt: skip
def test_misspelt_keys_are_found(sphinx_values, text, key):
    assert unknown_keys(yaml.safe_load(text), sphinx_values, theme_options()) == [key]


def test_pages_show_stored_outputs_and_only_what_the_contents_list():
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    assert config["execute"]["execute_notebooks"] == "off"
    assert config["only_build_toc_files"] is True
    extensions = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "book" / "_ext").glob("*.py"))
    assert "config.nb_execution" not in extensions, "an extension overrides _config.yml"
