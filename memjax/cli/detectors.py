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
    data. NAME@LEVEL runs it at another. NAME_over_difficulty subtracts what images as difficult
    have, from 50 images on, NAME_over_blurred half of the same at the blurred image,
    NAME_over_baseline half of the same under --baseline, and NAME_over_null the same without the
    condition.

    Products are those with the network, forward or with its Jacobian, for an image of 64 (3072)
    numbers. Detectors that need the same ones share them.
    """
    from memjax.auditing.plan import (
        DEFAULT_DETECTORS,
        DETECTORS,
        RANKING,
        SAMPLE_DETECTORS,
        evaluated,
        find_kind,
    )
    from memjax.detect.plan import cost, requirements
    from memjax.detect.sample_distance import SampleDetector
    from memjax.evaluate.difficulty import SMALLEST_POPULATION

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("name", "looks at", "level", "needs", *(f"products ({d})" for d in SIZES)):
        right = title == "level" or title.startswith("products")
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    for name in dict.fromkeys((*RANKING, *DEFAULT_DETECTORS, *DETECTORS, *SAMPLE_DETECTORS)):
        marks = "+" * (name in RANKING) + "*" * (name in DEFAULT_DETECTORS)
        shown = f"{name} {marks}".rstrip()
        kind = find_kind(name)
        detector = kind.make() if kind.level is None else kind.make(1.0)
        if isinstance(detector, SampleDetector):
            table.add_row(shown, detector.statement, "", "samples", "0", "0")
            continue
        single = evaluated(detector)
        needed = requirements((single,), SIZES[0])._asdict()
        wanted = [what for what, is_wanted in needed.items() if is_wanted]
        if single is not detector:
            wanted.append(f"{SMALLEST_POPULATION} images")
        products = (f"{cost((single,), d).total:,}" for d in SIZES)
        needs = ", ".join(wanted)
        table.add_row(shown, detector.statement, f"{kind.level:g}", needs, *products)
    console.print(table)
    console.print("unless told otherwise: + the first of these that can run ranks; * run beside it")
    return COMPLETED
