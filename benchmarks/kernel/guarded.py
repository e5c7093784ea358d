"""A call that may fail on this machine, and the sentence that its row shows then."""

import torch

from benchmarks.kernel.timing import Call
from mamba_attn.errors import MambaAttnError


class Guarded:
    """A call that stops being called once it failed, most likely for want of memory.

    Args:
        call: what is called.
    """

    def __init__(self, call: Call) -> None:
        self.call, self.problem = call, ""

    def __call__(self) -> None:
        """Call it, unless it failed before."""
        if self.problem:
            return
        try:
            self.call()
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError and MatrixTooLargeError are the former
            self.problem = sentence(error)


def sentence(error: Exception) -> str:
    """Return why a row has no time, from what torch or the library raised.

    Args:
        error: about memory, a state of the library, or a failed kernel.
    """
    first = str(error).strip().split("\n")[0][:300].rstrip(".")
    if isinstance(error, MambaAttnError):
        return first
    signs = ("allocate memory", "alloc_failed", "out of memory")
    memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in first.lower() for sign in signs)
    return f"{'out of memory' if memory else 'it failed'} ({first})"
