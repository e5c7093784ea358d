"""Selectors: what they read, and what they say where there is nothing to read."""

import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from mamba_attn import models
from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.core.transform import Transform
from mamba_attn.datasets.class_names import class_indices
from mamba_attn.datasets.data import open_data
from mamba_attn.datasets.samples import HALVES, Data, half_of
from mamba_attn.images import ImageError
from tests.datasets import cases

WHOLE = Transform((40, 32), (40, 32), "bilinear")
SQUARE = Transform((16, 16), (16, 16), "bilinear")


def loaded(data, transform=WHOLE):
    return {data.items[index].key: data.load(index, transform) for index in range(len(data))}


def test_boxes_and_labels(tmp_path):
    data = open_data(f"{cases.boxes_zip(tmp_path / 'a.zip')}:boxes")
    assert (data.name, data.truth, data.classes, len(data)) == ("a.zip:boxes", "boxes", cases.CLASSES, 6)
    found = loaded(data)
    first = found["images/1.png"]
    assert np.array_equal(first.pixels, cases.picture(1))
    assert first.label == 1
    expected = torch.zeros(40, 32)
    expected[8:24, 4:20] = 1
    assert torch.equal(first.inside, expected)
    assert found["images/5.png"].inside is None
    assert first.distractor is None
    small = loaded(data, SQUARE)["images/1.png"]
    assert small.pixels.shape == (16, 16, 3)
    assert small.inside.shape == (16, 16)
    assert small.inside.sum() == pytest.approx(8 * 8, rel=0.05)


def test_masks_with_a_distractor_and_the_split(tmp_path):
    path = cases.digits_zip(tmp_path / "a.zip")
    data = open_data(f"{path}:digits")
    assert [item.key.split("/")[0] for item in data.items] == ["val"] * 4
    sample = loaded(data)["val/2.jpg"]
    assert sample.inside.sum() == sample.distractor.sum() == 64
    assert sample.inside[8:16, 4:12].min() == sample.distractor[24:32, 20:28].min() == 1
    assert data.classes == ["0", "1", "2"]
    train = open_data(f"{path}:digits/train")
    assert {item.key.split("/")[0] for item in train.items} == {"train"}
    assert train.identity != data.identity


def test_segments_of_things(tmp_path):
    data = open_data(f"{cases.segments_zip(tmp_path / 'a.zip')}:masks")
    found = loaded(data)
    assert data.classes == []
    assert found["images/a.jpg"].inside.sum() == 10 * 16
    assert found["images/b.jpg"].inside.sum() == 0
    assert found["images/a.jpg"].label is None
    assert "all things" in data.note


def test_folders_and_zips_of_images(tmp_path):
    folder = cases.class_folders(tmp_path / "photos")
    data = open_data(str(folder))
    assert data.classes == sorted(cases.CLASSES)
    assert {item.key: data.classes[item.label] for item in data.items}["green/2.png"] == "green"
    one = open_data(f"{folder}:red")
    assert (len(one), one.classes, one.items[0].label) == (3, [], None)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for file in folder.rglob("*.png"):
            archive.write(file, f"val/{file.relative_to(folder)}")
            archive.write(file, f"train/{file.relative_to(folder)}")
    zipped = open_data(str(tmp_path / "b.zip"))
    assert (len(zipped), zipped.classes) == (9, data.classes)
    assert np.array_equal(loaded(zipped)["val/red/0.png"].pixels, loaded(data)["red/0.png"].pixels)


