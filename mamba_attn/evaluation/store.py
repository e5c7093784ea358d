"""The store of results: one JSON line per image, method, model and measure; a killed run resumes from it."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

PROTOCOL = 1  # increase it when a measure changes; older lines then no longer count


class Key(NamedTuple):
    """The key of a line; of lines with the same key only one counts.

    Args:
        data: the collection's identity.
        image: the image's key in it.
        model: name and hash of the weights.
        method: name.
        measure: what was measured.
        options: all other options that the figures depend on.
    """

    data: str
    image: str
    model: str
    method: str
    measure: str
    options: str


@dataclass
class Store:
    """A file of lines, read once and appended to.

    Args:
        path: of the file; it need not exist.
        damaged: number of invalid lines, e.g. the last one of a killed run.
    """

    path: Path
    damaged: int = 0
    _found: dict[Key, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.path.is_file():
            return
        *lines, last = self.path.read_bytes().split(b"\n")
        for line in filter(None, map(bytes.strip, lines)):
            self._take(line)
        if last:  # killed in the middle of a line: do not append to it
            before = self.damaged
            self._take(last)
            with self.path.open("r+b") as file:
                file.seek(-len(last), os.SEEK_END)
                file.truncate() if self.damaged > before else file.write(last + b"\n")

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, key: Key) -> bool:
        """Whether there is a figure; an error does not count, so it is tried again."""
        return "error" not in self._found.get(key, {"error": ""})

    def get(self, key: Key) -> dict[str, Any] | None:
        """Return the figures, or {"error": reason}; None if nothing was tried."""
        return self._found.get(key)

    def items(self) -> Iterator[tuple[Key, dict[str, Any]]]:
        """Return all lines that count."""
        return iter(self._found.items())

    def add(self, records: Iterable[tuple[Key, dict[str, Any]]]) -> None:
        """Append records and flush them to disk.

        Raises:
            OSError: the file cannot be written.
        """
        lines = []
        for key, values in records:
            if key not in self:
                self._found[key] = values
                lines.append(json.dumps({"protocol": PROTOCOL, "key": key, **values}, allow_nan=False))
        if lines:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in lines))

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            key = Key(*record.pop("key"))
            known = record.pop("protocol") == PROTOCOL and all(isinstance(part, str) for part in key)
            if known and key not in self:
                self._found[key] = record
        except (ValueError, TypeError, KeyError, AttributeError):
            self.damaged += 1
