"""A receptive field in parts: the same bits whoever measures them, and nothing twice after a kill."""

import hashlib
import os

import numpy as np
import pytest

from mamba_attn import images, models
from mamba_attn.distributed import Ranks
from mamba_attn.erf import parts
from mamba_attn.erf.fields import FieldSum, receptive_field
from mamba_attn.erf.parts import FieldParts
from tests.explanations.cases import VIM, VMAMBA


@pytest.fixture(scope="module")
def model():
    return models.create("vmamba_micro", **VMAMBA).eval()


@pytest.fixture
def pictures(monkeypatch):
    monkeypatch.setattr(parts, "PART", 2)
    size = VMAMBA["image_size"]
    random = np.random.default_rng(0)
    return [images.normalise(random.integers(0, 255, (1, *size, 3), dtype=np.uint8)) for _ in range(5)]


def fields(folder, model, pictures, about="these", read=lambda picture: picture, query=None):
    identities = [hashlib.sha256(its.numpy().tobytes()).hexdigest() for its in pictures]
    images = [lambda its=its: read(its) for its in pictures]
    return FieldParts(folder, about, identities, images, lambda: FieldSum(model, query))


def same(one, other):
    first, second = one.arrays(), other.arrays()
    return first.keys() == second.keys() and all(first[name].tobytes() == second[name].tobytes() for name in first)


def test_ranks_in_any_order_give_the_field_of_one_process(model, pictures, tmp_path):
    alone = fields(tmp_path / "alone", model, pictures)
    told = []
    assert alone.measure(Ranks(), told.append) == 0
    assert sum(told) == 5
    for rank in (2, 0, 1):
        its = fields(tmp_path / "three", model, pictures)
        left = its.measure(Ranks(rank, 3, launcher="a job array"))
    assert left == 0
    assert same(its.result(), alone.result())
    once = receptive_field(model, pictures)
    found = alone.result()
    np.testing.assert_allclose(found.gradient, once.gradient, rtol=1e-12)
    assert (found.images, found.layer, found.reader, found.centre) == (5, once.layer, once.reader, once.centre)
    for name, row in once.reach.rows.items():
        np.testing.assert_allclose(found.reach.rows[name], row, rtol=1e-12)
    np.testing.assert_allclose(found.reach.rollout, once.reach.rollout, rtol=1e-12)
    assert found.reach.row_distance == pytest.approx(once.reach.row_distance)
    assert found.reach.mean_distance == pytest.approx(once.reach.mean_distance)
    assert found.reach.note == once.reach.note


def test_what_is_saved_is_not_measured_again(model, pictures, tmp_path):
    read, tries = [], iter([None, None, None, KeyboardInterrupt])

    def sometimes(picture):
        read.append(1)
        if (error := next(tries, None)) is not None:
            raise error
        return picture

    its = fields(tmp_path, model, pictures, read=sometimes)
    with pytest.raises(KeyboardInterrupt):
        its.measure(Ranks())
    assert its.measure(Ranks()) == 0
    assert len(read) == 4 + 3  # the first part stays
    whole = fields(tmp_path / "other", model, pictures)
    whole.measure(Ranks())
    assert same(its.result(), whole.result())
    other = fields(tmp_path, model, pictures, about="those", read=sometimes)
    other.measure(Ranks())
    assert len(read) == 7 + 5  # other images, weights or tokens


def test_damaged_and_infinite_images_are_named(model, pictures, tmp_path):
    def damaged(picture):
        if picture is pictures[1]:
            raise images.ImageError("one.png: the image is damaged")
        return picture

    pictures[3] = pictures[3] * np.nan
    its = fields(tmp_path, model, pictures, read=damaged)
    its.measure(Ranks())
    assert its.damaged == ["one.png: the image is damaged"]
    assert (its.result().images, its.result().skipped) == (3, [2])  # of those that were read


def test_no_image_at_all(model, pictures, tmp_path):
    def damaged(picture):
        raise images.ImageError("damaged")

    its = fields(tmp_path, model, pictures, read=damaged)
    its.measure(Ranks())
    with pytest.raises(ValueError, match="expected at least one image"):
        its.result()


@pytest.mark.parametrize("query", [None, "class"])
def test_more_images_or_fewer_find_what_is_measured(model, pictures, tmp_path, query):
    """3 images: a whole part and a begun one, which the next call goes on with; and the same bits at once."""
    if query == "class":
        model = models.create("vim_micro", **VIM).eval()
        pictures = [picture[..., : VIM["image_size"], : VIM["image_size"]] for picture in pictures]
    asked = []

    def few(count, folder=tmp_path / "same"):
        def read(picture):
            asked.append(next(at for at, its in enumerate(pictures) if its is picture))
            return picture

        its = fields(folder, model, pictures[:count], read=read, query=query)
        told = []
        its.measure(Ranks(), told.append)
        assert sum(told) == count
        return its.result()

    three = few(3)
    assert asked == [0, 1, 2]
    four = few(4)
    assert asked == [0, 1, 2, 3]
    five, again = few(5), few(3)
    assert asked == [0, 1, 2, 3, 4]
    assert same(three, again)
    assert same(four, few(4, tmp_path / "at once"))
    assert (three.images, five.images) == (3, 5)


def test_a_begun_part_keeps_what_was_damaged_and_infinite(model, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART", 4)

    def read(picture):
        if picture is pictures[0]:
            raise images.ImageError("damaged")
        return picture

    pictures[1] = pictures[1] * np.nan
    for count in (2, 5):
        its = fields(tmp_path, model, pictures[:count], read=read)
        its.measure(Ranks())
    assert its.damaged == ["damaged"]
    assert (its.result().images, its.result().skipped) == (3, [0])


def test_parts_of_images_that_are_gone_are_removed_and_others_stay(model, pictures, tmp_path):
    def identities(its):
        return lambda: its.identities

    whole = fields(tmp_path, model, pictures)
    whole.measure(Ranks())
    few = fields(tmp_path, model, pictures[:1])
    few.measure(Ranks())
    few.tidy(identities(whole))
    assert {*whole.place.names()} == {*whole.names, *few.names}  # a larger limit still finds them
    changed = fields(tmp_path, model, [pictures[0] * 0, *pictures[1:]])
    changed.measure(Ranks())
    changed.tidy(identities(changed))
    assert {*whole.place.names()} == {*changed.names}
    assert changed.names[1:] == whole.names[1:]

    changed.tidy(lambda: pytest.fail("asked for all images where no part is too many"))


def test_the_last_questions_stay(model, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "QUESTIONS", 2)
    kept = []
    for at, about in enumerate(("first", "second", "third", "first")):
        its = fields(tmp_path, model, pictures[:1], about=about)
        its.measure(Ranks())
        its.tidy(lambda: [])
        os.utime(its.place.path, (at, at))
        parts.tidy_questions(tmp_path)
        kept.append(len([*tmp_path.iterdir()]))
    assert kept == [1, 2, 2, 2]
    assert {path.name for path in tmp_path.iterdir()} == {
        fields(tmp_path, model, [], about=about).place.name for about in ("third", "first")
    }
