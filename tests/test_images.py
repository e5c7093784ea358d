import contextlib
import os
import struct
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mamba_attn import images
from mamba_attn.images import ImageError

RAMP = np.add.outer(np.arange(20), np.arange(30)).astype(np.uint8) * 4  # (20, 30), 0 .. 192
COLOUR = np.stack([RAMP, 255 - RAMP, RAMP // 2], axis=-1)


def read(path):
    return np.asarray(images.read(path)).astype(int)


def saved(tmp_path, picture, name="a.png", **options):
    picture.save(tmp_path / name, **options)
    return tmp_path / name


def grey(values):
    return np.repeat(np.asarray(values)[..., None], 3, axis=2)


def test_six_images_come_with_the_package():
    found = images.samples()
    assert len(found) == 6
    assert len({path.name.split("_")[1] for path in found}) == 6
    for path in found:
        assert min(images.read(path).size) == 128
    assert "CC0 1.0" in (images.SAMPLES / "LICENSE.md").read_text()


def test_colour_is_kept(tmp_path):
    assert np.array_equal(read(saved(tmp_path, Image.fromarray(COLOUR))), COLOUR)


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_grey_bilevel_and_palette(tmp_path, mode):
    picture = Image.fromarray(RAMP).convert(mode)
    assert np.array_equal(read(saved(tmp_path, picture)), np.asarray(picture.convert("RGB")))


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    deep = RAMP.astype(np.uint16) * 257 + 1
    for name in ("a.png", "a.tif"):
        assert np.array_equal(read(saved(tmp_path, Image.fromarray(deep), name)), grey(RAMP))


def test_cmyk_looks_the_same(tmp_path):
    picture = Image.fromarray(np.full((16, 16, 3), (200, 100, 40), np.uint8)).convert("CMYK")
    shown = read(saved(tmp_path, picture, "a.jpg", quality=100))
    assert np.abs(shown - (200, 100, 40)).max() <= 6


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_lies_on_white(tmp_path, mode):
    picture = Image.fromarray(np.zeros((2, 2, 3), np.uint8)).convert(mode)
    picture.putalpha(Image.fromarray(np.array([[0, 255], [51, 255]], np.uint8)))
    assert np.array_equal(read(saved(tmp_path, picture)), grey([[255, 0], [204, 0]]))


def test_a_transparent_palette_colour_lies_on_white(tmp_path):
    picture = Image.new("P", (2, 1), 0)
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((1, 0), 1)
    assert read(saved(tmp_path, picture, transparency=0)).tolist() == [[[255, 255, 255], [40, 50, 60]]]


@pytest.mark.parametrize(("orientation", "turned"), [(3, lambda x: x[::-1, ::-1]), (6, lambda x: np.rot90(x, -1))])
def test_exif_turns_the_image(tmp_path, orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(read(saved(tmp_path, Image.fromarray(COLOUR), exif=exif)), turned(COLOUR))


def test_the_first_frame_is_read(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    path = saved(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
    assert read(path)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.webp", "a.tif", "a.bmp"])
@pytest.mark.parametrize("part", [0.95, 0.5, 0.02])
def test_truncated_files_are_named(tmp_path, name, part):
    path = saved(tmp_path, Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)), name)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ImageError, match=r"a\.\w+: (the image is damaged or incomplete \(.+\)|this is not an image)"):
        images.read(path)


def test_damaged_bytes_are_named_or_read(tmp_path):
    content = bytearray(saved(tmp_path, Image.fromarray(COLOUR)).read_bytes())
    for position in range(8, len(content), 3):
        damaged = content.copy()
        damaged[position] ^= 0xFF
        (tmp_path / "a.png").write_bytes(damaged)
        with contextlib.suppress(ImageError):  # nothing else may come out
            assert images.read(tmp_path / "a.png").mode == "RGB"


def test_what_is_no_image(tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(ImageError, match=r"text\.jpg: this is not an image"):
        images.read(tmp_path / "text.jpg")
    with pytest.raises(ImageError, match=r"none\.png: there is no such file"):
        images.read(tmp_path / "none.png")
    path = saved(tmp_path, Image.fromarray(RAMP.astype(np.float32)), "f.tif")
    with pytest.raises(ImageError, match=r"f\.tif: its values are floating-point numbers from 0 .*give range=\(0, "):
        images.read(path)


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_decompression_bombs_are_refused(tmp_path, side):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    with pytest.raises(ImageError, match=r"bomb\.png: refused, because it has more than 89,478,485 pixels"):
        images.read(tmp_path / "bomb.png")


@pytest.mark.parametrize("size", [(171, 128), (128, 171), (128, 128), (300, 257), (64, 40)])
def test_crop_is_shorter_side_to_size_then_the_centre(size):
    generator = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.rand(1, 3, 7, 7, generator=generator) * 255, size, mode="bicubic").clamp(0, 255)
    array = smooth[0].byte().movedim(0, 2).numpy()
    short = min(size)
    height, width = size[0] * 128 // short, size[1] * 128 // short
    whole = F.interpolate(torch.from_numpy(array).movedim(2, 0)[None], (height, width), mode="bilinear", antialias=True)
    top, left = round((height - 128) / 2), round((width - 128) / 2)
    expected = whole[0, :, top : top + 128, left : left + 128].movedim(0, 2).numpy().astype(int)
    actual = images.crop(Image.fromarray(array), (128, 128))
    assert actual.shape == (128, 128, 3)
    assert np.abs(actual - expected).max() <= 2  # the two round differently
    assert np.abs(actual - expected).mean() < 0.2


def test_crop_of_other_shapes():
    image = Image.fromarray(COLOUR)
    assert np.array_equal(images.crop(image, (20, 10)), COLOUR[:, 10:20])
    assert images.crop(image, (7, 33)).shape == (7, 33, 3)
    assert images.crop(Image.new("RGB", (1, 60_000)), (128, 128)).shape == (128, 128, 3)  # without 128 x 7,680,000
    assert images.crop(Image.new("L", (1, 1), 9), (3, 3)).tolist() == [[[9] * 3] * 3] * 3


def test_normalise_is_imagenets():
    pixel = images.normalise(np.array([[[[255, 0, 51]]]], np.uint8))
    assert pixel.shape == (1, 3, 1, 1)
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225]
    torch.testing.assert_close(pixel.flatten(), torch.tensor(expected))
    batch = images.normalise(np.random.default_rng(0).integers(0, 255, (2, 4, 5, 3), np.uint8))
    assert batch.shape == (2, 3, 4, 5)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("b.png", "a.JPG", "sub/c.png", "notes.txt", "odd[1].png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        (["."], ["a.JPG", "b.png", "odd[1].png"]),
        (["sub", "b.png"], ["sub/c.png", "b.png"]),
        (["*.png"], ["b.png", "odd[1].png"]),
        (["**/*.png"], ["b.png", "odd[1].png", "sub/c.png"]),
        (["odd[1].png"], ["odd[1].png"]),  # exists: not a pattern
        (["b.png", "./b.png", "*.png"], ["b.png", "odd[1].png"]),
        (["notes.txt"], ["notes.txt"]),  # asked for by name: reading says what is wrong
        (["~/b.png"], ["b.png"]),
    ],
)
def test_find_files_folders_and_patterns(folder, monkeypatch, patterns, found):
    monkeypatch.setenv("HOME", str(folder))
    assert [os.path.relpath(path, folder) for path in images.find(patterns)] == found


def test_a_folder_without_images_stands_for_those_below_it(tmp_path):
    for name in ("train/hat/1.png", "val/hat/2.png", "val/shoe/old/2.png", "val/.cache/3.png", "val/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in images.find([str(tmp_path)])]
    assert found == ["val/hat/2.png", "val/shoe/old/2.png"]
    assert [path.name for path in images.find([str(tmp_path / "train")])] == ["1.png"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("none.png", "there is no file or folder 'none.png'; give image files, folders or patterns"),
        ("empty", "the folder 'empty' holds no images"),
        ("*.gif", r"the pattern '\*\.gif' matches no file"),
    ],
)
def test_find_nothing(folder, pattern, message):
    with pytest.raises(FileNotFoundError, match=message):
        images.find(["b.png", pattern])
