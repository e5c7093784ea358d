"""The words of the shape annotations, e.g. ``Float[Tensor, "batch routes channels length"]``.

Axes: batch routes channels heads groups length states tokens patches height width layers.
Type checkers see the tensors; the tests check every annotated shape too.
"""

from jaxtyping import Bool, Float, Int, Num

__all__ = ["Bool", "Float", "Int", "Num"]
