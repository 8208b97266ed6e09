"""``memjax detectors``: what an audit can look at, and what that takes."""

from rich import box
from rich.table import Table

from memjax.cli.app import COMPLETED, cli, console

SIZES = (64, 3072)
"""Numbers in an image for which the cost is shown: a digit, a small photograph."""


@cli.command()
def detectors() -> int:
    """List the detectors by name: what each looks at, what it needs, what it costs.

    'memjax audit --detector NAME' runs one at its level: the noise in standard deviations of the
    data. NAME@LEVEL runs it at another. NAME_over_baseline subtracts half of the same under
    --baseline, NAME_over_null the same without the condition, and NAME_over_blurred half of the
    same at the blurred image.

    Products are those with the network, forward or with its Jacobian, for an image of 64 (3072)
    numbers. Detectors that need the same ones share them.
    """
    from memjax.auditing.plan import DEFAULT_DETECTORS, DETECTORS, SAMPLE_DETECTORS, find_kind
    from memjax.detect.plan import cost, requirements
    from memjax.detect.sample_distance import SampleDetector

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("name", "looks at", "level", "needs", *(f"products ({d})" for d in SIZES)):
        right = title == "level" or title.startswith("products")
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    for name in dict.fromkeys((*DEFAULT_DETECTORS, *DETECTORS, *SAMPLE_DETECTORS)):
        shown = f"{name} *" if name in DEFAULT_DETECTORS else name
        kind = find_kind(name)
        detector = kind.make() if kind.level is None else kind.make(1.0)
        if isinstance(detector, SampleDetector):
            table.add_row(shown, detector.statement, "", "samples", "0", "0")
            continue
        needed = requirements((detector,), SIZES[0])._asdict()
        needs = ", ".join(what for what, wanted in needed.items() if wanted)
        products = (f"{cost((detector,), d).total:,}" for d in SIZES)
        table.add_row(shown, detector.statement, f"{kind.level:g}", needs, *products)
    console.print(table)
    console.print("* what an audit runs, as far as it can, unless told otherwise; the first ranks")
    return COMPLETED
