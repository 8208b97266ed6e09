"""The ``memjax`` command: parse, call the library, show what it found."""

import os
import sys
from pathlib import Path

import click
from rich.console import Console

from memjax import __version__
from memjax._core.errors import MemjaxError
from memjax._core.text import one_line

COMPLETED, BAD_USAGE, FINDINGS, INCOMPLETE = 0, 2, 3, 4

console = Console(stderr=False, highlight=False)
messages = Console(stderr=True, highlight=False)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="memjax")
def cli() -> None:
    """Find out which training images a diffusion model has stored."""


def run() -> int:
    """Run the command line on ``sys.argv`` and return the exit status.

    Every fault that memjax foresees is one line on standard error; set ``MEMJAX_DEBUG=1`` to see
    the traceback of one it does not.

    Returns:
        0 completed, 2 bad usage or input, 3 findings (with ``--fail-on-findings``), 4 incomplete.
    """
    from memjax.cli import (  # noqa: F401  (they register)
        audit,
        count,
        detectors,
        doctor,
        export,
        extract,
        inspect,
        localize,
        mitigate,
        model,
        report,
    )

    try:
        return cli.main(prog_name="memjax", standalone_mode=False) or COMPLETED
    except click.ClickException as error:
        error.show()
        return BAD_USAGE
    except MemjaxError as error:
        messages.print(f"memjax: error: {one_line(str(error))}", markup=False, soft_wrap=True)
        return BAD_USAGE
    except (KeyboardInterrupt, click.Abort):
        messages.print("memjax: interrupted", markup=False)
        return INCOMPLETE
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (flushed at exit, into nothing)
        return COMPLETED
    except Exception as error:
        if os.environ.get("MEMJAX_DEBUG"):
            raise
        messages.print(
            f"memjax: internal error: {one_line(f'{type(error).__name__}: {error}')} "
            "(MEMJAX_DEBUG=1 shows where)",
            markup=False,
            soft_wrap=True,
        )
        return INCOMPLETE


def existing(path: str, what: str) -> Path:
    """A path that is there, or a one-line error.

    Args:
        path: as given by the user.
        what: the argument's name.

    Returns:
        The path.
    """
    found = Path(path)
    if not found.exists():
        raise click.BadParameter(f"{path} does not exist", param_hint=what)
    return found
