"""How the readers of one image say no: an exception that carries the status of its row."""

import io
from pathlib import Path

from memjax._core import files
from memjax._core.status import Status
from memjax._core.text import one_line


class RefusedError(Exception):
    """One image cannot be used; ``status`` and the one-line message become those of its row."""

    def __init__(self, status: Status, reason: str):
        super().__init__(reason)
        self.status = status


def corrupt(reason: str) -> RefusedError:
    """The image cannot be read, or not safely."""
    return RefusedError(Status.INPUT_CORRUPT, reason)


def mismatch(reason: str) -> RefusedError:
    """The image can be read but does not fit."""
    return RefusedError(Status.INPUT_MISMATCH, reason)


def describe(error: BaseException) -> str:
    """What a foreign exception says, on one short line."""
    return one_line(str(error) or type(error).__name__, limit=160)


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file for reading; never a link, a pipe, a device or a folder.

    Raises:
        RefusedError: not a regular file, or not readable.
    """
    try:
        return files.open_regular(path)
    except OSError as error:
        raise corrupt(error.strerror or "cannot be opened") from None
