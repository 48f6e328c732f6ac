import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("statsmodels")

from lightning_faast.evaluation.palette import MARKS, THEMES, style  # noqa: E402
from lightning_faast.evaluation.plots import apart, figures, write_figures  # noqa: E402
from lightning_faast.evaluation.records import Record  # noqa: E402
from lightning_faast.evaluation.summary import Comparison  # noqa: E402


@pytest.fixture(scope="module")
def drawn(compared):
    return figures(compared)


def line(axes, method, figure):
    """The line of a method, by its color."""
    color = THEMES["light"].accent if method == "faast" else None
    return next(found for found in axes.lines if found.get_color() == color and len(found.get_xdata()) > 2)


def test_accuracy_against_time_shows_the_entries(drawn, compared):
    (axes,) = drawn["accuracy_time"].axes
    own = [entry for entry in compared.entries if entry.method == "faast"]
    found = line(axes, "faast", drawn)
    assert list(found.get_xdata()) == [entry.seconds for entry in own]
    assert list(found.get_ydata()) == pytest.approx([100 * entry.accuracy.value for entry in own])
    assert axes.get_xscale() == "log"
    assert {text.get_text() for text in axes.texts} == set(compared.methods)


def test_shots_are_ticks_and_all_is_the_last(drawn):
    (axes,) = drawn["accuracy_shots"].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["4", "16", "64", "all"]
    assert list(axes.get_xticks()) == [2, 4, 6, 8]


def test_the_choice_is_marked_on_the_path(drawn, compared):
    (axes,) = drawn["regularization_path"].axes
    marked = [found.get_xdata()[0] for found in axes.lines if len(found.get_xdata()) == 1]
    assert marked == [entry.path.chosen for entry in compared.entries if entry.path]


def test_reliability_leaves_sparse_bins_out(drawn, compared):
    axes, _ = drawn["reliability"].axes
    bins = [b for b in compared.entry("faast", None).bins if b.count >= 10]
    assert list(line(axes, "faast", drawn).get_xdata()) == pytest.approx([100 * b.confidence for b in bins])


def test_what_is_not_known_is_not_drawn():
    records = [Record("faast", None, 0, "done", test_rows=9, accuracy=0.5, bytes_to_update=0)]
    assert set(figures(Comparison(records, [None], "faast"))) == {"accuracy_shots"}
    failed = Comparison([Record("faast", None, 0, "failed", "why")], [None], "faast")
    assert figures(failed) == {}


def test_names_are_no_formulas_and_settings_stay(tmp_path):
    records = [
        Record(m, None, 0, "done", test_rows=9, accuracy=0.5, bytes_to_update=9)
        for m in ("faast", "$\\broken{", "</text><script>alert(1)</script>")
    ]
    before = dict(matplotlib.rcParams)
    written = write_figures(Comparison(records, [None] * 3, "faast"), tmp_path)
    assert dict(matplotlib.rcParams) == before
    for path in written:
        if path.suffix == ".svg":
            root = ElementTree.parse(path).getroot()
            assert not [node for node in root.iter() if node.tag.endswith("script")]
            assert "$\\broken{" in [node.text for node in root.iter() if node.tag.endswith("text")]
        else:
            assert path.read_bytes().startswith(b"\x89PNG")


def test_many_methods_get_a_legend():
    records = [
        Record(f"m{i}", shots, 0, "done", test_rows=99, accuracy=0.5 + i / 40, bytes_to_update=9 + i)
        for i in range(12)
        for shots in (1, None)
    ]
    figure = figures(Comparison(records, [None] * 24, "m0"))["accuracy_memory"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"m{i}" for i in range(12)]


def test_apart_keeps_the_gap_and_the_bounds():
    heights = apart([1.0, 1.1, 1.2, 9.5, 9.6], 1.0, low=0.0, high=10.0)
    assert all(b - a >= 1 - 1e-9 for a, b in pairwise(heights))
    assert min(heights) >= 0
    assert max(heights) <= 10 + 1e-9


def contrast(a, b):
    """Of two ``#rrggbb``, as WCAG 2 defines it."""

    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", THEMES)
def test_colors_can_be_read(name):
    theme = THEMES[name]
    for color in (theme.ink, theme.muted, theme.accent, theme.warning, *theme.series):  # names are written in them
        assert contrast(color, theme.ground) >= 4.5
    for text, ground in (
        (theme.accent, theme.tint),
        (theme.warning, theme.warning_tint),
        (theme.muted, theme.raised),
        (theme.accent, theme.raised),
    ):
        assert contrast(text, ground) >= 4.5


def test_35_methods_look_different():
    looks = [style(place) for place in range(len(THEMES["light"].series) * len(MARKS))]
    assert len(set(looks)) == len(looks) == 35
