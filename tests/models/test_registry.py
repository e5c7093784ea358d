import json
import sys

import pytest
import torch
from safetensors.torch import save_file

import mamba_attn.models
from mamba_attn.errors import WeightsError
from mamba_attn.models import registry

# parameters and tensors of the official models
COUNTS = {
    "vim_tiny": (7_148_008, 415),
    "vim_small": (25_796_584, 415),
    "vim_base": (97_598_440, 415),
    "vim_tiny_stride8": (7_148_008 + (730 - 197) * 192, 415),
    "vim_small_stride8": (25_796_584 + (730 - 197) * 384, 415),
    "vanilla_vmamba_tiny": (22_893_448, None),
    "vanilla_vmamba_small": (44_417_416, None),
    "vanilla_vmamba_base": (76_254_056, None),
    "vmamba_tiny_s2l5": (30_705_832, None),
    "vmamba_small_s2l15": (50_147_752, None),
    "vmamba_base_s2l15": (88_557_800, None),
    "vmamba_tiny_s1l8": (30_249_064, 276),
    "vmamba_small_s1l20": (49_012_840, None),
    "vmamba_base_s1l20": (86_614_504, None),
}
VIM_FIRST_LAYER = {
    "norm.weight": (192,),
    **{f"mixer.A{s}_log": (384, 16) for s in ("", "_b")},
    **{f"mixer.D{s}": (384,) for s in ("", "_b")},
    "mixer.in_proj.weight": (768, 192),
    "mixer.out_proj.weight": (192, 384),
    **{f"mixer.conv1d{s}.weight": (384, 1, 4) for s in ("", "_b")},
    **{f"mixer.conv1d{s}.bias": (384,) for s in ("", "_b")},
    **{f"mixer.x_proj{s}.weight": (44, 384) for s in ("", "_b")},
    **{f"mixer.dt_proj{s}.weight": (384, 12) for s in ("", "_b")},
    **{f"mixer.dt_proj{s}.bias": (384,) for s in ("", "_b")},
}
VIM_REST = {
    "cls_token": (1, 1, 192),
    "pos_embed": (1, 197, 192),
    "patch_embed.proj.weight": (192, 3, 16, 16),
    "patch_embed.proj.bias": (192,),
    "norm_f.weight": (192,),
    "head.weight": (1000, 192),
    "head.bias": (1000,),
}
VMAMBA_FIRST_BLOCK = {
    **{f"{norm}.{kind}": (96,) for norm in ("norm", "norm2", "op.out_norm") for kind in ("weight", "bias")},
    "op.x_proj_weight": (4, 8, 96),
    "op.A_logs": (384, 1),
    "op.Ds": (384,),
    "op.dt_projs_weight": (4, 96, 6),
    "op.dt_projs_bias": (4, 96),
    "op.in_proj.weight": (96, 96),
    "op.conv2d.weight": (96, 1, 3, 3),
    "op.out_proj.weight": (96, 96),
    "mlp.fc1.weight": (384, 96),
    "mlp.fc1.bias": (384,),
    "mlp.fc2.weight": (96, 384),
    "mlp.fc2.bias": (96,),
}


def on_meta(name, **options):
    with torch.device("meta"):
        return mamba_attn.models.create(name, **options)


def shapes(model, prefix):
    state = model.state_dict()
    return {key.removeprefix(prefix): tuple(state[key].shape) for key in state if key.startswith(prefix)}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_the_official_ones(name):
    model = on_meta(name)
    parameters, tensors = COUNTS[name]
    assert sum(value.numel() for value in model.parameters()) == parameters
    assert tensors is None or len(model.state_dict()) == tensors


def test_every_name_is_counted_or_micro():
    small = {f"{family}_{size}" for family in ("vim", "vmamba", "vit") for size in ("micro", "digits")}
    assert set(mamba_attn.models.names()) == {*COUNTS, *small}


