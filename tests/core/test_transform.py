"""Transform: read from what people have, equal to it on pictures, and inverted."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mamba_attn import images
from mamba_attn.core.transform import FunctionTransform, Transform

HALF = (0.5, 0.5, 0.5)


def noise(height, width, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def named(kind, **attributes):
    """An object that looks like one of torchvision's, which need not be installed."""
    return type(kind, (), attributes)()


def compose(*parts):
    made = named("Compose", transforms=list(parts))
    type(made).__call__ = lambda self, picture: None
    return made


def resize(size, **more):
    return named("Resize", size=size, interpolation=SimpleNamespace(value="bilinear"), max_size=None, **more)


BILINEAR = SimpleNamespace(value="bilinear")
TO_TENSOR = named("ToTensor")
NORMALIZE = named("Normalize", mean=[0.5, 0.5, 0.5], std=[0.5, 0.25, 0.5])
IMAGENET = {"mean": images.IMAGENET_MEAN, "std": images.IMAGENET_STD}
READ = {
    "crop": (
        compose(resize(256), named("CenterCrop", size=(224, 224)), TO_TENSOR, NORMALIZE),
        Transform((224, 224), (256, 256), "bilinear", HALF, (0.5, 0.25, 0.5)),
    ),
    "squash": (
        compose(resize([64, 96]), TO_TENSOR, NORMALIZE),
        Transform((64, 96), (64, 96), "bilinear", HALF, (0.5, 0.25, 0.5), "squash"),
    ),
    "no normalisation": (
        compose(resize((70, 70)), named("CenterCrop", size=[64, 64]), named("ToImage"), named("ToDtype", scale=True)),
        Transform((64, 64), (70, 70), "bilinear", (0,) * 3, (1,) * 3, "squash"),
    ),
    "preset of torchvision": (
        SimpleNamespace(crop_size=[224], resize_size=[232], interpolation=BILINEAR, **IMAGENET),
        Transform((224, 224), (232, 232), "bilinear"),
    ),
    "timm": (
        {"input_size": (3, 224, 160), "crop_pct": 0.9, "interpolation": "bicubic", "mean": HALF, "std": HALF},
        Transform((224, 160), (248, 177), "bicubic", HALF, HALF),
    ),
    "timm, squashed": (
        {"input_size": (3, 64, 64), "crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear"},
        Transform((64, 64), (64, 64), "bilinear", fit="squash"),
    ),
    "timm, grey": (
        {"input_size": (1, 28, 28), "crop_pct": 1.0, "mean": (0.1307,), "std": (0.3081,)},
        Transform((28, 28), (28, 28), "bicubic", (0.1307,), (0.3081,)),
    ),
    "ViTImageProcessor": (
        SimpleNamespace(
            size={"height": 64, "width": 96}, do_center_crop=None, image_mean=HALF, image_std=HALF, resample=2
        ),
        Transform((64, 96), (64, 96), "bilinear", HALF, HALF, "squash"),
    ),
    "CLIPImageProcessor": (
        SimpleNamespace(
            size={"shortest_edge": 224}, do_center_crop=True, crop_size={"height": 200, "width": 224}, resample=3, **{
                "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "rescale_factor": 1 / 255
            }
        ),
        Transform((200, 224), (224, 224), "bicubic", (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", READ)
def test_transforms_are_read(kind):
    given, expected = READ[kind]
    found = Transform.of(given)
    assert type(found) is Transform
    for name, value in expected.as_dict().items():
        other = getattr(found, name)
        assert other == (pytest.approx(value) if name in ("mean", "std") else value), name


@pytest.mark.parametrize("parts", [(256,), ([60, 80],), (72, 64)])
def test_torchvisions_own_show_the_same(parts):
    v2 = pytest.importorskip("torchvision.transforms.v2")
    crop = [v2.CenterCrop(parts[1])] if len(parts) > 1 else [v2.CenterCrop(224)] if parts == (256,) else []
    theirs = v2.Compose(
        [v2.Resize(parts[0]), *crop, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(HALF, HALF)]
    )
    ours, picture = Transform.of(theirs), noise(300, 452)
    assert type(ours) is Transform
    difference = (ours(picture) - theirs(picture)).abs()
    assert difference.max() <= 2 * 4 / 255
    assert difference.mean() < 2 * 0.5 / 255


def test_a_function_is_measured():
    def mine(picture):
        return torch.from_numpy(images.crop(picture, (40, 56)).copy()).permute(2, 0, 1) / 127.5 - 1

    found = Transform.of(mine)
    assert (found.size, found.mean, found.std) == ((40, 56), pytest.approx(HALF), pytest.approx(HALF))
    picture = noise(90, 120)
    torch.testing.assert_close(found(picture), mine(picture), rtol=0, atol=0.01)
    assert isinstance(found, FunctionTransform)
    with pytest.raises(ValueError, match="where a function puts the pixels of a file is not known"):
        found.axes(90, 120)
    kept = Transform.from_dict(json.loads(json.dumps(found.as_dict())))
    assert (kept, kept.function_name) == (found, "mine")
    with pytest.raises(ValueError, match="was the function 'mine', which a store cannot hold"):
        kept.pixels(picture)


def unsized(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def random(picture):
    return torch.rand(3, 8, 8)


def standardised(picture):
    values = torch.from_numpy(images.crop(picture, (8, 8)).copy()).float().permute(2, 0, 1)
    return values - values.mean()


def curved(picture):
    return (torch.from_numpy(images.crop(picture, (8, 8)).copy()).float().permute(2, 0, 1) / 255 - 0.5).abs().sqrt() * 9


REFUSED = {
    unsized: r"\(3, 300, 400\) for a picture of 300 x 400 pixels and \(3, 400, 300\)",
    random: "it is random: two calls differ",
    standardised: "black and white pictures come out alike, .*as in Transform.of",
    (lambda picture: torch.zeros(2, 8, 8)): r"returned \(2, 8, 8\); expected \(colours, rows, columns\)",
}


@pytest.mark.parametrize("function", REFUSED)
def test_functions_that_are_no_transforms_are_refused(function):
    with pytest.raises(ValueError, match=REFUSED[function]):
        Transform.of(function)


def test_a_wrong_range_is_refused():
    with pytest.raises(ValueError, match=r"pixels are -?\d+\.\d\d to \d+\.\d\d instead of 0 to 1; give the mean="):
        Transform.of(curved, mean=HALF, std=HALF)


def test_what_is_no_transform():
    with pytest.raises(TypeError, match="transform=int: expected a Transform, torchvision's Compose"):
        Transform.of(3)
    with pytest.raises(TypeError, match="it returned Image; expected a tensor"):
        Transform.of(lambda picture: picture)


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
@pytest.mark.parametrize("shape", [(90, 200), (200, 90), (64, 64)])
def test_pixels_lie_where_axes_say(fit, shape):
    rows, columns = shape
    transform = Transform((48, 64), (48, 64) if fit == "pad" else (60, 72), "bilinear", fit=fit)
    for row, column in ((rows // 2, columns // 2), (rows // 2 - 7, columns // 2 + 9)):
        picture = np.zeros((rows, columns, 3), np.uint8)
        picture[row - 3 : row + 3, column - 3 : column + 3] = 255
        seen = transform.pixels(Image.fromarray(picture))[..., 0].astype(float)
        assert seen.shape == (48, 64)
        found = [float((seen.sum(1 - axis) * np.arange(seen.shape[axis])).sum() / seen.sum()) + 0.5 for axis in (0, 1)]
        expected = [
            axis.scale * place - axis.cut for axis, place in zip(transform.axes(*shape), (row, column), strict=True)
        ]
        assert found == pytest.approx(expected, abs=0.8)


def test_padding_shows_everything_and_squashing_too():
    assert Transform((32, 32), fit="pad").shown_share(100, 400) == 1
    assert Transform((32, 32), fit="squash").shown_share(100, 400) == 1
    assert Transform((32, 32)).shown_share(100, 400) == pytest.approx(0.25)
    assert Transform((28, 28), (32, 32)).shown_share(50, 50) == pytest.approx((28 / 32) ** 2)


@pytest.mark.parametrize("transform", [Transform((7, 9)), Transform((7, 9), mean=HALF, std=HALF)])
def test_pixels_undo_the_normalisation(transform):
    shown = np.random.default_rng(0).integers(0, 256, (2, 7, 9, 3), np.uint8)
    batch = transform.normalise(shown)
    assert np.array_equal(transform.pixels(batch), shown)
    assert np.array_equal(transform.pixels(batch[1]), shown[1])
    with pytest.raises(ValueError, match="expected 3 channels"):
        transform.pixels(batch[:, :2])


def test_a_grey_model_sees_one_channel():
    transform = Transform((5, 6), mean=(0.25,), std=(0.5,))
    shown = transform.pixels(Image.new("RGB", (12, 10), (51, 51, 51)))
    assert transform.normalise(shown[None]).shape == (1, 1, 5, 6)
    assert transform.normalise(shown[None])[0, 0, 0, 0] == pytest.approx((0.2 - 0.25) / 0.5)
    assert np.array_equal(transform.pixels(transform.normalise(shown[None]))[0], shown)


def test_values_are_replaced_and_one_number_stands_for_all_channels():
    found = Transform.of(Transform((64, 64), (80, 80)), mean=[0.5], std=[0.25], size=(32, 64))
    assert (found.mean, found.std, found.size, found.cover) == (HALF, (0.25,) * 3, (32, 64), (40, 80))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"size": (0, 3)}, r"Transform\(size=\(0, 3\)\): expected \(rows, columns\) in pixels"),
        ({"size": (8, 8), "std": (1, 0, 1)}, "no standard deviation of 0"),
        ({"size": (8, 8), "mean": (1, 0)}, "expected one number per channel, 1 or 3"),
        ({"size": (8, 8), "fit": "stretch"}, r"Transform\(fit='stretch'\): expected one of"),
        ({"size": (8, 8), "range": (5, 5)}, r"range=\(5, 5\): expected two numbers, the lower first"),
    ],
)
def test_impossible_transforms(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Transform(**arguments)


def test_stores_of_older_versions_had_imagenets_numbers():
    assert Transform.from_dict({"size": [3, 4], "cover": [5, 6], "interpolation": "bilinear"}) == Transform(
        (3, 4), (5, 6), "bilinear"
    )


def test_imagenets_numbers_stand_in_one_place():
    from pathlib import Path

    root = Path(__file__).parents[2] / "mamba_attn"
    found = [path.name for path in root.rglob("*.py") if "0.485" in path.read_text() or "0.229" in path.read_text()]
    assert found == ["images.py"]
