import json
import zipfile

import numpy as np
import pytest
import torch

from benchmarks import images, train, zoo
from mamba_attn.errors import WeightsError
from tests.benchmarks.cases import jpeg, write_zip

# the runs' own files hold float16, and may be of another size
pytestmark = pytest.mark.filterwarnings("ignore:.*were cast to the model's float32", "ignore:.*its position embeddings")
TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.fixture(autouse=True)
def _threads():
    """train.main sets the number of threads of its process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_zip(folder / "imagenette128.zip", ["tench", "church"], 6, 2, (32, 32))
    write_zip(folder / "clothing128.zip", ["dress", "hat"], 4, 2, (48, 32))
    return folder


def _command(data, out, *more, epochs=3):
    return [
        "vit_micro", "--data", str(data), "--out", str(out), "--pixels", "16", "--epochs", str(epochs),
        "--batch", "4", "--options", json.dumps(TINY), *more,
    ]  # fmt: skip


def test_the_zips_become_one_data_set(data, tmp_path):
    split = images.load(data, tmp_path, "val")
    assert split.classes == ["tench", "church", "dress", "hat"]
    assert split.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert split.image(0).shape == (1, 3, 32, 32)
    assert split.image(7).shape == (1, 3, 48, 32)
    mean = [split.image(index).float().mean().item() for index in range(8)]
    assert mean == pytest.approx([80, 80, 140, 140] * 2, abs=6)
    again = images.load(data, tmp_path, "val")  # from the cache
    assert torch.equal(again.image(5), split.image(5))
    assert len(images.load(data, tmp_path, "train", limit=5)) == 5


def test_digits_are_read_from_a_folder_of_a_zip_and_never_mirrored(tmp_path):
    random = np.random.default_rng(0)
    with zipfile.ZipFile(tmp_path / "localise.zip", "w") as archive:
        rows = ["file,mask,label"]
        for index in range(8):
            array = np.zeros((32, 32, 3), np.uint8)
            array[:, 16:] = random.integers(100, 256, (32, 16, 3), np.uint8)  # bright on the right
            rows.append(f"train/{index}.jpg,train/{index}.png,{index % 2}")
            archive.writestr(f"digits64/train/{index}.jpg", jpeg(array))
        archive.writestr("digits64/labels.csv", "\n".join(rows))
    split = images.load(tmp_path, tmp_path / "cache", "train", collection="digits")
    assert split.classes == ["0", "1"]
    assert split.labels.tolist() == [0, 1] * 4
    for epoch in range(4):
        x, _ = images.train_batch(split, 32, images.chosen(split, 8, 0, epoch, 0), 0, epoch, 0)
        assert bool((x[..., 20:].mean((1, 2, 3)) > x[..., :12].mean((1, 2, 3))).all())


def test_a_missing_zip_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected imagenette128\.zip there"):
        images.load(tmp_path, tmp_path, "train")


def test_an_epoch_visits_every_image_once_in_an_order_of_its_own(data, tmp_path):
    split = images.load(data, tmp_path, "train")
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        shown = [images.chosen(split, 4, seed, epoch, step) for step in range(5)]
        labels = torch.cat([images.train_batch(split, 16, its, seed, epoch, step)[1] for step, its in enumerate(shown)])
        assert labels.bincount().tolist() == [6, 6, 4, 4]
        orders.append(labels.tolist())
    assert orders[0] != orders[1] != orders[2] != orders[0]
    first, again = (images.train_batch(split, 16, images.chosen(split, 4, 0, 1, 2), 0, 1, 2) for _ in range(2))
    assert torch.equal(first[0], again[0])


def test_balanced_epochs_show_small_classes_more_often_and_forget_no_image_of_them():
    counts = np.array([5, 40, 320])
    table = np.zeros((counts.sum(), 5), np.int64)
    table[:, 4] = np.repeat(np.arange(3), counts)
    split = images.Images([], table, ["a", "b", "c"])
    for balance in (0.0, 0.5, 1.0):
        steps = len(split) // 5
        shown = np.stack([images.chosen(split, 5, 3, 1, step, balance) for step in range(steps)])
        share = np.bincount(split.table[shown.ravel(), 4], minlength=3) / shown.size
        expected = counts ** (1 - balance) / (counts ** (1 - balance)).sum()
        np.testing.assert_allclose(share, expected, atol=0.01)
        assert set(range(45)) <= set(shown.ravel().tolist())
        assert np.array_equal(images.chosen(split, 5, 3, 1, 2, balance), shown[2])
    spread = np.bincount(shown.ravel(), minlength=len(split))[45:]  # of the largest class, none comes twice
    assert spread.max() == 1


def test_evaluation_is_resize_and_centre_crop(data, tmp_path):
    split = images.load(data, tmp_path, "val")
    x, y = next(images.evaluation_batches(split, 32, 8))
    expected = images.normalise(split.image(7)[:, :, 8:40].float() / 255)  # 48 x 32: shorter side fits already
    torch.testing.assert_close(x[7:], expected)
    assert y.tolist() == split.labels.tolist()
    assert next(images.evaluation_batches(split, 16, 3))[0].shape == (3, 3, 16, 16)


def test_colour_jitter_of_one_changes_nothing_and_of_less_darkens_and_greys():
    x = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(3, 2, 1, 1, 1)
    torch.testing.assert_close(images._jitter(x.clone(), ones), x)
    brightness = images._jitter(x.clone(), ones * torch.tensor([0.5, 1, 1]).view(3, 1, 1, 1, 1))
    torch.testing.assert_close(brightness, x / 2)
    grey = images._jitter(x.clone(), ones * torch.tensor([1.0, 1, 0]).view(3, 1, 1, 1, 1))
    torch.testing.assert_close(grey, images._grey(x).expand_as(x))
    flat = images._jitter(x.clone(), ones * torch.tensor([1.0, 0, 1]).view(3, 1, 1, 1, 1))
    torch.testing.assert_close(flat, images._grey(x).mean((2, 3), keepdim=True).expand_as(x))


def test_a_killed_run_resumes_to_the_same_weights(data, tmp_path, monkeypatch):
    cache = ("--cache", str(tmp_path / "cache"))
    train.main(_command(data, tmp_path / "whole", *cache))

    advance = train.Run.advance

    def killed(run):
        if run.step == 7:  # in the middle of the second of three epochs of five steps
            raise KeyboardInterrupt
        return advance(run)

    command = _command(data, tmp_path / "killed", "--checkpoint-minutes", "0", *cache)
    monkeypatch.setattr(train.Run, "advance", killed)
    with pytest.raises(KeyboardInterrupt):
        train.main(command)
    assert torch.load(tmp_path / "killed" / "last.pt", weights_only=True)["step"] == 7
    monkeypatch.setattr(train.Run, "advance", advance)
    train.main(command)

    whole, resumed = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "killed"))
    assert whole["step"] == resumed["step"] == 15
    for part in ("model", "ema"):
        for name, value in whole[part].items():
            assert torch.equal(value, resumed[part][name]), name
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    ]
    assert [entry["epoch"] for entry in logs[1]] == [1, 2, 3]
    assert [(entry["loss"], entry["top1"]) for entry in logs[0]] == [
        (entry["loss"], entry["top1"]) for entry in logs[1]
    ]


def test_another_run_in_the_folder_is_refused(data, tmp_path):
    train.main(_command(data, tmp_path / "run", "--minutes", "0"))
    with pytest.raises(ValueError, match=r"belongs to a run with \{'seed': 0\}, this one has \{'seed': 1\}"):
        train.main(_command(data, tmp_path / "run", "--seed", "1"))


def test_minutes_stop_the_run_and_export_writes_it(data, tmp_path):
    out = tmp_path / "run"
    train.main(_command(data, out, "--minutes", "0"))
    assert not (out / "vit_micro.safetensors").exists()
    train.main(_command(data, out, "--export"))
    assert json.loads((out / "vit_micro.json").read_text())["steps"] == 1


def test_the_card_describes_the_file_and_training_learns(data, tmp_path):
    out = tmp_path / "run"
    train.main(_command(data, out, "--lr", "0.01", epochs=12))
    card = json.loads((out / "vit_micro.json").read_text())
    model = zoo.create("vit_micro", weights=str(out / "vit_micro.safetensors"), **card["options"])
    val = images.load(data, tmp_path / "cache", "val")
    assert train.evaluate(model, val, 16)["top1"] == card["top1"]
    assert card["top1"] > 40  # two of four are chance: the two sets share their colours
    assert card["classes"] == list(card["per_class"]) == ["tench", "church", "dress", "hat"]
    assert np.mean(list(card["per_class"].values())) == pytest.approx(card["top1"], abs=0.01)
    assert "non-commercial" in card["data"]["imagenette128"]["license"]
    assert "CC0" in card["data"]["clothing128"]["license"]
    assert card["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert str(tmp_path) not in json.dumps(card)


@pytest.mark.parametrize("file", ["last.pt", "vit_micro.safetensors"])
def test_fine_tuning_starts_from_another_resolution(data, tmp_path, file):
    train.main(_command(data, tmp_path / "small", "--minutes", "0"))
    train.main(_command(data, tmp_path / "small", "--export"))
    weights = str(tmp_path / "small" / file)
    model = zoo.create("vit_micro", num_classes=4, image_size=32, weights=weights, **TINY)
    assert model.pos_embed.shape == (1, 17, 16)
    small = zoo.read(weights)
    assert torch.equal(model.state_dict()["blocks.1.attn.qkv.weight"], small["blocks.1.attn.qkv.weight"])
    assert torch.equal(model.pos_embed[:, 0], small["pos_embed"][:, 0])  # class token: not interpolated


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path):
    args = train.parse(_command(data, tmp_path / "run"))
    run = train.Run(args, images.load(data, tmp_path / "cache", "train"))
    with torch.no_grad():
        run.model.head.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="The loss is nan at step 0: lower --lr"):
        run.advance()


def test_vectors_and_named_parameters_do_not_decay():
    model = zoo.create("vit_micro", num_classes=4, image_size=16, **TINY)
    free, decayed = zoo.decay_groups(model, 0.05)
    assert (free["weight_decay"], decayed["weight_decay"]) == (0.0, 0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed_names = {names[id(parameter)] for parameter in decayed["params"]}
    assert "blocks.0.attn.qkv.weight" in decayed_names
    assert not decayed_names & {"pos_embed", "cls_token", "blocks.0.norm1.weight", "head.bias"}


def test_only_the_model_that_is_trained_is_unfused():
    import timm.layers

    fused = timm.layers.use_fused_attn()
    model = zoo.create("vit_micro", num_classes=4, image_size=16, **TINY)
    assert not any(block.attn.fused_attn for block in model.blocks)
    assert timm.layers.use_fused_attn() == fused


def test_a_part_of_a_deeper_models_weights(tmp_path):
    from safetensors.torch import save_file

    deep = zoo.create("vit_micro", num_classes=20, image_size=32, **{**TINY, "depth": 3})
    save_file(deep.state_dict(), tmp_path / "deep.safetensors")
    torch.manual_seed(1)
    fresh = zoo.create("vit_micro", num_classes=4, image_size=16, **TINY).state_dict()
    torch.manual_seed(1)
    weights = str(tmp_path / "deep.safetensors")
    part = zoo.create("vit_micro", num_classes=4, image_size=16, weights=weights, part=True, **TINY).state_dict()
    assert torch.equal(part["blocks.1.attn.qkv.weight"], deep.state_dict()["blocks.1.attn.qkv.weight"])
    assert torch.equal(part["head.weight"], fresh["head.weight"])  # of other classes
    assert part["pos_embed"].shape == (1, 5, 16)
    assert torch.equal(part["pos_embed"][:, 0], deep.state_dict()["pos_embed"][:, 0])
    assert not any(key.startswith("blocks.2") for key in part)
    with pytest.raises(WeightsError, match="do not fit"):
        zoo.create("vit_micro", num_classes=4, image_size=16, weights=weights, **TINY)
