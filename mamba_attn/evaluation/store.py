"""The store of results: one JSON line per image, method, model and measure; a killed run resumes from it.

A process alone appends to one file. Several processes write one file per share of the work, in one step, into a folder
beside it; its name is of the keys in it, so that a share counts once, whoever measured it.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mamba_attn.analytics.places import LocalPlace

_END = ".jsonl"
_NOTHING = {"error": ""}
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
    """A file of lines, read once and appended to, and the files of several processes beside it.

    Args:
        path: of the file; it need not exist.
        damaged: number of invalid lines, e.g. the last one of a killed run.
        shared: whether other processes measure too: what is added becomes a file of its own.
    """

    path: Path
    damaged: int = 0
    shared: bool = False
    _found: dict[Any, dict[str, Any]] = field(default_factory=dict)  # by Key
    _read: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._shares = LocalPlace(self.path.with_suffix(".parts"))
        self._read_file()
        self.refresh()

    def refresh(self) -> None:
        """Read what other processes have written since."""
        for name in self._shares.names():
            if name.endswith(_END) and name not in self._read:
                self._read_share(name)

    def look(self, keys: Sequence[Key]) -> None:
        """Read the share of these keys, if another process has written it since.

        Args:
            keys: of the share.
        """
        name = _share_name(keys)
        if name not in self._read and self._shares.exists(name):
            self._read_share(name)

    def _read_share(self, name: str) -> None:
        self._read.add(name)
        for line in filter(None, self._shares.read(name).split(b"\n")):
            self._take(line)

    def _read_file(self) -> None:
        if not self.path.is_file():
            return
        *lines, last = self.path.read_bytes().split(b"\n")
        for line in filter(None, map(bytes.strip, lines)):
            self._take(line)
        if last:  # killed in the middle of a line: do not append to it
            before = self.damaged
            self._take(last)
            if self.shared:  # nothing is appended, and several would cut the file at once
                return
            with self.path.open("r+b") as file:
                file.seek(-len(last), os.SEEK_END)
                file.truncate() if self.damaged > before else file.write(last + b"\n")

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, key: tuple[str, ...]) -> bool:
        """Whether there is a figure; an error does not count, so it is tried again.

        Args:
            key: a ``Key``, or its fields alone, which plans of many images are quicker with.
        """
        return "error" not in self._found.get(key, _NOTHING)

    def get(self, key: Key) -> dict[str, Any] | None:
        """Return the figures, or {"error": reason}; None if nothing was tried."""
        return self._found.get(key)

    def items(self) -> Iterator[tuple[Key, dict[str, Any]]]:
        """Return all lines that count."""
        return iter(self._found.items())

    def add(self, records: Iterable[tuple[Key, dict[str, Any]]]) -> None:
        """Write records to disk; of those that the store has already, the first counts.

        Args:
            records: of one task; where processes share the store, of one share.

        Raises:
            OSError: the file cannot be written.
        """
        new = {key: values for key, values in records if key not in self}
        text = "".join(
            json.dumps({"protocol": PROTOCOL, "key": key, **values}, allow_nan=False) + "\n"
            for key, values in new.items()
        )
        if new and self.shared:
            self._add_share(_share_name(list(new)), new, text.encode())
        elif new:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        self._found |= {key: values for key, values in new.items() if key not in self}

    def _add_share(self, name: str, new: dict[Key, dict[str, Any]], content: bytes) -> None:
        """Write a share, unless another process has; figures take the place of errors of an earlier run."""
        if not self._shares.create(name, content):
            self._read_share(name)
            if any("error" not in values and key not in self for key, values in new.items()):
                self._shares.replace(name, content)
        self._read.add(name)

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            key = Key(*record.pop("key"))
            known = record.pop("protocol") == PROTOCOL and all(isinstance(part, str) for part in key)
            if known and key not in self:
                self._found[key] = record
        except (ValueError, TypeError, KeyError, AttributeError):
            self.damaged += 1


def _share_name(keys: Sequence[Key]) -> str:
    """Return the name of a share's file."""
    return hashlib.sha256(json.dumps(sorted(keys)).encode()).hexdigest()[:20] + _END
