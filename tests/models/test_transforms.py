"""transform(name): what the published models and the micro models are shown of an image."""

import numpy as np
import pytest
import torch
from PIL import Image

import mamba_attn.models
from mamba_attn import images
from mamba_attn.images import ImageError


def noise(height, width, seed=0):
    """Smooth enough that one step of rounding stays one step."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def unnormalise(x):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (images.IMAGENET_MEAN, images.IMAGENET_STD))
    return (x * std + mean) * 255


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (224, 224), (120, 97), (256, 1000)])
@pytest.mark.parametrize("name", ["vim_tiny", "vmamba_tiny_s1l8"])
def test_published_models_see_what_torchvision_shows_them(name, size):
    v2 = pytest.importorskip("torchvision.transforms.v2")
    image = noise(*size)
    theirs = v2.CenterCrop(224)(v2.Resize(256, v2.InterpolationMode.BICUBIC)(image))
    transform = mamba_attn.models.transform(name)
    assert (transform.size, transform.cover, transform.interpolation) == ((224, 224), (256, 256), "bicubic")
    ours = transform.pixels(image).astype(int)
    difference = np.abs(ours - np.asarray(theirs))  # rounding: Pillow may pass over rows first, or over columns
    assert difference.max() <= 3
    assert difference.mean() < 0.3
    torch.testing.assert_close(
        unnormalise(transform(image)), torch.from_numpy(ours).float().movedim(2, 0), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("name", ["vim_micro", "vmamba_micro", "vit_micro"])
def test_micro_models_see_all_of_the_shorter_side(name):
    image = noise(200, 320)
    transform = mamba_attn.models.transform(name)
    expected = images.normalise(images.crop(image, (128, 128))[None])[0]
    assert transform(image).shape == (3, 128, 128)
    assert torch.equal(transform(image), expected)
    marked = np.zeros((200, 320, 3), np.uint8)
    marked[:, 60:260] = 255  # the square in the middle
    seen = transform.pixels(Image.fromarray(marked))
    assert seen[:, 1:-1].min() == 255
    assert seen[:, [0, -1]].min() < 255  # the edge lies in their pixels


def test_the_size_of_a_model_created_with_that_option():
    assert mamba_attn.models.transform("vim_micro", image_size=(64, 96))(noise(100, 100)).shape == (3, 64, 96)
    transform = mamba_attn.models.transform("vim_small", image_size=192)
    assert (transform.size, transform.cover) == ((192, 192), (219, 219))


def test_paths_and_modes(tmp_path):
    image = noise(150, 170)
    image.save(tmp_path / "a.png")
    transform = mamba_attn.models.transform("vim_micro")
    assert torch.equal(transform(tmp_path / "a.png"), transform(image))
    assert torch.equal(transform(str(tmp_path / "a.png")), transform(image))
    grey = transform(image.convert("L"))
    assert grey.shape == (3, 128, 128)
    with pytest.raises(ImageError, match="there is no such file"):
        transform(tmp_path / "b.png")


def test_names():
    official = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
    assert mamba_attn.models.transform(official) == mamba_attn.models.transform("vim_tiny")
    with pytest.raises(ValueError, match=r"transform\('vim_tine'\): no such model. Did you mean 'vim_tiny'"):
        mamba_attn.models.transform("vim_tine")