def test_imagenet_segmentation(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "gtsegs.mat", "w") as file:
        for name in ("img", "gt"):
            file.create_dataset(f"value/{name}", (2, 1), dtype=h5py.ref_dtype)
        for index in range(2):
            mask = np.zeros((40, 32), np.uint8)
            mask[4:12, 8:10] = 1
            image = file.create_dataset(f"#refs#/i{index}", data=cases.picture(index).transpose(2, 1, 0))
            inner = file.create_dataset(f"#refs#/m{index}", data=mask.T)
            outer = file.create_dataset(f"#refs#/o{index}", (1, 1), dtype=h5py.ref_dtype)
            outer[0, 0] = inner.ref
            file["value/img"][index, 0], file["value/gt"][index, 0] = image.ref, outer.ref
    data = open_data(str(tmp_path / "gtsegs.mat"))
    sample = loaded(data)["00001"]
    assert np.array_equal(sample.pixels, cases.picture(1))
    assert sample.inside[4:12, 8:10].min() == 1
    assert sample.inside.sum() == 16
    assert sample.label is None
    (tmp_path / "other.mat").write_bytes(b"MATLAB 5.0 MAT-file")
    with pytest.raises(ValueError, match=r"expected the MATLAB v7.3 file of ImageNet-Segmentation"):
        open_data(str(tmp_path / "other.mat"))


def test_without_h5py_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    (tmp_path / "a.mat").touch()
    with pytest.raises(ImportError, match=r"needs h5py: pip install 'mamba_attn\[hdf5\]'"):
        open_data(str(tmp_path / "a.mat"))


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("none.zip", "no such file or folder"),
        ("a.zip", "it has several parts; choose one. Its parts: boxes, digits."),
        ("a.zip:boxs", "it has no folder 'boxs'. Its parts: boxes, digits."),
        ("text.zip", "this is not a zip file"),
        ("text.txt", "expected a folder, a .zip or a .mat file"),
        ("empty", "it holds no images"),
        ("bad.zip", "labels.csv is not a valid table"),
        ("digits.zip:digits/test", "it has no folder 'digits/test'"),
    ],
)
def test_what_is_no_collection(tmp_path, monkeypatch, selector, message):
    monkeypatch.chdir(tmp_path)
    cases.digits_zip(cases.boxes_zip(tmp_path / "a.zip"))
    cases.digits_zip(tmp_path / "digits.zip")
    for name in ("text.zip", "text.txt"):
        (tmp_path / name).write_text("text")
    (tmp_path / "empty").mkdir()
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("labels.csv", "name,colour\na,b\n")
        archive.writestr("a.png", b"")
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        open_data(selector)
    assert message in str(error.value)


def test_damaged_images_are_an_error_of_their_own(tmp_path):
    path = tmp_path / "a.zip"
    cases.digits_zip(path)
    bad = {"digits/val/0.jpg": b"not an image", "digits/val/1.png": cases.encoded(np.zeros((5, 5), np.uint8))}
    with zipfile.ZipFile(path) as good, zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for name in good.namelist():
            archive.writestr(name, bad.get(name, good.read(name)))
    data = open_data(f"{tmp_path / 'b.zip'}:digits")
    places = {item.key: index for index, item in enumerate(data.items)}
    with pytest.raises(ImageError, match=r"b.zip: digits/val/0.jpg: this is not an image"):
        data.load(places["val/0.jpg"], WHOLE)
    with pytest.raises(ImageError, match="its mask has"):
        data.load(places["val/1.jpg"], WHOLE)


def test_a_damaged_stream_in_a_zip_is_an_error_of_its_image(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.ppm", b"P6 32 40 255\n" + cases.picture(0).tobytes() + bytes(4000))
        start = archive.infolist()[0].header_offset + 30 + len("0.ppm")
    content = bytearray(path.read_bytes())
    content[start : start + 300] = bytes(byte ^ 0x5A for byte in content[start : start + 300])
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"a\.zip: 0\.ppm: the zip is damaged at this file"):
        open_data(str(path)).load(0, WHOLE)


