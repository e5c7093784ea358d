"""What the library decides, one line each, for Python's logger "mamba_attn"."""

import logging

LOGGER = logging.getLogger("mamba_attn")
LOGGER.addHandler(logging.NullHandler())
_said: set[str] = set()


def somebody_listens() -> bool:
    """Whether what is decided is shown or kept anywhere."""
    return LOGGER.isEnabledFor(logging.INFO)


def decided(message: str, *values: object) -> None:
    """Log a decision at level INFO, the same sentence once per process.

    Args:
        message: with places for values, as ``logging`` takes it.
        values: what goes there.

    Example:
        >>> decided("backend %s on %s", "native", "cpu")
    """
    if somebody_listens():
        text = message % values
        if text not in _said:
            _said.add(text)
            LOGGER.info("%s", text)
