"""However many rows were audited, the page opens: at most 10 MB, built in a minute."""

import time

import pytest

from memjax.report import build_report


@pytest.mark.parametrize(
    ("rows", "size", "channels"),
    [
        (10, 8, 1),
        (1_000, 256, 3),
        pytest.param(1_000_000, 8, 1, marks=pytest.mark.slow),
    ],
)
def test_size_and_time(write, tmp_path, rows, size, channels):
    folder = write(
        tmp_path, rows=rows, size=size, channels=channels, failed=rows // 10,
        calibration=("duplication", "membership"),
    )  # fmt: skip
    start = time.perf_counter()
    report = build_report(folder)
    assert time.perf_counter() - start < 60.0
    assert report.stat().st_size <= 10_000_000
