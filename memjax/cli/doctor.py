"""``memjax doctor``: can this machine's numbers be trusted?"""

import click

from memjax.cli.app import BAD_USAGE, COMPLETED, cli, console


@cli.command()
def doctor() -> int:
    """Check the installed numerical stack and print versions and devices.

    Exit status 0 if every product agrees with NumPy float64, 2 if not.
    """
    from memjax._core.backend import check_backend

    report = check_backend()
    console.print(str(report), markup=False)
    if not report.ok:
        click.get_current_context().exit(BAD_USAGE)
    return COMPLETED
