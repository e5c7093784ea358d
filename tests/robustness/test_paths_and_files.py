"""Odd paths and files: each gets a sentence, at once, and costs no memory."""

import io
import os
import resource
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mamba_attn import analytics, images
from mamba_attn.commands import cli
from mamba_attn.core.requirements import writable
from mamba_attn.datasets.data import open_data
from mamba_attn.errors import local_path
from mamba_attn.images import ImageError


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "this is empty"),
        ("  ", "this is empty"),
        ("a\0b", "zero byte"),
        ("s3://bucket/store", "a path on this machine"),
        ("gs://bucket", "a path on this machine"),
        ("~nobody-of-this-name/x", "no home folder"),
    ],
)
def test_paths_that_are_none(text, reason):
    calls = [lambda: local_path("out", text), lambda: writable(text), lambda: images.find([text])]
    if "://" not in text:  # stores can be in object storage: tests/analytics/test_places.py
        calls.append(lambda: analytics.AttentionStore.open(text))
    for call in calls:
        with pytest.raises(ValueError, match=reason):
            call()
    with pytest.raises(ValueError, match=f"{reason}|give a folder of images"):
        open_data(text)
    assert not Path("s3:").exists()


def test_paths_that_are(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("out", "~/a") == tmp_path / "a"
    assert local_path("out", "c:/a") == Path("c:/a")
    assert local_path("out", tmp_path) == tmp_path


def test_commands_say_so(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["explain", "s3://bucket/a.jpg"]) == 2
    assert cli.main(["explain", ""]) == 2
    assert cli.main(["compare", "--data", "photos", "--seed", "9" * 40]) == 2
    told = capsys.readouterr().err
    assert "file='s3://bucket/a.jpg': expected a path on this machine, not an address" in told
    assert "this is empty" in told
    assert "expected a number below 4294967296" in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(ImageError, match="a pipe or a device"):
        images.find([str(tmp_path / "a.jpg")])
    with pytest.raises(FileNotFoundError, match="holds no images"):
        images.find([str(tmp_path)])


def test_a_program_is_no_image(tmp_path):
    """Pillow would hand PostScript to Ghostscript, whatever the file is called."""
    (tmp_path / "a.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(ImageError, match="not an image, or its format is not one"):
        images.read(tmp_path / "a.jpg")
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(buffer, "PNG")
    assert images.read(buffer).size == (4, 4)


def packed(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            if isinstance(content, int):
                with archive.open(name, "w", force_zip64=True) as file:
                    for _ in range(content // 2**20):
                        file.write(bytes(2**20))
            else:
                archive.writestr(name, content)
    return str(path)


def test_a_small_zip_that_unpacks_to_much_costs_nothing(tmp_path):
    data = open_data(packed(tmp_path / "a.zip", {"a.jpg": 600 * 2**20}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError, match=r"a\.jpg: 629 MB in one file, more than the 537 MB allowed"):
        data._picture(data.items[0], None)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


@pytest.mark.parametrize(
    ("table", "content", "reason"),
    [
        ("labels.csv", "file,label\na.png,999999999\n", "expected numbers of classes"),
        ("labels.csv", f"file,label\na.png,{10**20}\n", "expected numbers of classes"),
        ("boxes.csv", f"file,label,boxes_xyxy\na.png,0,{'[' * 50000}\n", "is not a valid table"),
        ("boxes.csv", f"file,label,boxes_xyxy\na.png,0,{'1' * 140000}\n", "is not a table that can be read"),
    ],
    ids=["large", "huge", "nested", "long"],
)
def test_tables_that_are_none(tmp_path, table, content, reason):
    with pytest.raises(ValueError, match=reason):
        open_data(packed(tmp_path / "a.zip", {table: content, "a.png": b""}))
