"""Errors that fit on one line, and the one place that imports optional packages."""

import importlib
from types import ModuleType


class MemjaxError(Exception):
    """Base of every error memjax raises on purpose; its message is one line, fit for a terminal."""


class InputError(MemjaxError, ValueError):
    """An argument or file is unusable: the message names it, what was expected and found."""


class CheckpointError(InputError):
    """A saved model is missing, incomplete, damaged or of an unknown kind."""


class MissingExtraError(MemjaxError, ImportError):
    """A feature needs an optional package; the message says how to install it."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package, or say in one line which extra brings it.

    Args:
        module: dotted name of the module to import.
        extra: the memjax extra that installs it, for example ``"audit"``.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A module that is there but fails on an import of its own is a different fault.
        if error.name is None or not (module + ".").startswith(error.name + "."):
            raise
        raise MissingExtraError(
            f"this needs the package {error.name!r}, which is not installed: "
            f"pip install 'memjax[{extra}]'"
        ) from None
