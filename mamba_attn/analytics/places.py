"""Where a store lies: a folder of this machine, or object storage behind an address such as ``s3://bucket/store``.

Both are a tree of named objects. An object is written in one step, and ``create`` lets exactly one of several writers
win: no locks, which some file systems, and all object storage, are without.
"""

import os
import re
import shutil
import socket
import sys
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mamba_attn.errors import StoreError, local_path, nearest

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_TEMPORARY = ".new"  # end of the name of an object that is being written
_SAID_BY = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}  # packages
_READ_ONLY = ("http", "https", "data", "git", "github", "zip", "tar", "libarchive", "reference")
# what the libraries behind fsspec raise beside OSError; each only where its module is loaded
_FOREIGN = (("botocore.exceptions", "BotoCoreError"), ("botocore.exceptions", "ClientError"),
            ("aiohttp", "ClientError"))  # fmt: skip


def place(argument: str, text: "str | Path | Place") -> "Place":
    """Return where a store lies.

    Args:
        argument: the call's name for it, for messages.
        text: a path, or an address.

    Raises:
        ValueError: an address of a kind that nothing here writes to, or what no file can be called.
        ImportError: the package that reads such addresses is not installed.
    """
    if isinstance(text, Place):
        return text
    found = _ADDRESS.match(str(text))
    if found is None:
        return LocalPlace(local_path(argument, text))
    if found[1].lower() == "file":
        return LocalPlace(local_path(argument, str(text)[found.end() :]))
    return RemotePlace(argument, str(text), found[1].lower())


class Place(ABC):
    """A tree of named objects; names are relative, with slashes."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Last part of the path or address."""

    @property
    @abstractmethod
    def there(self) -> bool:
        """Whether the folder exists; object storage has no folders, so any address does."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return an object.

        Raises:
            FileNotFoundError: there is none of this name.
            OSError: it cannot be read.
        """

    @abstractmethod
    def create(self, name: str, content: bytes) -> bool:
        """Write an object if none of this name exists; return whether it was written.

        Raises:
            OSError: it cannot be written.
        """

    @abstractmethod
    def replace(self, name: str, content: bytes) -> None:
        """Write an object in place of one of this name: a kill leaves the old one or the new one.

        Raises:
            OSError: it cannot be written.
        """

    @abstractmethod
    def names(self, folder: str = "") -> list[str]:
        """Return the names of what lies directly in a folder, without the folder's; none if it is absent.

        An object that is being written has no name yet: whoever lists the folder waits for it or makes it, and nobody
        counts or removes half of it.
        """

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether an object, or a folder with something in it, has this name."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Return the bytes of an object."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove an object, or all that is in a folder; nothing happens if it is absent."""

    @abstractmethod
    def arrays(self, name: str, writable: bool) -> Any:
        """Return the zarr store of a folder."""

    @abstractmethod
    @contextmanager
    def made(self) -> Iterator[None]:
        """Make the folder; after an error, remove again what was made for it and is empty.

        Raises:
            OSError: it cannot be made or written.
        """
        yield


class LocalPlace(Place):
    """A folder of this machine.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.name

    @property
    def there(self) -> bool:
        """Whether the folder exists."""
        return self.path.is_dir()

    def read(self, name: str) -> bytes:
        """Return an object; see ``Place``."""
        return (self.path / name).read_bytes()

    def create(self, name: str, content: bytes) -> bool:
        """Write an object if none of this name exists; see ``Place``."""
        target = self.path / name
        temporary = self._written(target, content)
        try:
            os.link(temporary, target)  # in one step, and never over another one
        except FileExistsError:
            return False
        except OSError:  # a file system without links: two writers at the same instant write the same bits
            if target.exists():
                return False
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def replace(self, name: str, content: bytes) -> None:
        """Write an object in place of another; see ``Place``."""
        self._written(self.path / name, content).replace(self.path / name)

    def names(self, folder: str = "") -> list[str]:
        """Return the names of what lies in a folder."""
        with suppress(FileNotFoundError):
            return sorted(name for name in os.listdir(self.path / folder) if not name.endswith(_TEMPORARY))
        return []

    def exists(self, name: str) -> bool:
        """Whether there is an object or folder of this name."""
        return (self.path / name).exists()

    def size(self, name: str) -> int:
        """Return the bytes of an object."""
        return (self.path / name).stat().st_size

    def remove(self, name: str) -> None:
        """Remove an object or folder."""
        path = self.path / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def arrays(self, name: str, writable: bool) -> Any:
        """Return the zarr store of a folder."""
        from zarr.storage import LocalStore

        return LocalStore(self.path / name, read_only=not writable)

    @contextmanager
    def made(self) -> Iterator[None]:
        """Make the folder; see ``Place``."""
        made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                if not os.access(self.path, os.W_OK | os.X_OK):
                    raise PermissionError(13, "Permission denied")
            except OSError as error:
                raise OSError(
                    f"out={str(self.path)!r}: cannot write this folder ({error.strerror}); choose another."
                ) from error
            yield
        except BaseException:
            with suppress(OSError):
                for path in made:
                    path.rmdir()
            raise

    @staticmethod
    def _written(target: Path, content: bytes) -> Path:
        """Write a file of another name beside the target."""
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}{_TEMPORARY}")
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return temporary


