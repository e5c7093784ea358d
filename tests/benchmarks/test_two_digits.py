"""Two digits in an image: what the images are, and what maps get that see the class or do not."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import two_digits
from benchmarks.two_digits import Pair, combined, scores
from mamba_attn import models
from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.core.transform import Transform


def place(rows: slice, columns: slice) -> np.ndarray:
    found = np.zeros((64, 64), dtype=bool)
    found[rows, columns] = True
    return found


FIRST, SECOND = place(slice(2, 9), slice(3, 20)), place(slice(40, 60), slice(30, 40))


def test_the_second_digit_is_copied_and_nothing_else() -> None:
    one, other = (np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8) for seed in (0, 1))
    found = combined(one, 3, FIRST, other, 7, SECOND)
    assert found.labels == (3, 7)
    assert np.array_equal(found.pixels[SECOND], other[SECOND])
    assert np.array_equal(found.pixels[~SECOND], one[~SECOND])


def test_partners_have_other_classes_and_do_not_touch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_digits, "class_indices", lambda data, subject: [0, 1, 2, 3])
    places = [FIRST, place(slice(5, 12), slice(0, 9)), SECOND, SECOND, FIRST]  # the second touches the first
    labels = [0, 1, 0, 2, 3]

    class Digits:
        def chosen(self) -> list[int]:
            return [0, 1, 2, 3, 4]

        def load(self, index: int, transform: Transform) -> SimpleNamespace:
            pixels = np.full((64, 64, 3), index, dtype=np.uint8)
            return SimpleNamespace(pixels=pixels, inside=torch.from_numpy(places[index]).float(), label=labels[index])

    subject = LoadedModel(torch.nn.Identity(), Transform((64, 64)), tuple(map(str, range(4))))
    found = list(two_digits.pairs(Digits(), subject, 9))
    assert [(each.labels, each.pixels.min(), each.pixels.max()) for each in found] == [((1, 0), 1, 2), ((0, 2), 0, 3)]
    assert len(list(two_digits.pairs(Digits(), subject, 1))) == 1


@pytest.fixture
def subject() -> LoadedModel:
    model = models.create("vim_digits", weights="demo")
    return LoadedModel(model, Transform((64, 64)), tuple(map(str, range(10))), name="vim_digits")


def test_maps_that_do_not_see_the_class_get_fifty_and_one_that_turns_a_hundred(
    subject: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(2)
    pixels = [random.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(11)]
    images = subject.transform.normalise(np.stack(pixels))
    with torch.no_grad():
        top = subject.model(images).topk(2).indices.tolist()
    pairs = [Pair(each, tuple(its), (FIRST, SECOND)) for each, its in zip(pixels, top, strict=True)]
    pairs.append(pairs[0]._replace(labels=(top[0][0], 9 - top[0][1] if 9 - top[0][1] not in top[0] else top[0][1] - 1)))

    calls = itertools.count()

    class Turning:
        def attribute(self, images: torch.Tensor, target: list[int]) -> torch.Tensor:
            pair, which = pairs[(call := next(calls)) // 2], call % 2  # one image at a time, asked twice
            assert target == [pair.labels[which]]
            return torch.rand(1, 1, 64, 64) + torch.from_numpy(pair.places[which])

    found = scores(subject, pairs, ("raw_attention", "random", "centre"))
    assert (found["images"], found["asked"]) == (11, 12)  # of the last one the model sees another class
    assert set(found["scores"]) == {"raw_attention", "random", "centre"}
    for its in found["scores"].values():
        assert its == [50, 50, 50]
    monkeypatch.setattr(two_digits, "build", lambda *given: Turning())
    monkeypatch.setattr(two_digits, "_BATCH", 1)
    assert scores(subject, pairs, ("mamba_lrp",))["scores"]["mamba_lrp"] == [100, 100, 100]
    assert scores(subject, pairs, ("attn_lrp",))["scores"] == {}  # not for scans
