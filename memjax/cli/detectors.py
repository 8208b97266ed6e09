"""``memjax detectors``: what an audit can look at, and what that takes."""

from rich import box
from rich.table import Table

from memjax.cli.app import COMPLETED, cli, console


@cli.command()
def detectors() -> int:
    """List the detectors by name: what each looks at, what it needs, what it costs.

    'memjax audit --detector NAME' runs one, at its level: the noise in standard deviations of the
    data. NAME@LEVEL runs it at another. Products are those with the network for an image of d
    numbers; detectors that need the same ones share them.
    """
    from memjax.auditing.plan import DEFAULT_DETECTORS, DETECTORS, SAMPLE_DETECTORS

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("name", "looks at", "level", "needs", "products"):
        table.add_column(title, no_wrap=title in ("name", "level"))
    for name in dict.fromkeys((*DEFAULT_DETECTORS, *DETECTORS, *SAMPLE_DETECTORS)):
        shown = f"{name} *" if name in DEFAULT_DETECTORS else name
        if name in SAMPLE_DETECTORS:
            table.add_row(shown, SAMPLE_DETECTORS[name].statement, "", "samples", "none")
            continue
        kind = DETECTORS[name]
        table.add_row(shown, kind.statement, f"{kind.default_level:g}", *_demands(kind))
    console.print(table)
    console.print("* what an audit runs unless told otherwise; the first of them ranks")
    return COMPLETED


def _demands(kind: type) -> tuple[str, str]:
    """What a detector needs beside the model, and its products as a formula in d."""
    from memjax.detect.plan import cost, requirements

    detector = (kind(1.0),)
    low, high = 1024, 2048  # sizes of pictures, where every cost is affine in d
    needed = requirements(detector, high)
    names = [name for name, wanted in needed._asdict().items() if wanted]
    terms = []
    for unit, a, b in zip(
        ("forward", "jvp", "vjp"), cost(detector, low), cost(detector, high), strict=True
    ):
        slope = (b - a) / (high - low)
        parts = [f"{slope:g} d".removeprefix("1 ")] if slope else []
        rest = a - slope * low
        if rest:
            parts.append(f"{rest:g}")
        if parts:
            terms.append(f"{' + '.join(parts)} {unit}")
    return ", ".join(names), ", ".join(terms)
