"""Files of a collection, in a folder or in a zip: what there is, and their bytes."""

import io
import lzma
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from mamba_attn import images

if TYPE_CHECKING:
    from PIL.Image import Image

# what a damaged or encrypted member of a zip makes its reader raise
_DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError)


class Files(ABC):
    """A tree of files below a root; names are relative to it, with slashes."""

    def __init__(self, root: str) -> None:
        self.root = root

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """All files' names, in order."""

    @abstractmethod
    def _bytes(self, name: str) -> bytes:
        """A file's contents; OSError, or KeyError, where there is none."""

    def text(self, name: str) -> str:
        """Return a table's text.

        Raises:
            ValueError: it is not UTF-8, or damaged.
        """
        try:
            return self._bytes(name).decode("utf-8-sig")
        except _DAMAGED as error:
            raise ValueError(f"{self.root}: {name}: the zip is damaged there ({error}).") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.root}: {name} is not UTF-8 text.") from error

    def picture(self, name: str) -> "Image":
        """Return an image, 8-bit RGB.

        Raises:
            ImageError: absent or damaged.
        """
        where = f"{self.root}: {name}"
        try:
            content = self._bytes(name)
        except (OSError, KeyError) as error:
            raise images.ImageError(f"{where}: there is no such file.") from error
        except _DAMAGED as error:
            raise images.ImageError(f"{where}: the zip is damaged there ({error}).") from error
        return images.read(io.BytesIO(content), where)


class Folder(Files):
    """A folder; hidden files are left out."""

    @cached_property
    def names(self) -> list[str]:
        """All files' names, in order."""
        root = Path(self.root)
        paths = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
        return sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))

    def _bytes(self, name: str) -> bytes:
        return (Path(self.root) / name).read_bytes()


class Zip(Files):
    """A zip file.

    Raises:
        ValueError: not a zip.
    """

    def __init__(self, root: str) -> None:
        super().__init__(root)
        try:
            self._archive = zipfile.ZipFile(root)
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"open_data({root!r}): this is not a zip file, or a damaged one ({error}).") from error

    @cached_property
    def names(self) -> list[str]:
        """All files' names, in order."""
        return sorted(name for name in self._archive.namelist() if not name.endswith("/"))

    def _bytes(self, name: str) -> bytes:
        return self._archive.read(name)


def pictures(names: Iterable[str]) -> list[str]:
    """Return the names with the suffix of an image format."""
    from PIL import Image

    known = Image.registered_extensions()
    return [name for name in names if PurePosixPath(name).suffix.lower() in known]
