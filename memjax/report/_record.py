"""A JSON object that names the entry at fault instead of raising ``KeyError`` somewhere later."""

import json
import math
from pathlib import Path
from typing import Any

from memjax._core.errors import InputError
from memjax._core.text import one_line


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return names.get(type(value), "null" if value is None else "a number")


class Record:
    """Typed look-ups in a JSON object; absent and null entries read as empty.

    Text comes back on one line (``one_line``), fit to be shown.
    """

    def __init__(self, values: Any, place: str):
        if not isinstance(values, dict):
            raise InputError(f"{place}: expected an object, found {_kind(values)}")
        self.values = values
        self.place = place

    def _get(self, key: str, kinds: tuple[type, ...], expected: str) -> Any:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise InputError(f"{self.place}: {key}: expected {expected}, found {_kind(value)}")
        return value

    def text(self, key: str, *, limit: int = 300) -> str:
        """The entry as one line of text, empty if absent."""
        return one_line(self._get(key, (str,), "text") or "", limit=limit)

    def number(self, key: str) -> float:
        """The entry as a number, NaN if absent."""
        value = self._get(key, (int, float), "a number")
        return math.nan if value is None else float(value)

    def count(self, key: str) -> int | None:
        """The entry as a whole number, ``None`` if absent."""
        return self._get(key, (int,), "a whole number")

    def flag(self, key: str) -> bool | None:
        """The entry as a truth value, ``None`` if absent."""
        return self._get(key, (bool,), "true or false")

    def items(self, key: str) -> list[Any]:
        """The entry as a list, empty if absent."""
        return self._get(key, (list,), "a list") or []

    def records(self, key: str) -> list["Record"]:
        """The entry as a list of objects, empty if absent."""
        return [
            Record(value, f"{self.place}: {key}[{index}]")
            for index, value in enumerate(self.items(key))
        ]

    def record(self, key: str) -> "Record":
        """The entry as an object, an empty one if absent."""
        value = self._get(key, (dict,), "an object") or {}
        return Record(value, f"{self.place}: {key}")

    def __bool__(self) -> bool:
        return bool(self.values)


def read_json(path: Path) -> Record:
    """Read a JSON file whose outermost value is an object.

    Args:
        path: the file.

    Returns:
        Its content.

    Raises:
        InputError: the file is missing, is not JSON, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{one_line(path.name)}: expected a JSON file, found {one_line(str(error), limit=200)}"
        ) from None
    return Record(values, path.name)
