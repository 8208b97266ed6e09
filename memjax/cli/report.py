"""``memjax report``: build the page again from a finished audit's files."""

import click

from memjax.cli.app import cli, console, existing


@cli.command()
@click.argument("audit_dir")
def report(audit_dir: str) -> None:
    """Rebuild figures and report.html from a finished audit in AUDIT_DIR."""
    from memjax.report.build import build_report

    page = build_report(existing(audit_dir, "AUDIT_DIR"))
    console.print(f"report   {page}", markup=False)