def test_vim_names_and_shapes():
    state = shapes(on_meta("vim_tiny"), "")
    assert shapes(on_meta("vim_tiny"), "layers.0.") == VIM_FIRST_LAYER
    assert {key: shape for key, shape in state.items() if not key.startswith("layers.")} == VIM_REST


def test_vmamba_names_and_shapes():
    model = on_meta("vmamba_tiny_s1l8")
    assert shapes(model, "layers.0.blocks.0.") == VMAMBA_FIRST_BLOCK
    assert shapes(model, "layers.0.downsample.") == {
        "1.weight": (192, 96, 3, 3), "1.bias": (192,), "3.weight": (192,), "3.bias": (192,),
    }  # fmt: skip
    assert shapes(model, "patch_embed.") == {
        "0.weight": (48, 3, 3, 3), "0.bias": (48,), "2.weight": (48,), "2.bias": (48,),
        "5.weight": (96, 48, 3, 3), "5.bias": (96,), "7.weight": (96,), "7.bias": (96,),
    }  # fmt: skip
    assert shapes(model, "classifier.") == {
        "norm.weight": (768,), "norm.bias": (768,), "head.weight": (1000, 768), "head.bias": (1000,),
    }  # fmt: skip
    assert shapes(model, "layers.3.downsample") == {}


def test_vanilla_vmamba_names_and_shapes():
    model = on_meta("vanilla_vmamba_tiny")
    block = shapes(model, "layers.1.blocks.0.")
    assert block["op.in_proj.weight"] == (768, 192)
    assert block["op.A_logs"] == (4 * 384, 16)
    assert block["op.x_proj_weight"] == (4, 12 + 32, 384)
    assert block["op.conv2d.bias"] == (384,)
    assert not any(key.startswith(("mlp", "norm2")) for key in block)
    assert shapes(model, "layers.0.downsample.") == {
        "norm.weight": (384,), "norm.bias": (384,), "reduction.weight": (192, 384),
    }  # fmt: skip
    assert set(shapes(model, "patch_embed.")) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_micro_models():
    vim, vmamba = on_meta("vim_micro"), on_meta("vmamba_micro")
    assert vim.layout(128, 128).tokens == 257
    assert [vmamba.layout(128, 128, stage).grid[0] for stage in range(4)] == [32, 16, 8, 4]
    assert sum(value.numel() for value in vmamba.parameters()) < 6_000_000
    assert [len(stage.blocks) for stage in vmamba.layers] == [2, 2, 4, 2]
    assert vim.num_classes == vmamba.num_classes == 20


@pytest.mark.parametrize("name", ["vim_micro", "vit_micro"])
def test_models_come_in_eval_mode(name):
    assert not mamba_attn.models.create(name, depth=1).training


def test_vit_micro_is_timms_vision_transformer_of_the_same_size():
    model = mamba_attn.models.create("vit_micro")  # old versions of timm make none on the meta device
    assert type(model).__module__ == "timm.models.vision_transformer"
    assert (model.pos_embed.shape, len(model.blocks)) == ((1, 257, 128), 12)
    assert (model.num_classes, model.image_size, model.global_pool) == (20, (128, 128), "token")
    assert model.blocks[0].attn.num_heads == 4
    assert model.blocks[0].mlp.fc1.out_features == 224
    assert sum(value.numel() for value in model.parameters()) == 1_551_636
    small = mamba_attn.models.create("vit_micro", image_size=(24, 40), num_classes=7, depth=3, drop_path=0.3)
    assert small(torch.zeros(1, 3, 24, 40)).shape == (1, 7)
    assert [block.drop_path1.drop_prob for block in small.blocks[1:]] == pytest.approx([0.15, 0.3])


