import json

import numpy as np
import pytest
import timm
import timm.optim
import torch
from torch import nn

from benchmarks import distil, images, train, zoo
from tests.benchmarks.cases import write_zip

# the runs' own files hold float16, and may be of another size
pytestmark = pytest.mark.filterwarnings("ignore:.*were cast to the model's float32", "ignore:.*its position embeddings")
TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2}


class Colours(nn.Module):
    """A teacher whose features are the mean colour and its squares; it can be killed."""

    def __init__(self, calls=None):
        super().__init__()
        self.calls = calls

    def forward(self, x):
        if self.calls is not None:
            self.calls -= 1
            if self.calls < 0:
                raise KeyboardInterrupt
        mean = x.float().mean((2, 3))
        return torch.cat([mean, mean**2], 1)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_zip(folder / "imagenette128.zip", ["tench", "church"], 40, 3, (32, 32))
    write_zip(folder / "clothing128.zip", ["dress", "hat", "shirt"], 30, 2, (48, 32))
    return folder, *(images.load(folder, folder / "cache", split) for split in ("train", "val"))


@pytest.fixture(scope="module")
def taught(splits, tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher")
    distil.cache(Colours(), *splits[1:], out, crops=2, pixels=24, width=6)
    return out


def _soft(teacher):
    return np.exp(teacher) / np.exp(teacher).sum(1, keepdims=True)


def test_a_killed_cache_resumes_to_the_same_arrays(splits, taught, tmp_path):
    for calls in (1, 3, 2):  # within a set, in the second set, and before the validation images
        with pytest.raises(KeyboardInterrupt):
            distil.cache(Colours(calls), *splits[1:], tmp_path, crops=2, pixels=24, width=6)
        assert not (tmp_path / "teacher.json").exists()
    distil.cache(Colours(), *splits[1:], tmp_path, crops=2, pixels=24, width=6)
    assert (tmp_path / "teacher.json").read_text() == (taught / "teacher.json").read_text()
    for name in ("soft-0.npz", "soft-1.npz", "head.npz"):
        whole, resumed = np.load(taught / name), np.load(tmp_path / name)
        for key in whole:
            np.testing.assert_array_equal(whole[key], resumed[key])


def test_more_crops_are_added_to_those_there(splits, taught, tmp_path):
    distil.cache(Colours(), *splits[1:], tmp_path, crops=1, pixels=24, width=6)
    distil.cache(Colours(3 + 1), *splits[1:], tmp_path, crops=2, pixels=24, width=6)  # 170 images, 64 at a time
    np.testing.assert_array_equal(np.load(tmp_path / "soft-1.npz")["logits"], np.load(taught / "soft-1.npz")["logits"])
    assert json.loads((tmp_path / "teacher.json").read_text())["crops"] == 2


def test_rows_that_are_half_written_are_computed_again(tmp_path):
    def compute(start, stop):
        return torch.arange(start, stop).float()[:, None].expand(-1, 3)

    distil.fill(tmp_path / "rows.npy", (10, 3), compute, chunk=4)
    torn = np.load(tmp_path / "rows.npy", mmap_mode="r+")
    torn[5, 2] = np.nan
    torn.flush()
    seen = []
    rows = distil.fill(tmp_path / "rows.npy", (10, 3), lambda *where: (seen.append(where), compute(*where))[1], chunk=4)
    assert seen == [(4, 8)]
    np.testing.assert_array_equal(rows, np.arange(10.0)[:, None].repeat(3, 1))


def test_targets_are_the_heads_answers_to_the_replayed_crops(splits, taught):
    _, split, _ = splits
    targets = distil.read(taught, split)
    assert targets.crops.shape == (2, 170, 4)
    assert targets.logits.shape == (2, 170, 5)
    head = np.load(taught / "head.npz")
    for epoch in range(4):
        chosen = images.chosen(split, 8, 0, epoch, 3)
        rectangles, logits, hints = targets.of(epoch, chosen)
        np.testing.assert_array_equal(rectangles, distil.draw(split, epoch % 2)[chosen])
        cuts = [images.cut(split, index, rectangle) for index, rectangle in zip(chosen, rectangles, strict=True)]
        features = distil.features_of(Colours(), cuts, 24).half().float()
        expected = features @ torch.from_numpy(head["weight"]).T + torch.from_numpy(head["bias"])
        torch.testing.assert_close(logits, expected, rtol=2e-3, atol=0.02)  # bfloat16 depends on the batch
        expected = features @ torch.from_numpy(head["basis"]) + torch.from_numpy(head["offset"])
        torch.testing.assert_close(hints, expected, rtol=2e-3, atol=0.05)
        x, _ = images.train_batch(split, 16, chosen, 0, epoch, 3, rectangles)
        again, _ = images.train_batch(split, 16, chosen, 0, epoch, 3, rectangles)
        other, _ = images.train_batch(split, 16, chosen, 0, epoch, 3)
        assert torch.equal(x, again)
        assert not torch.equal(x, other)
    assert not np.array_equal(targets.crops[0], targets.crops[1])


def test_a_batch_shows_the_crops_it_is_given(splits):
    _, split, _ = splits
    chosen = images.chosen(split, 6, 0, 0, 0)
    rectangles = np.array([(3, 5, 20, 17)] * 6)
    x, labels = images.train_batch(split, 20, chosen, 0, 0, 0, rectangles)
    assert labels.tolist() == split.labels[chosen].tolist()
    corner = images.cut(split, int(chosen[0]), (3, 5, 20, 17))
    assert torch.equal(corner, split.image(int(chosen[0]))[..., 3:23, 5:22])
    crop = torch.nn.functional.interpolate(corner, size=(20, 20), mode="bilinear", antialias=True)
    grey = images._grey(x[:1]).flatten().double()  # colours are jittered, structure is not
    plain, mirrored = (images._grey(images.normalise(one.float() / 255)).flatten() for one in (crop, crop.flip(-1)))
    alike = max(torch.corrcoef(torch.stack([grey, one.double()]))[0, 1].item() for one in (plain, mirrored))
    assert alike > 0.97


@pytest.mark.parametrize("blended", [False, True])
def test_the_loss_is_the_published_formula(blended):
    random = np.random.default_rng(0)
    student, teacher = random.normal(size=(2, 5, 7)) * 3
    share = random.uniform(size=(5, 1))
    mixing = share * np.eye(5) + (1 - share) * np.eye(5)[::-1] if blended else np.eye(5)
    target, answer = mixing @ _soft(teacher / 2), _soft(student / 2)
    expected = 4 * (target * np.log(target / answer)).sum(1).mean() + 0.1 * 1.5
    given = torch.from_numpy(mixing) if blended else None
    value = distil.loss(torch.from_numpy(student), torch.from_numpy(teacher), torch.tensor(1.5).double(), given)
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_a_student_that_answers_as_the_teacher_is_left_alone():
    teacher = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    student = (teacher + 3).requires_grad_()  # softmax does not see a shift
    distil.loss(student, teacher, torch.zeros(())).backward()
    assert student.grad.abs().max() < 1e-12


def test_mixing_shares_give_the_blended_labels_of_timm():
    from timm.data import Mixup

    blend = {"mixup_alpha": 0.2, "cutmix_alpha": 1.0, "label_smoothing": 0.0}
    x, y = torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 2, 1, 1])
    for seed in range(4):
        np.random.seed(seed)
        _, expected = Mixup(num_classes=3, **blend)(x.clone(), y)
        np.random.seed(seed)
        _, mixing = Mixup(num_classes=6, **blend)(x.clone(), torch.arange(6))
        torch.testing.assert_close(mixing @ nn.functional.one_hot(y, 3).float(), expected)
        assert not torch.equal(mixing, torch.eye(6))


