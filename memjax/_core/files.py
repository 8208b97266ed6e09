"""Files that are there whole or not at all, and files that are nothing but files."""

import errno
import io
import os
import secrets
import stat
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader, a second writer or a kill sees all of it or none.

    The bytes go into a temporary file beside it, reach the disk, and are renamed into place.

    Args:
        path: the file; its folder exists.
        data: its contents.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file for reading; never a link, a pipe, a device or a folder.

    Opening a pipe or a device can block or have effects, so the path is looked at before; the
    open file is looked at again, because the path may have changed in between.

    Args:
        path: the file; to follow a link, resolve it first.

    Returns:
        The open file, in binary mode.

    Raises:
        OSError: not a regular file, or not readable; ``strerror`` says which.
    """
    flags = os.O_RDONLY
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)
    if stat.S_ISREG(os.lstat(path).st_mode):
        file = os.fdopen(os.open(path, flags), "rb")
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        file.close()
    raise OSError(errno.EINVAL, "not a regular file")
