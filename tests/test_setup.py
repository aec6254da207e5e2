"""What a newcomer meets first is true: README, lock, metadata, make targets; and the tree is clean."""

import ast
import base64
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import diagrams
import images
import pytest
import yaml
from notebooks import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from picture import figures

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def tracked() -> list[Path]:
    """Files of the repository; of an unpacked archive, those that are not built or installed."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        return [p for p in map(ROOT.joinpath, listed.stdout.splitlines()) if p.exists()]
    skipped = {".venv", "_build", "__pycache__", ".pytest_cache", ".ruff_cache"}
    return [p for p in ROOT.rglob("*") if p.is_file() and not skipped & set(p.relative_to(ROOT).parts)]


# ----------------------------------------------------------------------------------------------------- README


def test_readme_example_prints_what_it_says(tmp_path):
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    said = re.search(r"```python\n.*?```\s+```text\n(.*?)```", README, re.S)[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == said


def test_readme_links_lead_somewhere_and_name_every_chapter():
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if "://" not in link]
    assert not [link for link in links if not (ROOT / link).exists()]
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    for part in contents["parts"]:
        for chapter in part["chapters"]:
            assert any(link.rsplit(".", 1)[0] == chapter["file"] for link in links), chapter


def test_readme_picture_is_a_figure_of_the_book():
    picture = re.search(r"!\[(.+?)\]\((.+?)\)", README)
    assert len(picture[1].split()) >= 4
    shown = base64.b64encode((ROOT / picture[2]).read_bytes()).decode()
    assert any(images.alike(shown, figure) for figure in figures().values()), (
        "run python book/tools/picture.py FIGURE: the README shows a figure that no chapter stores"
    )


# ------------------------------------------------------------------------------------------------------- lock


def lock() -> dict[str, str]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines if line and not line.startswith("#")]
    assert all(pins), "requirements.txt holds only comments and name==version, without local versions"
    return {canonicalize_name(pin[1]): pin[2] for pin in pins}


def test_the_lock_comes_with_torch_first_and_is_what_is_installed():
    pins = lock()
    assert next(iter(pins)) == "torch"
    installed = {}
    for name in pins:
        try:
            installed[name] = version(name).split("+")[0]
        except PackageNotFoundError:
            installed[name] = None
    assert installed == pins, "the environment is not that of requirements.txt: run `make book`"


def test_the_lock_is_complete():
    pins, missing = lock(), set()
    for name in pins:
        for requirement in map(Requirement, requires(name) or []):
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            of_cuda = name == "torch" and re.match("nvidia|triton|cuda", requirement.name)  # pinned by torch itself
            if wanted and not of_cuda and canonicalize_name(requirement.name) not in pins:
                missing.add(f"{requirement.name} (of {name})")
    assert not missing


def test_the_library_declares_what_it_imports_and_the_lock_is_within_its_ranges():
    """What an extra brings is imported where it is used, inside a function, or in the part that is the extra."""
    pins = lock()
    extras = [
        r for name in ("export", "serve", "track", "gym", "language") for r in PROJECT["optional-dependencies"][name]
    ]
    declared = {canonicalize_name(Requirement(r).name) for r in PROJECT["dependencies"]}
    for requirement in map(Requirement, [*PROJECT["dependencies"], *extras]):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
    needed, optional = set(), set()
    for path in (ROOT / "ecomlib").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        needed |= imported([] if {"serving", "gym", "language"} & {path.parent.name, path.stem} else tree.body)
        optional |= imported(ast.walk(tree))
    assert needed, "the library was not found"
    assert needed <= declared
    assert optional <= declared | {canonicalize_name(Requirement(r).name) for r in extras}


def imported(nodes):
    """Other distributions that these nodes import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    names = names - set(sys.stdlib_module_names) - {"ecomlib"}
    return {canonicalize_name({"sklearn": "scikit-learn"}.get(name, name)) for name in names}


def test_versions_agree():
    import ecomlib

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert ecomlib.__version__ == PROJECT["version"] == citation["version"]
    assert "\n## Unreleased\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------- commands, hygiene


def test_help_lists_every_target():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.search(r"^\.PHONY: (.*)$", text, re.M)[1].split())
    said = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^make ([\w-]+)", said, re.M)) == targets - {"help"}


