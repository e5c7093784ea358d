"""What a frozen page holds, and the space left in it."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mamba_attn.errors import MambaAttnError
from mamba_attn.viewer.report.quantised import as_text, packed

_TAG = 64  # characters around a matrix, or before the text of a picture or of points


class ReportError(MambaAttnError):
    """The page cannot be made from these stores; the message names the remedy."""


@dataclass
class Content:
    """Everything that goes into the page.

    Args:
        stores: JSON values, one per store.
        matrices: as text, by number.
        notes: sentences on what is left out.
        size: of the page so far, in bytes.
        limit: largest size, in bytes.
    """

    limit: int
    stores: list[dict[str, Any]] = field(default_factory=list)
    matrices: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    size: int = 0

    def add(self, text: str) -> str | None:
        """Count a text with its tag and return it; None if it does not fit."""
        size = self.size + len(text) + _TAG
        if size > self.limit:
            return None
        self.size = size
        return text

    def add_matrix(self, matrix: np.ndarray) -> int | None:
        """Add a matrix and return its number; None if it does not fit."""
        text = self.add(as_text(packed(matrix)))
        if text is None:
            return None
        self.matrices.append(text)
        return len(self.matrices) - 1
