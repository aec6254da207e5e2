"""What nbval does not look at: chapters stored complete, in order, normalised, described, and small."""

import base64
import copy
import io
import json

import images
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import yaml
from notebooks import LARGEST, ROOT, chapters, normalise, problems, read, reference_platform
from PIL import Image

from ecomlib import plotting

CHAPTERS = chapters()


def documents_in_contents() -> list[str]:
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    return [contents["root"], *(chapter["file"] for part in contents["parts"] for chapter in part["chapters"])]


def test_there_are_chapters_and_all_are_in_the_book():
    assert CHAPTERS, "no notebook found below chapters/"
    listed = documents_in_contents()
    assert len(set(listed)) == len(listed)
    for name in listed:
        assert any((ROOT / f"{name}{ending}").exists() for ending in (".md", ".ipynb")), f"{name} does not exist"
    files = {
        p.relative_to(ROOT).with_suffix("").as_posix() for e in ("md", "ipynb") for p in ROOT.glob(f"chapters/**/*.{e}")
    }
    assert {f for f in files if ".ipynb_checkpoints" not in f} == set(listed)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_stored_chapter(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert not problems(notebook)
    assert path.stat().st_size <= LARGEST, f"{path.stat().st_size} bytes: fewer or smaller figures"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_storing_again_changes_nothing(path):
    notebook = normalise(read(path))
    assert nbformat.writes(notebook).rstrip("\n") == path.read_text(encoding="utf-8").rstrip("\n")


def test_run_times_are_recorded_for_these_chapters():
    record = json.loads((ROOT / "book" / "run_times.json").read_text(encoding="utf-8"))
    names = {p.relative_to(ROOT).with_suffix("").as_posix() for p in CHAPTERS}
    assert set(record["seconds"]) == names, "run `make run-times`"
    assert all(0 < seconds <= 90 for seconds in record["seconds"].values()), "a chapter may take 90 s"


@pytest.fixture
def small():
    """A notebook with nothing to object to: a figure and a printed line."""
    figure = {"mystnb": {"image": {"alt": "a line that rises from left to right"}}}
    shown = nbformat.v4.new_output("display_data", {"image/png": drawing([0, 1, 2])})
    printed = nbformat.v4.new_output("stream", name="stdout", text="1\n")
    cells = [
        nbformat.v4.new_markdown_cell("# Title"),
        nbformat.v4.new_code_cell("plot()", execution_count=1, outputs=[shown], metadata=figure),
        nbformat.v4.new_code_cell("print(1)", execution_count=2, outputs=[printed]),
    ]
    return normalise(nbformat.v4.new_notebook(cells=cells))


def drawing(heights) -> str:
    figure, axes = plt.subplots(figsize=(5, 3))
    axes.plot(heights)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    plt.close(figure)
    return base64.b64encode(file.getvalue()).decode()


def strip(notebook):
    for cell in notebook.cells[1:]:
        cell.outputs, cell.execution_count = [], None


def set_tag(tag):
    def change(notebook):
        notebook.cells[1].metadata["tags"] = [tag]

    return change


def set_metadata(notebook):
    notebook.cells[2].metadata["collapsed"] = True


def set_python(notebook):
    notebook.metadata["language_info"]["version"] = "3.11.7"


def forget_alt(notebook):
    notebook.cells[1].metadata["mystnb"]["image"]["alt"] = "plot"


def add_warning(notebook):
    notebook.cells[2].outputs[0]["name"] = "stderr"


def end_with_semicolon(notebook):
    notebook.cells[2].source += ";"


def swap(notebook):
    notebook.cells[1:] = notebook.cells[:0:-1]


@pytest.mark.parametrize(
    "change, problem",
    [
        (strip, "execution counts"),
        (swap, "execution counts"),
        (set_metadata, "not normalised"),
        (set_python, "not normalised"),
        (forget_alt, "alternative text"),
        (add_warning, "stderr"),
        (end_with_semicolon, "trailing"),
        (set_tag("nbval-skip"), "hides"),
        (set_tag("nbval-ignore-output"), "without a comment"),
    ],
)
def test_bad_chapters_are_found(small, change, problem):
    assert not problems(small)
    change(small)
    assert any(problem in found for found in problems(small)), problems(small)


def test_a_relaxed_comparison_needs_its_reason(small):
    set_tag("nbval-ignore-output")(small)
    small.cells[1].source = "# nbval: the wall time differs from run to run\n" + small.cells[1].source
    assert not problems(small)


def test_swapped_missing_and_changed_figures_are_found(small):
    stored = small.cells[1].outputs
    assert images.difference(stored, copy.deepcopy(stored)) is None
    for heights in ([2, 1, 0], [0, 2, 1]):
        other = [nbformat.v4.new_output("display_data", {"image/png": drawing(heights)})]
        assert "looks different" in images.difference(stored, other)
    assert "number or kind" in images.difference(stored, [])
    glued = [nbformat.v4.new_output("display_data", {images.MIMES[1]: drawing([2, 1, 0])})]
    assert "looks different" in images.difference(glued, [{"data": {images.MIMES[1]: drawing([0, 1, 2])}}])


def house_style(*curves) -> str:
    """A figure as chapters draw it: (who, name) of a low curve, then of a high one."""
    with plt.rc_context():
        plotting.use_style()
        _, axes = plt.subplots()
        days = np.arange(1, 15)
        for (who, name), y in zip(curves, (0.2 + 0.3 * np.log(days), 0.5 + 0.2 * np.log(days)), strict=True):
            plotting.curve(axes, days, y, who=who, name=name)
        plotting.label_ends(axes)
        file = io.BytesIO()
        axes.figure.savefig(file, format="png")
        plt.close(axes.figure)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    "pair", [("greedy", "thompson"), ("thompson", "reinforce"), ("greedy", "epsilon")], ids="-".join
)
def test_exchanged_curves_are_found(pair):
    """Their colours differ by little in grey: with the names kept it is the colours that tell."""
    one, other = pair
    figure = house_style((one, "one"), (other, "other"))
    assert images.alike(figure, house_style((one, "one"), (other, "other")))
    assert not images.alike(figure, house_style((other, "one"), (one, "other")))
    assert not images.alike(figure, house_style((other, "other"), (one, "one")))


def test_noise_and_a_shift_by_one_pixel_are_tolerated():
    figure = house_style(("greedy", "one"), ("thompson", "other"))
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(figure))).convert("RGB"), dtype=float)
    noise = np.random.default_rng(0).normal(0.0, 2.55, pixels.shape)
    for other in (pixels + noise, np.roll(pixels, 1, axis=0), np.roll(pixels, 1, axis=1)):
        file = io.BytesIO()
        Image.fromarray(other.clip(0, 255).astype(np.uint8)).save(file, format="png")
        assert images.alike(figure, base64.b64encode(file.getvalue()).decode())


def test_reference_platform():
    assert reference_platform("Linux", "x86_64") and reference_platform("Linux", "AMD64")
    assert not reference_platform("Darwin", "arm64") and not reference_platform("Linux", "aarch64")
