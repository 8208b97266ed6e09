"""Whatever stands in a name, it is text: it adds no element and no attribute to the page."""

import json

import html5lib
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memjax._core.text import one_line
from memjax.report import build_report
from memjax.report._folder import read_audit
from memjax.report._page import render_page

ATTACKS = [
    # Elements and handlers.
    "<script>alert(1)</script>",
    "<ScRiPt/src=//e.example/x.js></sCrIpT>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>",
    "<math><mtext></form><form><mglyph><style></math><img src onerror=alert(1)>",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<body onload=alert(1)>",
    "<details open ontoggle=alert(1)>",
    "<a href=javascript:alert(1)>x</a>",
    "<form action=javascript:alert(1)><button>x",
    "<meta http-equiv=refresh content='0;url=//e.example'>",
    "<base href=//e.example/>",
    "<link rel=stylesheet href=//e.example/x.css>",
    "<object data=//e.example/x.swf></object><embed src=//e.example>",
    "<template><script>alert(1)</script></template>",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
    "<textarea><plaintext><xmp><title><select><table>",
    "</bdi></h1></header></body></html><h1>outside</h1>",
    "<!-- <!--> --!> <![CDATA[ ]]> <?php ?> <!DOCTYPE html>",
    # Attributes, URLs, styles, templates, formulas.
    "onmouseover=alert(1) autofocus tabindex=1 style=color:red x=",
    "javascript:alert(1)//",
    "data:text/html,<script>alert(1)</script>",
    "</style><style>*{display:none}",
    "}*{background:url(//e.example/x)}@import '//e.example/x.css';",
    "{{ 7*7 }} {% for x in range(9) %}x{% endfor %} {# comment #}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "${7*7} #{7*7} <%= 7*7 %> %s %(x)s {0}",
    '=HYPERLINK("//e.example","x") $\\frac{1}{0}$ \\input{/etc/passwd}',
    "../../../../etc/passwd\\..\\..\\windows",
    # Encodings and characters.
    "&lt;script&gt; &amp;lt; &#60;script&#62; &#x3c; &nbsp &copy",
    "+ADw-script+AD4-alert(1)+ADw-/script+AD4-",
    "\u00bcscript\u00bealert(1)\u00bc/script\u00be \uff1cscript\uff1e",
    "<scr\x00ipt>alert(1)</scr\x00ipt>\x00",
    "\x1b[2J\x1b]0;title\x07\x08\x7f\x85 \ud800 \udfff \ufffe \uffff \U0010ffff \ue000",
    "\u202etxt.exe\u202c \u2066\u2067\u2068\u2069 \u200b\u200d\ufeff \u2028\u2029",
    "Z\u0351\u036b\u0343\u036a\u0302" * 60,
    "<" * 3000 + "b" * 200_000,
    "\n\r\t\v\f line\nbreaks\r\n",
    "NaN",
]
CONTEXTS = ["{}", "\"'`> {}", "--></title></style></script> {}", "\\\" {} \\'", "]]> x='{}' {}"]
PAYLOADS = [context.replace("{}", attack) for attack in ATTACKS for context in CONTEXTS]


def hostile(write, folder, text):
    """An audit folder in which every string that is not a key of the format is ``text``."""
    write(
        folder,
        rows=8,
        failed=2,
        gallery=2,
        detectors=2,
        calibration=("membership",),
        text=lambda _: clean(text),
    )
    manifest = json.loads((folder / "manifest.json").read_text())
    for key in ("memjax", "created", "seed"):
        manifest[key] = text
    manifest["model"] |= {"sha256": text, "event_shape": [text]}
    manifest["data"] |= {"sha256": text, "status_counts": {text: text}}
    manifest["versions"] = {text + "1": text, "x": [text]}
    manifest["seconds"] = {text + "1": 1.0}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["stored"]["by_multiplicity"] = {text + "1": [1, 2]}
    metrics["flags"][1] |= {"meaning": text, "detector": text}
    metrics["contrasts"][0]["detector"] = text
    (folder / "metrics.json").write_text(json.dumps(metrics))
    table = pq.read_table(folder / "table.parquet").drop_columns(["multiplicity"])
    status = [label if label == "ok" else "label" + clean(text) for label in
              table["status"].to_pylist()]  # fmt: skip
    label = ["label" + clean(text)] * 8
    for name, values in (("status", status), ("split", label), ("reason", label)):
        index = table.column_names.index(name)
        table = table.set_column(index, name, pa.array(values))
    pq.write_table(table, folder / "table.parquet")
    return folder


def clean(text: str) -> str:
    """Arrow's strings are UTF-8, which has no surrogates."""
    return text.encode("utf-8", "replace").decode("utf-8")


def page(folder) -> bytes:
    return render_page(
        read_audit(folder),
        ["data:image/png;base64,AA=="] * 2,
        ["data:image/png;base64,AA=="] * 2,
        dict.fromkeys(("ranking", "distribution", "metrics"), "data:image/png;base64,AA=="),
    )


def structure(document):
    """Every element with its attributes, in order: what a browser acts on."""
    return [
        (node.tag, sorted(node.attrib.items()))
        for node in document.iter()
        if isinstance(node.tag, str)
    ]


def parse(content: bytes):
    return html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(
        content.decode("utf-8")
    )


def test_there_are_enough_payloads():
    assert len(set(PAYLOADS)) == 200


@pytest.mark.parametrize("part", range(10))
def test_payloads_are_text(write, tmp_path, part):
    expected = structure(parse(page(hostile(write, tmp_path / "plain", "plain"))))
    for index, payload in enumerate(PAYLOADS[part::10]):
        content = page(hostile(write, tmp_path / str(index), payload))
        document = parse(content)
        assert structure(document) == expected, payload[:80]
        assert len(content) < 200_000
        # It is shown, not dropped: the first rank's name reads as the payload on one line.
        name = document.find(".//ul[@class='cards']//bdi")
        assert name.text == (one_line(clean(payload), limit=80) or "\u2013")


@pytest.mark.parametrize("index", [0, 25, 100, 145, 170, 175, 180, 185, 195])
def test_figures_draw_payloads_as_text(write, tmp_path, index):
    folder = hostile(write, tmp_path, PAYLOADS[index])
    report = build_report(folder)
    parse(report.read_bytes())
    assert {path.name for path in folder.iterdir()} == {
        "manifest.json", "metrics.json", "table.parquet", "gallery.npz", "figures", "report.html",
    }  # fmt: skip
