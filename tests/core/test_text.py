import csv
import io

import pytest

from memjax._core.text import neutralize_csv_cell, one_line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain", "plain"),
        ("  a\tb\r\nc\u2028d  ", "a b c d"),
        ("nul\x00 bell\x07 escape\x1b[31m", "nul bell escape[31m"),
        ("\u202egnp.exe\u202c", "gnp.exe"),
        ("zero\u200bwidth\ufeff", "zerowidth"),
        ("undecodable \udcff", "undecodable \ufffd"),
        ("grüße 日本 🙂", "grüße 日本 🙂"),
        ("", ""),
    ],
)
def test_one_line(text, line):
    assert one_line(text) == line
    one_line(text).encode("utf-8")


@pytest.mark.parametrize("limit", [1, 5, 500])
@pytest.mark.parametrize("length", [0, 1, 4, 5, 6, 499, 500, 501, 10_000_000])
def test_one_line_length(limit, length):
    line = one_line("x" * length, limit=limit)
    assert len(line) == min(limit, length)
    assert line.endswith("\u2026") == (length > limit)


def test_one_line_names_what_a_long_blank_hides():
    # All that fits into the look-ahead is dropped; the reader still sees that there was more.
    assert one_line("\x00" * 10_000 + "end", limit=10) == "\u2026"


@pytest.mark.parametrize(
    "text",
    ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "=cmd|' /C calc'!A0", "-", "+",
     "-2+3+cmd|' /C calc'!A0", "\uff1d1+1", "\uff20x", "--1", "-1e", "+.", "-1_000", "-\u0661"],
)  # fmt: skip
def test_formulas_are_neutralized(text):
    assert neutralize_csv_cell(text) == "'" + text


@pytest.mark.parametrize(
    "text",
    ["", "plain", "a=b", "x-1", "1", "-1", "+1", "-1.5e-3", "+.5", "-3.", "-inf", "+inf", "-nan",
     "nan", "'=1"],
)  # fmt: skip
def test_numbers_and_text_are_untouched(text):
    assert neutralize_csv_cell(text) == text


def test_neutralized_cells_survive_a_csv_writer():
    cells = ["=1,2", '=A"B', "plain", "-1"]
    buffer = io.StringIO()
    csv.writer(buffer).writerow([neutralize_csv_cell(cell) for cell in cells])
    (row,) = csv.reader(io.StringIO(buffer.getvalue()))
    assert row == ["'=1,2", "'=A\"B", "plain", "-1"]
