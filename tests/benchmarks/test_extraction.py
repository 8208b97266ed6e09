"""The benches of extraction: multiples and their intervals, and the controls of SIDE."""

import math

import numpy as np


def test_multiples_are_geometric_means_with_the_wider_interval(load):
    shared = load("_extraction")
    even = shared.multiple_of([((4.0, 0.4), (2.0, 0.0))] * 3)
    assert even["value"] == 2
    half = 1.96 * 0.1 / math.sqrt(3)  # sampling alone: the seeds agree
    np.testing.assert_allclose(
        even["interval"], [2 * math.exp(-half), 2 * math.exp(half)], rtol=5e-3
    )
    apart = shared.multiple_of([((x, 0.0), (1.0, 0.0)) for x in (1.0, 2.0, 4.0)])
    assert apart["value"] == 2
    half = 4.303 * math.log(2) / math.sqrt(3)  # Student's t, two degrees of freedom
    np.testing.assert_allclose(
        apart["interval"], [2 * math.exp(-half), 2 * math.exp(half)], rtol=5e-3
    )
    assert shared.multiple_of([((0.0, 1.0), (1.0, 0.0))])["value"] is None


def test_what_a_pool_gives_away(load):
    shared = load("_extraction")
    images = 5 * np.eye(6, dtype=np.float32).reshape(6, 2, 3, 1)
    bed = shared.Digits(None, None, images, images[:3], None, np.array([8, 8, 1]), images[3:])
    samples = np.concatenate([images[[0, 0, 0, 1, 3]] + 0.1, np.zeros((3, 2, 3, 1), np.float32)])
    found = shared.give_away(bed, samples)
    assert (found.hits.tolist(), found.pool) == ([3, 1, 0], 8)
    assert shared.share_matched(found)[0] == 0.5
    assert shared.count_distinct(found, 8)[0] == 2
    row = shared.summary_row("any", "scoring", [bed], [found], [found], 8, 35.0)
    assert row["reached by the pool"] == {"x1": [[0, 1]], "x8": [[2, 2]]}


def test_resampling_is_uniform_over_clusters_not_samples(load):
    side = load("_side")
    rng = np.random.default_rng(0)
    centers = np.repeat([[9.0, 0.0], [0.0, 9.0]], (90, 10), axis=0)
    pool = (centers + 0.1 * rng.standard_normal((100, 2))).astype(np.float32)
    drawn = side._resampled(None, pool, 2, 1000)
    share = float(np.mean(drawn[:, 0] > drawn[:, 1]))
    assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(1000)


def test_edges_forget_the_tone_and_are_compared_with_held_out_images(load):
    side = load("_side")
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (12, 8, 8, 1)).astype(np.float32)
    np.testing.assert_allclose(side._edges(images + 0.5), side._edges(images), atol=1e-6)
    digits = load("_extraction").Digits(
        None, None, images, images[:6], None, np.full(6, 8), images[6:]
    )
    samples = np.concatenate([0.5 * images[:2] + 0.3, rng.uniform(-1, 1, (2, 8, 8, 1))])
    row = side._by_edges("any", [digits], [samples.astype(np.float32)])
    assert row["matched"] == [0.5]
    assert row["distinct"] == [2]


def test_table_in_the_layout_of_the_paper(load):
    shared, bench = load("_extraction"), load("extraction")
    images = 5 * np.eye(8, dtype=np.float32).reshape(8, 2, 4, 1)
    images = np.concatenate([images, -images, 2 * images, -2 * images, 3 * images, -3 * images])
    images = np.concatenate([images, images + 20])
    bed = shared.Digits(None, None, images, images, None, np.ones(96), images)
    samples = np.concatenate([images[[0, 0, 1]], np.full((1, 2, 4, 1), 9.0, np.float32)])
    rows = shared.band_rows("any", [bed], [samples])
    text = bench.paper_table({"rows": rows}).splitlines()
    assert text[0].startswith("| | low AMS | low UMS | middle AMS | middle UMS | high AMS |")
    cells = [cell.strip() for cell in text[2].split("|")[1:-1]]
    assert cells[0] == "any"
    assert cells[5:] == ["75.00", "50.00", "0.00"]


def test_figure_from_rows(load, tmp_path):
    curve = {"samples": [16, 64], "value": [1, 2], "low": [0.5, 1], "high": [2, 3]}
    attractors = {"method": "attractors", "radius": [0.5, 0.9], "is training image": [1, 0]}
    bed = {
        "case": "extraction/wide",
        "status": "ok",
        "parameters": {"samples": 64},
        "rows": [{"method": "curve: unguided"} | curve, attractors],
    }
    sweep = {"method": "sweep: all noise levels", "ams": [0.1, 0.2], "ums": [0.1, 0.1]}
    found = {"method": "SIDE", "seeds": "scoring", "distinct": [5, 6], "matched": [0.1, 0.2]}
    side = {
        "case": "extraction/side",
        "status": "ok",
        "parameters": {"samples": 64},
        "rows": [found, sweep | {"weight": 0.0}, sweep | {"weight": 2.0}],
    }
    bench = load("extraction")
    for records in ([bed], [bed, side]):
        bench.figure(records).savefig(tmp_path / "figure")
