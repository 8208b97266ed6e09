"""``memjax train`` and ``memjax sample``."""

from pathlib import Path

import click

from memjax.cli.app import cli, console, existing, messages
from memjax.cli.conditions import as_labels, encode_prompts, load_model, usual_guidance
from memjax.cli.progress import progress_bar


@cli.command()
@click.argument("data")
@click.option("--out", required=True, metavar="DIR", help="Folder of the saved model.")
@click.option(
    "--network",
    type=click.Choice(["mlp", "unet", "unet2d"]),
    default="mlp",
    show_default=True,
    help="unet2d: the architecture of diffusers, which 'memjax export' can write.",
)
@click.option("--steps", type=click.IntRange(1), default=8000, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=128, show_default=True)
@click.option("--value-range", type=float, nargs=2, help="Black and white in float arrays.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
def train(
    data: str,
    out: str,
    network: str,
    steps: int,
    batch_size: int,
    value_range: tuple[float, float] | None,
    seed: int,
) -> None:
    """Train a small diffusion model on the images in DATA (a folder, .npy or .npz).

    Interrupted? The same command goes on from the last checkpoint in --out.
    """
    existing(data, "DATA")
    from memjax.checkpoints.files import save
    from memjax.data.images import load_images
    from memjax.training.loop import STATE_FILE
    from memjax.training.loop import train as fit

    images = load_images(data, value_range=value_range)
    folder = Path(out)
    with progress_bar(messages) as progress:
        model = fit(
            images.images[images.ok],
            network=network,  # type: ignore[arg-type]
            steps=steps,
            batch_size=batch_size,
            seed=seed,
            checkpoint_dir=folder,
            progress=lambda step, total, loss: progress(
                "training", step, total, f"loss {loss:.4f}"
            ),
        )
    save(model, folder, training={"command": "memjax train", "steps": steps, "seed": seed})
    (folder / STATE_FILE).unlink(missing_ok=True)
    console.print(f"model: {folder}", markup=False, soft_wrap=True)


@cli.command()
@click.argument("model_dir")
@click.option("--out", default="samples.png", show_default=True, metavar="FILE", help="Picture.")
@click.option("-n", "--num", type=click.IntRange(1), default=64, show_default=True)
@click.option("--method", type=click.Choice(["heun", "ddim"]), default="heun", show_default=True)
@click.option("--steps", type=click.IntRange(1), default=18, show_default=True)
@click.option("--prompt", help="For a text-conditional model: what to draw.")
@click.option("--label", type=click.IntRange(0), help="For a class-conditional model: the class.")
@click.option(
    "--guidance",
    type=float,
    help="Weight of classifier-free guidance, 1 for none "
    "[default: 7.5 with --prompt but for Flux, else 1]",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
def sample(
    model_dir: str,
    out: str,
    num: int,
    method: str,
    steps: int,
    prompt: str | None,
    label: int | None,
    guidance: float | None,
    seed: int,
) -> None:
    """Draw samples from the model in MODEL_DIR and write them as one picture.

    MODEL_DIR is a folder of 'memjax train', or of diffusers.
    """
    existing(model_dir, "MODEL_DIR")
    if not Path(out).parent.is_dir():
        raise click.BadParameter(f"folder {Path(out).parent} does not exist", param_hint="--out")
    import numpy as np

    from memjax._core.files import write_atomically
    from memjax.diffusion.sampling import decode_samples
    from memjax.diffusion.sampling import sample as draw
    from memjax.report.grid import picture_grid

    if prompt is not None and label is not None:
        raise click.UsageError("--prompt and --label: expected one of them")
    model = load_model(model_dir)
    if len(model.event_shape) != 3:
        raise click.UsageError(f"samples of shape {model.event_shape} are no pictures")
    conditions = None
    if label is not None:
        conditions = as_labels(np.full(num, label), model, "--label")
    if prompt is not None:
        conditions = encode_prompts([prompt] * num, model, model_dir, "--prompt")
    usual = 1.0 if prompt is None else usual_guidance(model)
    weight = usual if guidance is None else guidance
    if weight != 1 and (conditions is None or model.null_condition is None):
        raise click.UsageError("--guidance: expected a condition that the model can do without")
    with progress_bar(messages) as progress:
        samples = draw(
            model,
            num,
            key=seed,
            method=method,  # type: ignore[arg-type]
            num_steps=steps,
            conditions=conditions,
            guidance=weight,
            progress=lambda done, total: progress("drawing samples", done, total),
        )
    write_atomically(Path(out), picture_grid(np.asarray(decode_samples(model, samples))))
    console.print(f"{num} samples: {out}", markup=False, soft_wrap=True)
