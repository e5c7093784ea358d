"""A map of a volume: one slice and the maximum over all, each over its part of the image."""

import numpy as np
import pytest

from mamba_attn.figures import volume

RANDOM = np.random.default_rng(0)
IMAGE, VALUES = RANDOM.random((4, 6, 10)), RANDOM.normal(size=(4, 6, 10)).astype(np.float32)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_slice_with_the_strongest_value_and_the_strongest_of_all(axis: int) -> None:
    slices, total = (trace for trace in volume(IMAGE, VALUES, axis=axis).data if trace.type == "heatmap")
    array = np.moveaxis(VALUES, axis, 0)
    where = np.abs(array).max((1, 2)).argmax()
    assert np.array_equal(slices.z, array[where])
    assert np.array_equal(np.abs(total.z), np.abs(array).max(0))
    assert np.isin(total.z, array).all()


def test_a_slice_can_be_named() -> None:
    heat = next(
        trace for trace in volume(np.repeat(IMAGE[..., None], 3, -1), VALUES, at=2).data if trace.type == "heatmap"
    )
    assert np.array_equal(heat.z, VALUES[2])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"values": VALUES[0]}, r"volume\(image\(4, 6, 10\), values\(6, 10\)\): expected a map \(depth, rows"),
        ({"at": 4}, r"volume\(axis=0, at=4\): the map has 3 axes"),
        ({"axis": 3}, r"axis=3"),
    ],
)
def test_what_is_no_volume_is_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        volume(**{"image": IMAGE, "values": VALUES, **options})