def test_the_head_finds_what_separates_classes_at_any_scale():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    noise = torch.randn(300, 4, generator=generator)
    features = torch.cat([nn.functional.one_hot(labels, 3) * 0.02 + 5, noise * 100], 1)
    weight, bias, penalty = distil.fit_head(features, labels, 3)
    assert (features @ weight.T + bias).argmax(1).equal(labels)
    assert penalty in distil.PENALTIES
    many = torch.randn(60, 40, generator=generator)  # nothing to find: the strongest penalty serves best
    _, _, cautious = distil.fit_head(many, labels[:60], 3)
    assert cautious == max(distil.PENALTIES)


def test_targets_of_other_images_and_of_an_unfinished_teacher_are_refused(splits, taught, tmp_path):
    folder, split, _ = splits
    with pytest.raises(ValueError, match="its targets are of other images"):
        distil.read(taught, images.load(folder, folder / "cache", "train", limit=20))
    with pytest.raises(FileNotFoundError, match=r"expected teacher\.json there"):
        distil.read(tmp_path, split)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_student_learns_from_the_teacher_and_its_card_names_it(splits, taught, tmp_path, optimizer):
    if optimizer == "muon" and "nmuon" not in timm.optim.list_optimizers():
        pytest.skip(f"timm {timm.__version__} has no Muon")
    threads = torch.get_num_threads()
    command = [
        "vit_micro", "--data", str(splits[0]), "--out", str(tmp_path / "run"), "--pixels", "16", "--epochs", "4",
        "--batch", "16", "--options", json.dumps(TINY), "--mixup", "0.5", "--lr", "0.01",
        "--optimizer", optimizer, "--teacher", str(taught),
    ]  # fmt: skip
    train.main(command)
    torch.set_num_threads(threads)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"]
    card = json.loads((tmp_path / "run" / "vit_micro.json").read_text())
    assert card["recipe"]["teacher"]["license"].startswith("Apache-2.0")
    assert "2 fixed crops" in card["recipe"]["augmentation"]
    assert ("Muon" in card["recipe"]["optimizer"]) == (optimizer == "muon")
    with pytest.raises(ValueError, match=r"run with \{'crops': 2, 'hints': 6\}, this one has \{'crops': 0"):
        train.main(command[:-2])


