"""What a page holds, and how much more fits into it."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mamba_attn.errors import MambaAttnError
from mamba_attn.viewer.report.quantised import as_text, packed

_TAG = 64  # characters around a matrix, or before the text of a picture or of points


class ReportError(MambaAttnError):
    """A report that cannot be made of these stores, with the remedy."""


@dataclass
class Content:
    """What goes into the page.

    Args:
        stores: JSON values, one of each store.
        matrices: as text, by number.
        notes: what is left out, in sentences.
        size: bytes of the page so far.
        limit: of them.
    """

    limit: int
    stores: list[dict[str, Any]] = field(default_factory=list)
    matrices: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    size: int = 0

    def add(self, text: str) -> str | None:
        """Return a text that is counted, with its tag; None where it does not fit."""
        if self.size + len(text) + _TAG > self.limit:
            return None
        self.size += len(text) + _TAG
        return text

    def add_matrix(self, matrix: np.ndarray) -> int | None:
        """Return the number of a matrix that is added; None where it does not fit."""
        text = self.add(as_text(packed(matrix)))
        if text is None:
            return None
        self.matrices.append(text)
        return len(self.matrices) - 1