@pytest.fixture
def elsewhere(tmp_path):
    """A folder with the Makefile, built a moment ago from next to nothing: returns a function that runs make there."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    names = ["requirements.txt", "pyproject.toml", "_config.yml", "_toc.yml", ".venv/.installed"]
    names += ["chapters/one.md", "chapters/with a space.md", "ecomlib/old.py", "book/old.bib", "book/_ext/old.py"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for path in tmp_path.rglob("*"):
        os.utime(path, (1e9, 1e9))
    (tmp_path / "_build").mkdir()
    (tmp_path / "_build" / ".built").touch()
    os.utime(tmp_path / "_build" / ".built", (1.1e9, 1.1e9))
    outer = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "PYTHON"))}

    def make(*arguments, **environment):
        command = ["make", *arguments]
        return subprocess.run(command, cwd=tmp_path, env={**outer, **environment}, capture_output=True, text=True)

    return make


@pytest.mark.parametrize("name", ["chapters/one.md", "ecomlib/old.py", "book/old.bib", "book/_ext/old.py"])
def test_make_builds_again_only_after_a_change(elsewhere, tmp_path, name):
    assert elsewhere("-q", "_build/.built").returncode == 0
    (tmp_path / name).unlink()
    assert elsewhere("-q", "_build/.built").returncode == 1


def test_make_lets_no_other_packages_in(elsewhere, tmp_path):
    (tmp_path / "show.mk").write_text("show:\n\t@env\n")
    said = elsewhere("-f", "Makefile", "-f", "show.mk", "show", PYTHONPATH="other", PYTHONHOME="other").stdout
    assert set(re.findall(r"^PYTHON\w+=.*", said, re.M)) == {"PYTHONNOUSERSITE=1"}


def test_make_mends_an_environment_whose_creation_was_interrupted(elsewhere, tmp_path):
    """Its Python is there and pip is not; a stand-in for Python creates what `python -m venv` would."""
    (tmp_path / ".venv" / ".installed").unlink()
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir()
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\n[ "$2" = venv ] || exit 0\nprintf "#!/bin/sh\\n" >.venv/bin/pip; chmod +x .venv/bin/pip\n'
    )
    python.chmod(0o755)
    shutil.copy(python, binaries / "python")
    ran = elsewhere(".venv/.installed", f"PYTHON={python}")
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / ".venv" / ".installed").exists()


def test_chapters_import_this_library():
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", "import ecomlib; print(ecomlib.__file__)"]
    ran = subprocess.run(command, cwd=ROOT / "chapters", env=environment, capture_output=True, text=True)
    assert ran.returncode == 0 and ROOT in Path(ran.stdout.strip()).resolve().parents, (
        "this .venv installs ecomlib from elsewhere: delete .venv and run `make book`"
    )


def test_continuous_integration_runs_the_commands_of_the_readme():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = re.findall(r"^make (\w+)", script.read_text(encoding="utf-8"), re.M)
    assert commands == ["browser", "test"]
    assert "set -euo pipefail" in script.read_text(encoding="utf-8")


def test_the_code_is_formatted_and_lint_free():
    for arguments in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *arguments, "--quiet", "."]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr


def test_nothing_names_a_machine_or_a_package_host():
    hosts = ["py" + "pi.org", "python" + "hosted.org", "registry.npm" + "js", "deb.deb" + "ian.org"]
    places = ["/ro" + "ot/", "/ho" + "me/", "/wo" + "rk/", "/t" + "mp/"]
    found = []
    for path in tracked():
        if path.suffix in {".png", ".parquet"} or path.parent.name in {"mathjax", "axe"}:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")  # checkpoints and databases hold text as well
        found += [f"{path.relative_to(ROOT)}: {word}" for word in hosts if word in text]
        found += [f"{path.relative_to(ROOT)}: {word}" for word in places if re.search(rf"(?<![\w.~]){word}", text)]
    assert not found


# --------------------------------------------------------------------------------------------------- diagrams


def test_diagrams_are_drawn_from_their_sources():
    sources = sorted(diagrams.DIAGRAMS.glob("*.mmd"))
    assert sources, "no diagram found"
    for path in sources:
        drawing = path.with_suffix(".svg")
        found = diagrams.problems(path.read_text(encoding="utf-8"), drawing.read_text() if drawing.exists() else None)
        assert not found, (path.name, found)
    assert {p.stem for p in diagrams.DIAGRAMS.glob("*.svg")} == {p.stem for p in sources}


@pytest.mark.parametrize(
    "drawing, problem",
    [
        (None, "missing"),
        ("<svg><title>t</title><desc>d</desc></svg>\n<!-- mermaid:0123456789abcdef -->", "older"),
        ("<svg></svg>\n<!-- mermaid:{} -->", "no title"),
        ("<svg><title>t</title><desc>d</desc><foreignObject/></svg>\n<!-- mermaid:{} -->", "foreignObject"),
        ("<svg><title>t</title><desc>d</desc><image href=\"https://a.b/c.png\"/></svg>\n<!-- mermaid:{} -->", "remote"),
    ],
)  # fmt: skip
def test_bad_drawings_are_found(drawing, problem):
    source = "flowchart LR\n  A --> B\n"
    drawing = drawing and drawing.replace("{}", diagrams.digest(source))
    assert any(problem in found for found in diagrams.problems(source, drawing))
