"""Pictures of an extraction: true to their numbers, and all of it in the picture."""

from typing import Any, cast

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from memjax.report import _figures
from memjax.report._extraction import (
    PER_PAGE,
    CandidatePicture,
    Curve,
    ScorePanel,
    draw_candidates,
    draw_curves,
    draw_scores,
)
from memjax.report._images import thumbnail
from memjax.report._pictures import Chart, picture_page


def drawn(draw, *arguments):
    with matplotlib.rc_context(cast(Any, _figures._STYLE)):
        figure = draw(*arguments)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    return figure, canvas


def make(k, nearest=True, shape=(8, 8, 1), marked=False, label=None):
    rng = np.random.default_rng(k)
    a, b = (thumbnail(rng.uniform(-1, 1, shape).astype(np.float32)) for _ in range(2))
    return CandidatePicture(label or f"#{k + 1} \u00d720", a, b if nearest else None, marked)


def inside(figure, canvas):
    """All text of the figure lies in it, and no two labels overlap."""
    whole = figure.bbox
    boxes = [t.get_window_extent(canvas.get_renderer()) for t in figure.texts if t.get_text()]
    for box in boxes:
        assert box.x0 >= whole.x0 - 1
        assert box.x1 <= whole.x1 + 1
        assert box.y0 >= whole.y0 - 1
        assert box.y1 <= whole.y1 + 1
    for i, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[:i])


@pytest.mark.parametrize("nearest", [True, False])
@pytest.mark.parametrize("shape", [(8, 8, 1), (6, 12, 3), (20, 5, 1)])
def test_every_candidate_is_shown_beside_its_image(nearest, shape):
    tiles = [make(k, nearest, shape, marked=k == 2, label="#7 " + "w" * 60 * k) for k in range(11)]
    figure, canvas = drawn(draw_candidates, tiles, "a copy")
    shown = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]
    wanted = []
    for tile in tiles:
        wanted.append(tile.image)
        if tile.nearest is not None:
            wanted.append(tile.nearest)
    assert len(shown) == len(wanted)
    for one, other in zip(shown, wanted, strict=True):
        assert np.array_equal(one, other if shape[2] == 3 else other[..., 0])
    framed = [k for k, axes in enumerate(figure.axes) if axes.spines["left"].get_linewidth() > 1]
    assert framed == [4 if nearest else 2]
    assert any("framed: a copy" in text.get_text() for text in figure.texts)
    inside(figure, canvas)


def test_a_page_is_not_longer_than_it_is_legible():
    for nearest, count in PER_PAGE.items():
        label = "#160 \u00d72048"
        figure = draw_candidates([make(k, nearest, label=label) for k in range(count)], "")
        assert {text.get_text() for text in figure.texts} == {label}
        assert figure.get_size_inches()[1] < 8.5


def test_scores_stand_where_they_belong():
    rng = np.random.default_rng(0)
    bands = ["0 to 0.5", "0.5 to 1"]
    scores = {}
    for name in ("AMS", "UMS"):
        low = rng.uniform(0, 5, (2, 5))
        low[1, 4] = 90
        scores[name] = {
            band: np.stack([low[k] + 1, low[k], low[k] + 3], axis=1) for k, band in enumerate(bands)
        }
    ticks = ["0", "1", "2", "4", "8"]
    small = {name: {b: v / 50 for b, v in of.items()} for name, of in scores.items()}
    panels = [ScorePanel("guided", ticks, small), ScorePanel("fixed points", ticks, scores)]
    figure, canvas = drawn(draw_scores, panels, "weight")
    assert len(figure.axes) == 4
    given = [(panel, name) for panel in panels for name in ("AMS", "UMS")]
    for axes, (panel, name) in zip(figure.axes, given, strict=True):
        values = panel.scores[name]
        assert axes.get_title(loc="left").startswith(name)
        for bars, band in zip(axes.containers, bands, strict=True):
            line, _, (segments,) = bars
            np.testing.assert_allclose(line.get_ydata(), values[band][:, 0])
            ends = np.array([segment[:, 1] for segment in segments.get_segments()])
            np.testing.assert_allclose(ends, values[band][:, 1:])
        assert [text.get_text() for text in axes.get_xticklabels()] == ticks
        assert axes.get_ylim()[0] == 0
        assert axes.get_ylim()[1] > max(value.max() for value in values.values())
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == bands
    box = legend.get_window_extent(canvas.get_renderer())
    assert figure.bbox.y0 <= box.y0 < box.y1 < figure.axes[2].get_window_extent().y0


@pytest.mark.parametrize("count", [1, 2, 5])
def test_curves_are_those_given(count):
    size = np.array([1, 4, 16])
    value = [np.array([1.0, 2.0, 3.0]) * (k + 1) for k in range(count)]
    curves = [
        Curve(f"set {k}", size, v, v - 0.5, v + 0.5, dashed=k >= count / 2)
        for k, v in enumerate(value)
    ]
    figure, _ = drawn(draw_curves, curves)
    (axes,) = figure.axes
    for line, v, k in zip(axes.lines, value, range(count), strict=True):
        assert np.array_equal(line.get_xdata(), size)
        assert np.array_equal(line.get_ydata(), v)
        assert line.get_label() == f"set {k}"
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == count


def test_charts_stand_before_the_pictures():
    chart = Chart(b"png", "A <b>title</b>", "How to read it.")
    html = picture_page("extract", "What?", "Lede.", {}, [], "Candidates", [], [chart]).decode()
    assert html.index('id="charts"') < html.index('id="figures"')
    assert "A &lt;b&gt;title&lt;/b&gt;." in html
    assert html.count("data:image/png") == 1
    assert 'id="charts"' not in picture_page("extract", "What?", "", {}, [], "", []).decode()