class RemotePlace(Place):
    """Object storage, by fsspec.

    Args:
        argument: the call's name for the address.
        address: with its scheme.
        scheme: of the address.

    Raises:
        ValueError: a scheme that nothing here writes to.
        ImportError: the package that reads such addresses is not installed.
    """

    def __init__(self, argument: str, address: str, scheme: str) -> None:
        import fsspec

        if not address.partition("://")[2].strip("/"):
            raise ValueError(
                f"{argument}={address!r}: expected a name behind {scheme}://, e.g. {scheme}://bucket/store."
            )
        self.address = address.rstrip("/")
        known = sorted({each for each in fsspec.available_protocols() if each not in _READ_ONLY} - {"file", "local"})
        if scheme not in known:
            raise ValueError(
                f"{argument}={address!r}: nothing here writes to {scheme}:// addresses. {nearest(scheme, known)} "
                "A path without :// is a folder of this machine."
            )
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.address, use_listings_cache=False)
        except ImportError as error:
            package = _SAID_BY.get(scheme, f"fsspec's package for {scheme}://")
            raise ImportError(f"{argument}={address!r} needs {package}: pip install {package}") from error

    def __str__(self) -> str:
        return self.address

    def __reduce__(self) -> tuple[Any, ...]:
        return place, ("store", self.address)

    @property
    def name(self) -> str:
        """Last part of the address."""
        return self.address.rpartition("/")[2]

    @property
    def there(self) -> bool:
        """Object storage has no folders to make."""
        return True

    def read(self, name: str) -> bytes:
        """Return an object; see ``Place``."""
        with self._said():
            return bytes(self._files.cat_file(f"{self._root}/{name}"))

    def create(self, name: str, content: bytes) -> bool:
        """Write an object if none of this name exists; see ``Place``."""
        with self._said():
            try:
                self._files.pipe_file(f"{self._root}/{name}", content, mode="create")
            except FileExistsError:
                return False
            except OSError:  # as some libraries say it
                if not self.exists(name):
                    raise
                return False
            return True

    def replace(self, name: str, content: bytes) -> None:
        """Write an object in place of another; see ``Place``."""
        with self._said():
            self._files.pipe_file(f"{self._root}/{name}", content)

    def names(self, folder: str = "") -> list[str]:
        """Return the names of what lies below a prefix."""
        prefix = f"{self._root}/{folder}".rstrip("/")
        with self._said(), suppress(FileNotFoundError):
            found = self._files.ls(prefix, detail=False)
            return sorted({str(each).rstrip("/").rpartition("/")[2] for each in found} - {""})
        return []

    def exists(self, name: str) -> bool:
        """Whether an object, or one below this prefix, exists."""
        with self._said():
            return bool(self._files.exists(f"{self._root}/{name}"))

    def size(self, name: str) -> int:
        """Return the bytes of an object."""
        with self._said():
            return int(self._files.size(f"{self._root}/{name}"))

    def remove(self, name: str) -> None:
        """Remove an object, or all below a prefix."""
        with self._said(), suppress(FileNotFoundError):
            self._files.rm(f"{self._root}/{name}", recursive=True)

    def arrays(self, name: str, writable: bool) -> Any:
        """Return the zarr store of a prefix."""
        from zarr.storage import FsspecStore

        options = {"use_listings_cache": False}
        return FsspecStore.from_url(f"{self.address}/{name}", storage_options=options, read_only=not writable)

    @contextmanager
    def made(self) -> Iterator[None]:
        """Nothing is to be made."""
        yield

    @contextmanager
    def _said(self) -> Iterator[None]:
        """Turn errors of the libraries behind fsspec, which are no OSErrors, into one."""
        try:
            yield
        except storage_errors() as error:
            if isinstance(error, OSError):
                raise
            raise OSError(f"{self.address}: {str(error).strip() or type(error).__name__}") from error


def storage_errors() -> tuple[type[Exception], ...]:
    """Return what reading or writing may raise: OSError, and the exceptions of storage libraries that are loaded."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in _FOREIGN)
    return (OSError, *(each for each in found if each is not None))


def writer_id() -> str:
    """Return a name that no other writer of a store has: the machine, the process, and chance."""
    host = re.sub(r"[^A-Za-z0-9]+", "-", socket.gethostname())[:40].strip("-") or "host"
    return f"{host}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def read_object(where: Place, name: str, largest: int) -> bytes:
    """Read an object of a store.

    Args:
        where: the store.
        name: of the object.
        largest: bytes that are read.

    Raises:
        StoreError: it is larger.
        FileNotFoundError: there is none.
    """
    if where.size(name) > largest:
        raise StoreError(f"{where}/{name}: larger than {largest:,} bytes; this is not what mamba-attn collect wrote.")
    return where.read(name)
