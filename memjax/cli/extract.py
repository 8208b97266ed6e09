"""``memjax extract``: what comes out of a model that was trained on it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from memjax.cli._choices import check_folder, check_paths, parse_numbers
from memjax.cli._extraction import Result, show, write
from memjax.cli.app import COMPLETED, INCOMPLETE, cli, messages
from memjax.cli.conditions import image_shape, load_model
from memjax.cli.progress import progress_bar

SIDE_ONLY = (
    "weights", "pool", "clusters", "cohesion", "keep", "features", "classifier", "training",
    "window", "limit", "normalize",
)  # fmt: skip


@cli.command()
@click.argument("model", metavar="digits|MODEL_DIR")
@click.option(
    "--data", metavar="PATH", help="The training images, to see what came out: a folder or array."
)
@click.option(
    "--heldout",
    metavar="PATH",
    help="Images that were not trained on: how often matches are wrong.",
)
@click.option("--out", metavar="DIR", help="Output folder (digits: memjax-extract).")
@click.option(
    "--method",
    type=click.Choice(["fixed-points", "side", "both"]),
    default="fixed-points",
    show_default=True,
    help="fixed-points: denoise samples until they stand still. side: guide them towards clusters "
    "of the model's own samples. both: denoise guided samples.",
)
@click.option(
    "--samples",
    type=click.IntRange(1, 1_000_000),
    default=2048,
    show_default=True,
    help="Drawn, of every weight.",
)
@click.option(
    "--level",
    type=click.FloatRange(0, min_open=True),
    help="Noise level of the fixed points in standard deviations of the data [default: 0.125].",
)
@click.option(
    "--steps",
    type=click.IntRange(1, 10_000),
    default=200,
    show_default=True,
    help="Denoising steps allowed on the way to a fixed point.",
)
@click.option(
    "--weights",
    metavar="A,B,...",
    default="0,1,2,4,8",
    show_default=True,
    help="Of the guidance, the paper's lambda; 0 is unguided.",
)
@click.option(
    "--pool",
    type=click.IntRange(2, 1_000_000),
    default=4096,
    show_default=True,
    help="Samples that are clustered, and that a classifier learns from.",
)
@click.option(
    "--clusters",
    type=click.IntRange(2, 100_000),
    default=100,
    show_default=True,
    help="Of k-means.",
)
@click.option(
    "--cohesion",
    type=click.FloatRange(-1, 1),
    default=0.5,
    show_default=True,
    help="Drop clusters with a smaller mean cosine to their center.",
)
@click.option(
    "--keep",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Share of the clusters, the most cohesive, that is kept at most.",
)
@click.option(
    "--features",
    type=click.Choice(["pixels", "latents"]),
    default="pixels",
    show_default=True,
    help="What is clustered; latents are the model's own numbers.",
)
@click.option(
    "--classifier",
    type=click.Choice(["mlp", "resnet", "posterior"]),
    help="Of noised samples: a network that is trained [default: mlp up to 256 numbers a sample, "
    "else resnet], or the pool's exact posterior, for a --window above its samples' distances.",
)
@click.option(
    "--training",
    type=click.IntRange(1, 10_000_000),
    default=4000,
    show_default=True,
    help="Steps of the classifier's training.",
)
@click.option(
    "--window",
    type=float,
    nargs=2,
    help="Guide between these noise levels only, in standard deviations of the data.",
)
@click.option(
    "--limit",
    type=click.FloatRange(0, min_open=True),
    help="Shorten the push of the guidance to at most this multiple of the score.",
)
@click.option("--normalize", is_flag=True, help="Push by the weight times the score's length.")
@click.option(
    "--distance",
    type=click.Choice(["adaptive", "l2"]),
    default="adaptive",
    show_default=True,
    help="adaptive: L2 in units of half the mean to the 50 nearest training images.",
)
@click.option(
    "--bands",
    metavar="A,B,...",
    help="Ends of the bands of distance, from 0 [default: 0.5,0.75,1 for adaptive].",
)
@click.option(
    "--duplicates",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Training images linked by steps of at most this L2 distance count as one.",
)
@click.option("--value-range", type=float, nargs=2, help="Black and white in float arrays.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option("--chunk-size", type=click.IntRange(1), help="Samples computed together.")
def extract(
    model: str,
    data: str | None,
    heldout: str | None,
    out: str | None,
    method: str,
    samples: int,
    level: float | None,
    steps: int,
    weights: str,
    pool: int,
    clusters: int,
    cohesion: float,
    keep: float,
    features: str,
    classifier: str | None,
    training: int,
    window: tuple[float, float] | None,
    limit: float | None,
    normalize: bool,
    distance: str,
    bands: str | None,
    duplicates: float,
    value_range: tuple[float, float] | None,
    seed: int,
    chunk_size: int | None,
) -> int:
    """Pull stored images out of a model, without its training images.

    Samples are denoised again and again at one small noise level until they stand still; a stored
    image pulls everything around it in, and that is what candidates are ranked by. The other
    method, SIDE, clusters the model's own samples, trains a classifier of the clusters, lets it
    guide samples, and ranks those that crowd together. "digits" runs a small model of which is
    known what it has stored (trained once; it is cached). Otherwise name the folder of a model.

    With --data every candidate stands beside the training image nearest to it, and copies
    (d1/d2 < 1/3), AMS and UMS are counted.

    Writes candidates.npz, samples.npz, table.csv, figures/*.png, settings.json and report.html
    into --out; scores.csv with --data, and SIDE's classifier. Interrupted? The same command goes on
    where it stopped.

    Exit status: 0 completed, 2 bad usage or input, 4 incomplete.
    """
    from memjax.auditing.extraction import discard
    from memjax.auditing.extraction import extract as search
    from memjax.auditing.matches import band_edges, judge
    from memjax.auditing.stages import CLASSIFIER, Side

    _check_unused(method)
    side = Side(
        weights=tuple(parse_numbers("--weights", weights, zero=True)),
        pool=pool,
        clusters=clusters,
        min_cohesion=cohesion,
        keep=keep,
        features=features,
        classifier=classifier,
        steps=training,
        window=window,
        limit=limit,
        normalize=normalize,
    )
    edges = band_edges(distance, None if bands is None else parse_numbers("--bands", bands))
    if model == "digits":
        if data is not None or heldout is not None:
            raise click.UsageError("'digits' brings its own images; drop --data and --heldout")
    elif out is None:
        raise click.UsageError("--out DIR is missing: where to write the results")
    elif heldout is not None and data is None:
        raise click.UsageError("--heldout: there is no --data")
    folder = check_folder(out or "memjax-extract", "figures", "parts", CLASSIFIER)
    check_paths(None if model == "digits" else model, data=data, heldout=heldout)

    try:
        with progress_bar(messages) as progress:
            if model == "digits":
                given = _digits(seed, progress)
            else:
                given = _own(model, data, heldout, duplicates, value_range)
            found = search(
                given["model"],
                method=method,  # type: ignore[arg-type]
                num_samples=samples,
                level=level,
                num_steps=steps,
                side=side,
                chunk_size=chunk_size,
                seed=seed,
                out=folder,
                progress=progress,
            )
            judged = None
            if given["reference"] is not None:
                judged = judge(
                    given["model"],
                    found,
                    given["reference"],
                    bands=edges,
                    distance=distance,
                    heldout=given["heldout"],
                    progress=progress,
                )
    except KeyboardInterrupt:
        messages.print(
            f"memjax: interrupted; what is finished is kept in {folder}, and the same command "
            "goes on from there",
            markup=False,
            soft_wrap=True,
        )
        return INCOMPLETE
    settings = {
        "model": Path(model).name,
        "data": "scikit-learn digits, 8x8" if model == "digits" else data and Path(data).name,
        "heldout": heldout and Path(heldout).name,
        "distance": distance,
        "bands": edges,
        "duplicates": duplicates,
        **found.facts,
        "plan": found.plan,
    }
    result = Result(given, found, judged, settings)
    write(folder, result)
    discard(folder, found.plan)
    show(folder, result)
    return COMPLETED


def _check_unused(method: str) -> None:
    """Refuse options of the method that is not asked for."""
    context = click.get_current_context()
    others = {"fixed-points": SIDE_ONLY, "side": ("level", "steps"), "both": ()}[method]
    for name in others:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name}: not used by --method {method}")


def _digits(seed: int, progress: Callable[..., None]) -> dict[str, Any]:
    """The test bed's model and images."""
    import numpy as np

    from memjax.auditing.extraction import digits_extraction
    from memjax.auditing.matches import distinct_images

    bed = digits_extraction(seed, progress)
    reference = distinct_images(bed["images"], np.arange(len(bed["images"])))
    reference = reference._replace(times=bed["times"][reference.rows])
    return {**bed, "reference": reference}


def _own(
    model_dir: str,
    data: str | None,
    heldout: str | None,
    duplicates: float,
    value_range: tuple[float, float] | None,
) -> dict[str, Any]:
    """The model, and its images where they are known."""
    import numpy as np

    from memjax.auditing.matches import distinct_images
    from memjax.data.images import load_images

    model = load_model(model_dir)
    shape = image_shape(model, model_dir)
    given: dict[str, Any] = {"model": model, "reference": None, "heldout": None, "ids": ()}

    def read(path: str) -> Any:
        images = load_images(path, event_shape=shape, value_range=value_range)
        if not images.ok.all():
            line = f"memjax: {path}: {int((~images.ok).sum()):,} images cannot be used"
            messages.print(line, markup=False, soft_wrap=True)
        return images

    if data is not None:
        images = read(data)
        rows = np.flatnonzero(images.ok)
        given["reference"] = distinct_images(images.images[rows], rows, duplicates)
        given["ids"] = images.ids
    if heldout is not None:
        others = read(heldout)
        given["heldout"] = others.images[others.ok]
    return given