def test_components_are_the_directions_of_most_variance():
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([[1.0, 0.9, 0.0], [0.0, 0.3, 0.1]])
    features = torch.randn(4000, 2, generator=generator) @ spread * torch.tensor([1.0, 1.0, 50.0]) + 7
    basis, offset = distil.principal(features, 2)
    hints = features @ basis + offset
    expected = torch.from_numpy(np.linalg.svd(((features - features.mean(0)) / features.std(0)).numpy())[2][:2])
    torch.testing.assert_close(hints.mean(0), torch.zeros(2), rtol=0, atol=1e-3)
    assert hints.var(0)[0] > hints.var(0)[1] > 0
    directions = (basis * features.std(0)[:, None]).T
    torch.testing.assert_close((directions @ expected.T).abs().diagonal(), torch.ones(2), rtol=0, atol=2e-2)


def test_hints_of_a_blend_are_blended_and_their_length_does_not_count():
    teacher = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    mixing = torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    student = torch.tensor([[3.0, 6.0], [0.0, -1.0]])  # along the blend, and against
    assert distil.hint_loss(student, teacher, mixing).item() == pytest.approx(3 * (0 + 2) / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [("vit_micro", TINY), ("vim_micro", {"embed_dim": 16, "depth": 2}), ("vmamba_micro", {"dims": 8})],
)
def test_a_students_features_are_what_its_classifier_reads(name, options):
    model = zoo.create(name, num_classes=5, image_size=32, **options)
    projection = distil.Projection(model, 7)
    logits = model(torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    head = getattr(model, "classifier", model).head
    torch.testing.assert_close(head(projection.read), logits)
    assert projection().shape == (3, 7)


def test_muon_gets_the_matrices_that_decay_and_everything_is_trained_once():
    model = zoo.create("vim_micro", num_classes=5, image_size=32, embed_dim=16, depth=1)
    groups = zoo.muon_groups(zoo.decay_groups(model, 0.05))
    names = {id(p): name for name, p in model.named_parameters()}
    chosen = {names[id(p)]: group["use_fallback"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(chosen) == len(names)
    muon = {name for name, fallback in chosen.items() if not fallback}
    mixer = "layers.0.mixer."
    assert {f"{mixer}in_proj.weight", f"{mixer}out_proj.weight", f"{mixer}x_proj.weight", "head.weight"} <= muon
    assert not muon & {f"{mixer}A_log", f"{mixer}D", f"{mixer}conv1d.weight", "pos_embed", "patch_embed.proj.weight"}


def test_packages_without_the_teacher_are_refused(tmp_path):
    with pytest.raises(ImportError, match="expected the teacher there"):
        distil.load_teacher(tmp_path, 128)
