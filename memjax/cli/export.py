"""``memjax export``: a saved model as a folder of diffusers."""

import click

from memjax.cli.app import cli, console, existing
from memjax.cli.conditions import load_model


@cli.command()
@click.argument("model_dir")
@click.argument("out")
def export(model_dir: str, out: str) -> None:
    """Write the model in MODEL_DIR as a folder of diffusers at OUT.

    For models of pixels whose network is a UNet2DModel: those of 'memjax train --network unet2d',
    and folders of diffusers in whatever layout and precision. Of other networks diffusers has none
    of their kind.
    """
    existing(model_dir, "MODEL_DIR")
    from memjax.checkpoints.export import export_diffusers

    export_diffusers(load_model(model_dir), out)
    console.print(f"folder: {out}", markup=False, soft_wrap=True)
