"""The words of the shape annotations, e.g. ``Float[Tensor, "batch routes channels length"]``.

Axes: batch routes channels heads groups length states tokens patches height width layers.
The tests check every annotated shape; without jaxtyping installed the annotations are documentation.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Num
else:
    try:
        from jaxtyping import Bool, Float, Int, Num
    except ImportError:

        class _Unchecked:
            def __class_getitem__(cls, item: Any) -> Any:
                return item[0]

        Bool = Float = Int = Num = _Unchecked

__all__ = ["Bool", "Float", "Int", "Num"]
