"""The house style: readable, told apart without full colour vision, the same on every machine."""

import itertools

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from ecomlib import plotting

mpl.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

# Machado, Oliveira and Fernandes (2009), A physiologically-based model for simulation of color vision
# deficiency, IEEE Transactions on Visualization and Computer Graphics 15(6), severity 1.0; acting on linear
# RGB.
VISION = {
    "full": np.eye(3),
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
}
# IEC 61966-2-1: linear sRGB to CIE XYZ, white D65.
TO_XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
WHITE = [0.9505, 1.0, 1.0890]


def linear_rgb(colour):
    rgb = np.array(to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def contrast_on_white(colour):
    return 1.05 / (linear_rgb(colour) @ [0.2126, 0.7152, 0.0722] + 0.05)


def lab(linear):
    """CIELAB coordinates, in which a distance of 10 is seen at a glance."""
    ratio = np.array(TO_XYZ) @ np.clip(linear, 0, 1) / WHITE
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.fixture
def ax():
    plotting.use_style()
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


@pytest.mark.parametrize("who", plotting.LOOKS)
def test_colours_stand_out_from_white(who):
    """WCAG 2.1, criterion 1.4.11 (graphics, 3 : 1) for lines, 1.4.3 (text, 4.5 : 1) for their names."""
    assert contrast_on_white(plotting.COLOURS[who]) >= 3
    assert contrast_on_white(plotting.text_colour(plotting.COLOURS[who])) >= 4.5
    assert contrast_on_white(plotting.INK) >= 12


@pytest.mark.parametrize("vision", VISION)
def test_colours_are_told_apart(vision):
    seen = {who: lab(np.array(VISION[vision]) @ linear_rgb(colour)) for who, colour in plotting.COLOURS.items()}
    for a, b in itertools.combinations(seen, 2):
        assert np.linalg.norm(seen[a] - seen[b]) >= 12, (a, b)


def test_the_measure_of_distance_knows_a_bad_pair():
    """Guard of the test above: a red and a green collapse for a deuteranope."""
    red, green = (lab(np.array(VISION["deuteranopia"]) @ linear_rgb(colour)) for colour in ("#c04040", "#108020"))
    assert np.linalg.norm(lab(linear_rgb("#c04040")) - lab(linear_rgb("#108020"))) > 40
    assert np.linalg.norm(red - green) < 12


def test_colour_is_never_the_only_cue():
    cues = [(look.line, look.marker) for look in plotting.LOOKS.values()]
    assert len(set(cues)) == len(cues)
    assert len({look.name for look in plotting.LOOKS.values()}) == len(plotting.LOOKS)


def test_style_is_set_whatever_was_set_before():
    mpl.rcParams.update({"font.size": 30, "figure.facecolor": "black", "axes.xmargin": 0.3, "path.simplify": False})
    plotting.use_style()
    rc = mpl.rcParams
    assert rc["figure.facecolor"] == rc["savefig.facecolor"] == "white"
    assert rc["figure.dpi"] == rc["savefig.dpi"] == 110
    assert rc["path.simplify"] is True
    assert rc["font.family"] == ["DejaVu Sans"]
    sizes = [
        "font.size",
        "axes.labelsize",
        "axes.titlesize",
        "xtick.labelsize",
        "ytick.labelsize",
        "legend.fontsize",
    ]
    assert min(rc[key] for key in sizes) >= 9
    assert [entry["color"] for entry in rc["axes.prop_cycle"]][0] == plotting.COLOURS["reinforce"]


def test_pictures_are_deterministic():
    def picture():
        plotting.use_style()
        figure, ax = plt.subplots()
        plotting.curve(ax, range(4), [0, 0.5, 0.8, 0.9], [0, 0.4, 0.7, 0.8], [0, 0.6, 0.9, 1.0], who="thompson")
        plotting.score_axes(ax, "episode")
        plotting.label_ends(ax)
        figure.canvas.draw()
        pixels = np.asarray(figure.canvas.buffer_rgba()).copy()
        plt.close(figure)
        return pixels

    first = picture()
    assert np.array_equal(first, picture())
    assert (first[0, 0] == 255).all()  # the face is white and opaque


def test_curve_draws_line_and_band(ax):
    line = plotting.curve(ax, [1, 2, 3], [0.1, 0.2, 0.3], [0.0, 0.1, 0.2], [0.2, 0.3, 0.4], who="greedy")
    assert line.get_color() == plotting.COLOURS["greedy"]
    assert line.get_marker() == "s"
    assert line.get_label() == "greedy Bayes"
    (band,) = ax.collections
    assert band.get_datalim(ax.transData).extents == pytest.approx((1, 0.0, 3, 0.4))
    assert plotting.curve(ax, [1, 2], [0, 1], who="data", name="weeks", markersize=9).get_markersize() == 9
    assert plotting.curve(ax, [1, 2], [0, 1], name="").get_label().startswith("_")


def test_every_data_point_is_drawn(ax):
    points = np.arange(50)
    assert plotting.curve(ax, points, points, who="data").get_markevery() == 1
    assert plotting.curve(ax, points, points, who="thompson").get_markevery() == 5


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"x": [1, 2], "y": [1, 2], "who": "maml?"}, "who must be one of .*, got 'maml\\?'"),
        ({"x": [1, 2], "y": [1, 2, 3]}, r"got shapes \(2,\) and \(3,\)"),
        ({"x": [1, 2], "y": [1, 2], "low": [0, 1]}, "low and high must be given together"),
        ({"x": [1, 2], "y": [1, 2], "low": [0], "high": [2, 3]}, r"the shape of x, \(2,\)"),
    ],
)
def test_curve_refuses(ax, arguments, message):
    with pytest.raises(ValueError, match=message):
        plotting.curve(ax, **arguments)


def test_score_axes_mark_blind_and_oracle(ax):
    plotting.score_axes(ax, "selling days")
    assert [(line.get_label(), line.get_ydata()[0]) for line in ax.get_lines()] == [
        ("blind", 0.0),
        ("oracle", 1.0),
    ]
    assert all(line.is_dashed() for line in ax.get_lines())
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("selling days", "score")


def test_end_labels_keep_their_order_and_do_not_touch(ax):
    plotting.score_axes(ax)
    for who, end in (("thompson", 0.93), ("greedy", 0.95), ("epsilon", 0.94), ("reinforce", -0.02)):
        plotting.curve(ax, [0, 1], [0, end], who=who)
    plotting.curve(ax, [0, 1], [0, 0.5], name="")
    labels = plotting.label_ends(ax)
    ax.figure.canvas.draw()
    assert [label.get_text() for label in labels] == [
        "REINFORCE", "blind", "Thompson", "epsilon-greedy", "greedy Bayes", "oracle",
    ]  # fmt: skip
    boxes = [label.get_window_extent() for label in labels]
    assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(boxes))
    assert all(box.x0 >= ax.get_window_extent().x1 for box in boxes)
    assert labels[2].get_color() == plotting.text_colour(plotting.COLOURS["thompson"])


def test_labels_move_no_further_than_needed():
    assert plotting._spread([0.1, 0.5, 0.9], 0.2) == pytest.approx([0.1, 0.5, 0.9])
    # Two labels at the same height part symmetrically; the third is pushed along with them.
    assert plotting._spread([0.5, 0.5], 0.2) == pytest.approx([0.4, 0.6])
    assert plotting._spread([0.5, 0.5, 0.65], 0.1) == pytest.approx([0.45, 0.55, 0.65])