def test_weights_of_vit_micro_load_at_another_resolution(tmp_path):
    options = {"depth": 1, "num_classes": 3}
    model = mamba_attn.models.create("vit_micro", **options)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    same = mamba_attn.models.create("vit_micro", weights=tmp_path / "vit.safetensors", **options)
    x = torch.randn(1, 3, 128, 128)
    assert torch.equal(same(x), model(x))
    with pytest.warns(UserWarning, match=r"for 16x16 patches \(128 pixels.* were resized to this model's 24x24"):
        larger = mamba_attn.models.create("vit_micro", weights=tmp_path / "vit.safetensors", image_size=192, **options)
    assert larger.pos_embed.shape == (1, 577, 128)
    assert torch.equal(larger.pos_embed[:, 0], model.pos_embed[:, 0])
    smooth = torch.nn.functional.interpolate(larger.pos_embed[:, 1:].mT.reshape(1, 128, 24, 24), 16, mode="area")
    kept = torch.corrcoef(torch.stack([smooth.flatten(), model.pos_embed[:, 1:].mT.flatten()]))[0, 1]
    assert kept > 0.7  # the grid was not transposed or shifted
    with pytest.raises(WeightsError, match=r"do not fit this VisionTransformer: .*num_classes=3"):
        mamba_attn.models.create("vit_micro", weights=tmp_path / "vit.safetensors", depth=1, num_classes=5)


def test_vit_micro_without_timm_or_with_an_unknown_option(monkeypatch):
    with pytest.raises(TypeError, match="image_sice"):
        mamba_attn.models.create("vit_micro", image_sice=3)
    monkeypatch.setitem(sys.modules, "timm.models.vision_transformer", None)
    with pytest.raises(ImportError, match=r"a ViT needs timm: pip install 'mamba_attn\[timm\]'"):
        mamba_attn.models.create("vit_micro")


def test_official_names_of_vim():
    model = on_meta("vim_base_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_middle_cls_token_div2")
    assert model.pos_embed.shape == (1, 197, 768)
    model = on_meta("vim_tiny_patch16_stride8_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2")
    assert model.pos_embed.shape == (1, 730, 192)


def test_options_override_the_configuration():
    model = on_meta("vim_tiny", image_size=(64, 96), num_classes=7, depth=3, class_token=None)
    assert (model.pos_embed.shape, model.head.out_features, len(model.layers)) == ((1, 24, 192), 7, 3)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"create\('vim_tine'\): no such model. Did you mean 'vim_tiny'"):
        mamba_attn.models.create("vim_tine")


def test_unknown_option():
    with pytest.raises(TypeError, match="image_sice"):
        mamba_attn.models.create("vim_micro", image_sice=3)


def test_unknown_weights():
    with pytest.raises(WeightsError, match=r"weights='nowhere.pth'\): no such file; .*'official', 'demo' or 'random'"):
        mamba_attn.models.create("vim_micro", weights="nowhere.pth")


def test_demo_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_DEMOS", tmp_path)
    with pytest.raises(WeightsError, match=r"weights='demo'\): no bundled weights .* Available: none"):
        mamba_attn.models.create("vim_micro", weights="demo")
    small = {"depth": 1, "embed_dim": 16, "num_classes": 3}
    model = mamba_attn.models.create("vim_micro", **small)
    save_file({key: value.half() for key, value in model.state_dict().items()}, tmp_path / "vim_micro.safetensors")
    (tmp_path / "vim_micro.json").write_text(json.dumps({"options": small, "classes": ["a", "b", "c"]}))
    loaded = mamba_attn.models.create("vim_micro", weights="demo")
    assert loaded.head.weight.dtype == torch.float32
    torch.testing.assert_close(loaded.head.weight, model.head.weight.half().float(), rtol=0, atol=0)
    assert registry.demo_card("vim_micro")["classes"] == ["a", "b", "c"]
    with pytest.raises(WeightsError, match=r"Available: vim_micro"):
        mamba_attn.models.create("vim_tiny", weights="demo")
    larger = mamba_attn.models.create("vim_micro", weights="demo", image_size=192)
    assert larger.pos_embed.shape == (1, 577, 16)


