"""Committed pieces of an unfinished piece of work: what is computed once is never lost."""

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from memjax._core.errors import InputError
from memjax._core.files import write_atomically

PARTS_FOLDER = "parts"
PLAN_FILE = "plan.json"


class Parts:
    """Arrays of one audit, or of other long work, by name, on disk as they are finished.

    Without a folder they are kept in memory only. With one, a part is written atomically under
    ``folder/parts`` and read back by the next run of the same plan; a part that does not read
    back whole is computed again.
    """

    def __init__(self, folder: Path | None, plan: Mapping[str, Any], work: str = "audit"):
        """Open or create the parts of a plan.

        Args:
            folder: the output folder, or ``None``.
            plan: everything that determines the numbers, as JSON-ready values.
            work: what is done, in a word.

        Raises:
            InputError: the folder holds unfinished parts of a different plan, or cannot be
                written.
        """
        self.folder = folder / PARTS_FOLDER if folder is not None else None
        self.work = work
        if self.folder is None:
            return
        record = self.folder / PLAN_FILE
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if record.exists():
                self._refuse_another(record, plan)
            else:
                write_atomically(record, json.dumps(plan, indent=1, sort_keys=True).encode())
        except OSError as error:
            raise InputError(f"out: cannot write to {folder}: {error.strerror}") from None

    def _refuse_another(self, record: Path, plan: Mapping[str, Any]) -> None:
        try:
            found = json.loads(record.read_text())
        except ValueError:
            found = {}
        wanted = json.loads(json.dumps(plan))
        changed = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
        if changed:
            raise InputError(
                f"out: {record.parent.parent} holds an unfinished {self.work} that differs in "
                f"{', '.join(changed)}; finish it with its own settings, choose another folder, "
                f"or delete {record.parent}"
            )

    def read(self, name: str) -> dict[str, np.ndarray] | None:
        """The part of this name, or ``None`` if it is missing or torn."""
        if self.folder is None:
            return None
        try:
            data = io.BytesIO((self.folder / f"{name}.npz").read_bytes())
            with np.load(data, allow_pickle=False) as archive:
                return {key: archive[key] for key in archive.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return None

    def write(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Commit a part.

        Args:
            name: file name without ending.
            arrays: its contents.

        Raises:
            InputError: the disk is full or the folder is gone.
        """
        if self.folder is None:
            return
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        try:
            write_atomically(self.folder / f"{name}.npz", buffer.getvalue())
        except OSError as error:
            raise InputError(f"out: cannot write to {self.folder}: {error.strerror}") from None

    def discard(self) -> None:
        """Remove the parts once the finished tables hold everything."""
        if self.folder is None:
            return
        for path in self.folder.glob("*"):
            path.unlink()
        self.folder.rmdir()
