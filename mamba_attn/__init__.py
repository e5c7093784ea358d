"""Exact hidden attention of vision Mamba models, from forward hooks, as explanations and pictures."""

from pathlib import Path

_HERE = Path(__file__).parent
if not (_HERE / "integrations").is_dir():
    # in a checkout, integrations/ and cuda/ stand beside this package; in a wheel they are inside it
    __path__.append(str(_HERE.parent))