def test_no_official_weights_for_micro():
    with pytest.raises(WeightsError, match=r"fetch\('vim_micro'\): there are no published weights"):
        mamba_attn.models.create("vim_micro", weights="official")


SMALL = {"depth": 2, "embed_dim": 32}


def vim_file(folder, **options):
    model = mamba_attn.models.create("vim_tiny", **{**SMALL, **options})
    path = folder / "vim.pth"
    torch.save({"model": model.state_dict()}, path)
    return model, path


def test_the_number_of_classes_is_the_files(tmp_path):
    model, path = vim_file(tmp_path, num_classes=7)
    again = mamba_attn.models.create("vim_tiny", weights=path, **SMALL)
    assert again.num_classes == 7
    assert torch.equal(again.head.weight, model.head.weight)
    with pytest.raises(WeightsError, match=r"they have 7 classes: num_classes=7"):
        mamba_attn.models.create("vim_tiny", weights=path, **SMALL, num_classes=5)


def test_a_file_without_a_classifier_makes_a_model_without_one(tmp_path):
    _, path = vim_file(tmp_path, num_classes=0)
    with pytest.warns(UserWarning, match=r"it holds no classifier, so the model has none \(num_classes=0\)"):
        again = mamba_attn.models.create("vim_tiny", weights=path, **SMALL)
    assert again(torch.zeros(1, 3, 224, 224)).shape == (1, 32)
    with pytest.raises(WeightsError, match="They have no classifier: num_classes=0"):
        mamba_attn.models.create("vim_tiny", weights=path, **SMALL, num_classes=7)


@pytest.mark.parametrize(("made", "found"), [({"stride": 8}, "stride=8"), ({"image_size": 320}, "image_size=320")])
def test_the_image_size_and_the_stride_are_the_files(made, found, tmp_path):
    model, path = vim_file(tmp_path, **made)
    name = "vim_tiny"
    with pytest.MonkeyPatch.context() as patch:  # the table's own models, small
        for each in ("vim_tiny", "vim_tiny_stride8"):
            builder, config = registry._CONFIGS[each]
            patch.setitem(registry._CONFIGS, each, (builder, {**config, **SMALL}))
        with pytest.warns(UserWarning, match=rf"for \d+x\d+ patches, so the model was built with {found}; image_size="):
            again = mamba_attn.models.create(name, weights=path)
        assert torch.equal(again.pos_embed, model.pos_embed)
        with pytest.warns(UserWarning, match=r"were resized to this model's 14x14"):
            told = mamba_attn.models.create(name, weights=path, image_size=224)
        assert told.pos_embed.shape == (1, 197, 32)


def test_a_rectangle_says_how_to_give_its_size(tmp_path):
    _, path = vim_file(tmp_path, image_size=(256, 128))
    with pytest.raises(WeightsError, match=r"another image size, of 128 patches: give it as image_size=\(rows, col"):
        mamba_attn.models.create("vim_tiny", weights=path, **SMALL)
    assert mamba_attn.models.create("vim_tiny", weights=path, **SMALL, image_size=(256, 128)).image_size == (256, 128)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_of_another_model_are_named(prefix, tmp_path):
    with torch.device("meta"):
        names = mamba_attn.models.create("vmamba_tiny_s1l8", num_classes=3).state_dict()
    path = tmp_path / "file.pth"
    torch.save({f"{prefix}{key}": torch.zeros(value.shape, dtype=torch.float16) for key, value in names.items()}, path)
    with pytest.raises(WeightsError, match=r"file\.pth: these weights are not of vim_tiny but of vmamba_tiny_s1l8: "):
        mamba_attn.models.create("vim_tiny", weights=path)


def test_short_names():
    assert registry.aliases()["vmamba_tiny"] == "vmamba_tiny_s1l8"
    assert set(registry.aliases().values()) <= set(registry.names())
    assert len(on_meta("vmamba_tiny").state_dict()) == 276
