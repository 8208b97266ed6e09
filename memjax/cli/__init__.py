"""The command line: one thin door to what the library does."""


def main() -> None:
    """Entry point of the ``memjax`` command; exits with its status."""
    import sys

    from memjax._core.errors import MissingExtraError, require

    try:
        require("click", "audit")
        require("rich", "audit")
    except MissingExtraError as error:
        print(f"memjax: {error}", file=sys.stderr)
        sys.exit(2)
    from memjax.cli.app import run

    sys.exit(run())
