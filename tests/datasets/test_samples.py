"""Boxes and masks go the way of the image."""

import numpy as np
import pytest
import torch
from PIL import Image

from mamba_attn.core.transform import Transform
from mamba_attn.datasets.samples import box_coverage, transformed_mask


def test_a_box_covers_its_area_wherever_its_edges_are():
    transform = Transform((16, 16), (16, 16), "bilinear")
    part = box_coverage([[3.3, 5.1, 17.9, 30.0]], (32, 32), transform)
    assert part.sum().item() == pytest.approx((17.9 - 3.3) * (30.0 - 5.1) / 4, rel=1e-5)
    assert part[2, 1].item() == pytest.approx((3 - 2.55) * (2 - 1.65), rel=1e-4)
    assert part[5, 4] == 1
    twice = box_coverage([[4, 4, 12, 12], [8, 4, 20, 12]], (32, 32), transform)
    assert torch.equal(twice, box_coverage([[4, 4, 20, 12]], (32, 32), transform))


def test_boxes_go_the_way_of_the_image():
    image = np.zeros((40, 70, 3), np.uint8)
    image[10:30, 20:50] = 255
    transform = Transform((15, 17), (20, 20), "bilinear")  # scaled by a half, then cut
    seen = transform.pixels(Image.fromarray(image))[..., 0] / 255
    part = box_coverage([[20, 10, 50, 30]], (40, 70), transform)
    assert np.abs(seen - part.numpy()).max() < 0.6  # interpolation blurs edges
    assert np.abs(seen - part.numpy()).mean() < 0.06
    assert box_coverage([[0, 0, 9, 40]], (40, 70), transform).sum() == 0  # cut away


def test_masks_keep_their_values_and_lie_where_the_image_is():
    mask = np.zeros((40, 70), np.uint8)
    mask[10:30, 20:50] = 7
    transform = Transform((15, 17), (20, 20), "bicubic")
    seen = transformed_mask(Image.fromarray(mask), transform)
    assert seen.shape == (15, 17)
    assert set(np.unique(seen)) == {0, 7}
    part = box_coverage([[20, 10, 50, 30]], (40, 70), transform).numpy()
    assert ((seen == 7) == (part > 0.5)).mean() > 0.99