@pytest.mark.parametrize(
    "boxes", [[[1, 2, 3]], [[9, 2, 3, 9]], [[1, 9, 3, 9]], [[float("nan"), 2, 3, 9]], [[1, 2, float("inf"), 9]],
              [1, 2, 3, 9], {"x0": 1}, [["1", "2", "3", "9"]], [[4, 8, 20, 24], None]]
)  # fmt: skip
def test_what_is_no_box_is_an_error_of_its_image(tmp_path, boxes):
    rows = [{"file": f"{index}.png", "label": 0, "name": "red", "boxes_xyxy": json.dumps(its)}
            for index, its in enumerate(([[4, 8, 20, 24]], boxes))]  # fmt: skip
    for index in range(2):
        (tmp_path / f"{index}.png").write_bytes(cases.encoded(cases.picture(index)))
    (tmp_path / "boxes.csv").write_text(cases.table(rows))
    data = open_data(str(tmp_path))
    places = {item.key: index for index, item in enumerate(data.items)}
    assert data.load(places["0.png"], WHOLE).inside.sum() == 16 * 16
    with pytest.raises(ImageError, match=r"1\.png: expected boxes \[x0, y0, x1, y1\] with x0 < x1 and y0 < y1, got"):
        data.load(places["1.png"], WHOLE)


def test_masks_that_are_absent_or_in_colours(tmp_path):
    mask = np.zeros((40, 32), np.uint8)
    mask[8:16, 4:12] = 1
    palette = Image.fromarray(mask).convert("P")
    palette.putpalette([0, 0, 0, 128, 0, 0] + [0] * 762)
    palette.save(tmp_path / "1m.png")
    rows = [{"file": f"{index}.png", "label": 0, "mask": mask} for index, mask in enumerate(("", "1m.png"))]
    for index in range(2):
        (tmp_path / f"{index}.png").write_bytes(cases.encoded(cases.picture(index)))
    (tmp_path / "labels.csv").write_text(cases.table(rows))
    data = open_data(str(tmp_path))
    places = {item.key: index for index, item in enumerate(data.items)}
    assert data.load(places["0.png"], WHOLE).inside is None
    with pytest.raises(ImageError, match=r"1\.png: its mask has colours; expected 8-bit grey"):
        data.load(places["1.png"], WHOLE)


def test_a_label_below_zero_is_no_last_class(tmp_path):
    (tmp_path / "labels.csv").write_text(cases.table([{"file": "0.png", "label": -1}]))
    with pytest.raises(ValueError, match=r"label -1 of 0\.png is below 0"):
        open_data(str(tmp_path))


def test_a_longer_run_holds_the_shorter_one_and_halves_do_not_meet(tmp_path):
    data = open_data(str(cases.class_folders(tmp_path / "photos", count=20)))
    assert data.chosen("all", 7) == data.chosen("all")[:7]
    halves = [set(data.chosen(half)) for half in HALVES]
    assert not halves[0] & halves[1]
    assert halves[0] | halves[1] == set(range(60))
    assert min(map(len, halves)) > 15
    assert {half_of(data.items[index].key) for index in data.chosen("choose")} == {"choose"}
    labels = {data.items[index].label for index in data.chosen("all", 12)}
    assert labels == {0, 1, 2}  # not one class after the other


class Labels(Data):
    _picture = _regions = None

    def __init__(self, classes, imagenet=None):
        super().__init__("", "", [], classes=classes, imagenet=imagenet)


def test_labels_find_the_models_classes():
    model = models.create("vim_micro", depth=1, num_classes=4)
    transform = models.transform("vim_micro")
    subject = LoadedModel(model, transform, ["Tench", "church", "gas pump", "church"])
    assert class_indices(Labels(["gas pump", "tench", "church", "dog"]), subject) == [2, 0, None, None]
    thousand = LoadedModel(model, transform, [f"class {index}" for index in range(1000)])
    assert class_indices(Labels(["tench", "church"], [0, 497]), thousand) == [0, 497]
    assert class_indices(Labels(["n03028079", "n01440764"]), thousand) == [497, 0]
    assert class_indices(Labels(["tench"]), thousand) == [None]
