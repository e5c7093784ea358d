"""Errors about state: a model, a trace, a machine; and what arguments of many calls are checked by.

Wrong arguments raise ValueError or TypeError instead.
"""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

__all__ = [
    "BackendUnavailableError",
    "MambaAttnError",
    "MatrixTooLargeError",
    "ModelBuildError",
    "NonFiniteError",
    "StoreError",
    "TraceError",
    "UnknownLayerError",
    "UnsupportedModelError",
    "WeightsError",
]

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


class MambaAttnError(RuntimeError):
    """Base class of all errors about state rather than arguments.

    Example:
        >>> import mamba_attn
        >>> try:
        ...     with mamba_attn.trace(torch.nn.Linear(2, 2)):
        ...         pass
        ... except MambaAttnError as error:
        ...     print(type(error).__name__)
        UnsupportedModelError
    """


class TraceError(MambaAttnError):
    """A trace does not match its use: it was read too early, or the forward pass recorded something else.

    Example:
        >>> import mamba_attn
        >>> with mamba_attn.trace(model) as record:
        ...     pass
        >>> try:
        ...     record["layers.0.mixer"]  # the model did not run
        ... except TraceError:
        ...     print("run the model inside the block")
        run the model inside the block
    """


class UnknownLayerError(MambaAttnError, KeyError):
    """The trace has no layer of this name; the message lists the names.

    Example:
        >>> import mamba_attn
        >>> try:
        ...     with mamba_attn.trace(model, layers="layers.99"):
        ...         pass
        ... except UnknownLayerError as error:
        ...     print("layers.99" in str(error))
        True
    """

    __str__ = RuntimeError.__str__  # KeyError would print the repr of the sentence


class UnsupportedModelError(MambaAttnError):
    """No adapter can treat this model, or this variant of a known family, exactly.

    Example:
        >>> import mamba_attn
        >>> try:
        ...     with mamba_attn.trace(torch.nn.Linear(2, 2)):
        ...         pass
        ... except UnsupportedModelError:
        ...     print("no layer that can be traced")
        no layer that can be traced
    """


class NonFiniteError(MambaAttnError):
    """A layer, a target or a map contains NaN or Inf.

    Example:
        >>> issubclass(NonFiniteError, MambaAttnError)  # so one except clause is enough
        True
    """


class MatrixTooLargeError(MambaAttnError):
    """A dense matrix would not fit into memory; nothing was allocated.

    Example:
        >>> issubclass(MatrixTooLargeError, MambaAttnError)  # so one except clause is enough
        True
    """


class BackendUnavailableError(MambaAttnError):
    """The backend requested with ``backend=`` cannot run here, or not on these inputs.

    Example:
        >>> issubclass(BackendUnavailableError, MambaAttnError)  # so one except clause is enough
        True
    """


class WeightsError(MambaAttnError):
    """A checkpoint does not fit, is damaged, or is unsafe to load.

    Example:
        >>> from mamba_attn import models
        >>> try:
        ...     models.create("vim_tiny", weights="no such file.pth")
        ... except WeightsError as error:
        ...     print("no such file.pth" in str(error))
        True
    """


class ModelBuildError(MambaAttnError):
    """A user's own code that should build a model failed, or built none; the message has its traceback.

    Example:
        >>> from mamba_attn import load
        >>> try:
        ...     load("no_such_module:build")
        ... except (ModelBuildError, ValueError) as error:
        ...     print("no_such_module" in str(error))
        True
    """


class StoreError(MambaAttnError):
    """A store of attention is half written, damaged, of another version or of another model.

    Example:
        >>> issubclass(StoreError, MambaAttnError)  # so one except clause is enough
        True
    """


def local_path(argument: str, text: str | Path) -> Path:
    """Return a path on this machine; ``~`` is the home folder.

    Args:
        argument: the call's name for it, for the message.
        text: as the user wrote it.

    Raises:
        ValueError: nothing, an address such as ``s3://``, or what no file can be called.
    """
    written = str(text)
    if not written.strip():
        raise ValueError(f"{argument}={written!r}: expected a path, and this is empty.")
    if "\0" in written:
        raise ValueError(f"{argument}={written!r}: no path contains a zero byte.")
    if _ADDRESS.match(written):
        raise ValueError(
            f"{argument}={written!r}: expected a path on this machine, not an address; mount what is behind it, or "
            "copy the files."
        )
    try:
        return Path(written).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{argument}={written!r}: this user has no home folder here; write the path out.") from error


def nearest(name: str, names: Iterable[str]) -> str:
    """Return a hint after a misspelt name: the nearest names, or a list of all.

    Args:
        name: as given.
        names: all possible ones.
    """
    known = list(names)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "Did you mean " + " or ".join(repr(item) for item in close) + "?"
    shown = ", ".join(repr(item) for item in known[:40])
    return f"Known: {shown}{', ...' if len(known) > 40 else ''}."
