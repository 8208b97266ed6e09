"""The page of pictures and tables: what it shows, and that text stays text."""

import html5lib
import numpy as np
import pytest

from memjax.report._images import png
from memjax.report._pictures import MAX_ROWS, PageTable, picture_page

PICTURE = png(np.zeros((2, 2, 1), np.uint8))
ATTACK = "\"'`></title></style></bdi><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7*7 }}"


def page(text="plain", rows=2, pictures=(PICTURE, PICTURE)):
    table = PageTable("A caption", ["row", "stored"], [[f"{text} {i}", "0.5"] for i in range(rows)])
    facts = {"model": text, "seed": 3}
    return picture_page("localize", text, "How to read it.", facts, pictures, "Maps", [table])


def elements(html):
    tree = html5lib.parse(html, namespaceHTMLElements=False)
    return [
        (element.tag, sorted(element.attrib))
        for element in tree.iter()
        if isinstance(element.tag, str)
    ]


def test_it_shows_everything_once():
    html = page().decode()
    assert html.count("data:image/png;base64,") == 2
    for shown in ("How to read it.", "A caption", "plain 1", "stored", "0.5", "<bdi>3</bdi>"):
        assert shown in html
    assert "There is no row to show" in page(pictures=()).decode()


def test_text_adds_no_element():
    assert elements(page(ATTACK)) == elements(page())
    assert "{{ 7*7 }}" in page(ATTACK).decode()


def test_it_loads_nothing_else():
    html = page().decode()
    assert "default-src 'none'; img-src data:; style-src 'sha256-" in html
    assert "<script" not in html
    assert "http" not in html.replace("http-equiv", "")


def test_long_tables_are_cut_and_say_so():
    html = page(rows=MAX_ROWS + 5).decode()
    assert "A caption (5 more rows in table.csv)" in html
    assert f"plain {MAX_ROWS - 1}<" in html
    assert f"plain {MAX_ROWS}<" not in html


@pytest.mark.parametrize("text", ["\ud800", "\x00\x1b[2J", "b" * 100_000])
def test_any_text_is_utf8_and_short(text):
    assert len(page(text)) < 100_000
