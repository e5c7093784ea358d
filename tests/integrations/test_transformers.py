"""transformers' language models, where they are installed: laws, hybrids, padding, caches, and what is refused."""

import pytest
import torch

from benchmarks.language_models import DECODERS, HYBRIDS, SCANS, build, quiet, texts
from mamba_attn import trace
from mamba_attn.attribution import AttentionRollout, MambaAttribution, MambaLRP, RawAttention, Saliency
from mamba_attn.core.rules import PLAIN
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.testing import check_adapter
from mamba_attn.tracing.adapters import Seen, find_mixers
from mamba_attn.tracing.layers import ScanLayer

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
PADDED = ("none", "left", "right")


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    quiet()


@pytest.fixture(scope="module")
def models():
    """Each is built once."""
    built = {}

    def get(name, **options):
        key = (name, *options.items())
        if key not in built:
            built[key] = build(name, **options)
        if built[key] is None:
            pytest.skip(f"transformers {transformers.__version__} has no {name}")
        return built[key]

    return get


def called(mask, **options):
    return lambda model, ids: model(ids, attention_mask=mask, use_cache=False, **options).logits


@pytest.mark.parametrize(
    ("name", "padding"),
    [(name, "left") for name in SCANS]
    + [pytest.param(name, each, marks=pytest.mark.full) for name in SCANS for each in ("none", "right")],
)
def test_laws(models, name, padding):
    ids, mask = texts(padding)
    report = check_adapter(models(name), ids, call=called(mask))
    assert report.output_error <= 1e-6
    assert report.matrix_error <= 1e-6


@pytest.mark.parametrize("name", HYBRIDS + DECODERS)
def test_hybrids_and_decoders_are_traced_whole(models, name):
    model = models(name)
    ids, mask = texts("left")
    with torch.no_grad():
        own = model(ids, attention_mask=mask, use_cache=False).logits
        with trace(model) as record:
            logits = model(ids, attention_mask=mask, use_cache=False).logits
        whole = [layer for layer in record.layers if layer.attention("each")[0].abs().amax() > 0]
    torch.testing.assert_close(logits[mask.bool()], own[mask.bool()], rtol=0, atol=1e-6 * float(own.abs().max()))
    assert record.unseen_mixers == []
    assert len(whole) == len(record.layers) >= 2
    assert {isinstance(layer, ScanLayer) for layer in record.layers} == ({False} if name in DECODERS else {False, True})
    for layer in record.layers:
        matrix = layer.attention("each")
        assert (matrix.triu(1) == 0).all()
        if (name, transformers.__version__[0]) != ("Zamba2", "4"):  # which masks its scans only with a cache
            assert (matrix[1, :, :4] == 0).all()
            assert (matrix[1, :, :, 4:] != 0).any()
            assert (matrix[1, :, :, :4] == 0).all()


@pytest.mark.parametrize("name", ["GPTNeoX", "Bamba"])
def test_eager_attention_has_a_door(models, name):
    """Its function hands the probabilities out; gradients arrive there."""
    model, (ids, _) = models(name, attention="eager"), texts()
    own = model(ids, use_cache=False, output_attentions=True)
    with trace(model) as record:
        logits = model(ids, use_cache=False).logits
    gradients = record.gradients(logits[:, -1, 5].sum())
    for layer, theirs in zip(record.softmax.values(), [a for a in own.attentions if a is not None], strict=True):
        torch.testing.assert_close(layer.attention("each"), theirs.detach())
        assert gradients[layer.name].shape == theirs.shape
        assert gradients[layer.name].abs().max() > 0
    same = models(name)
    with trace(same) as other:
        logits = same(ids, use_cache=False).logits
    again = other.gradients(logits[:, -1, 5].sum())
    for layer in record.softmax:
        torch.testing.assert_close(gradients[layer], again[layer], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["Mamba", "Jamba", "Mamba2", "FalconH1", "Llama"])
def test_a_padded_text_is_the_text(models, name):
    options = {"use_bias": False} if name == "Mamba" else {}  # a bias reaches the first tokens through the convolution
    model, (ids, mask) = models(name, **options), texts("left")
    with torch.no_grad():
        with trace(model) as padded:
            model(ids, attention_mask=mask, use_cache=False)
        with trace(model) as alone:
            model(ids[1:, 4:], use_cache=False)
        for own, cut in zip(alone.layers, padded.layers, strict=True):
            matrix, inside = own.attention("each"), cut.attention("each")[1:, :, 4:, 4:]
            torch.testing.assert_close(inside, matrix, rtol=0, atol=1e-6 * float(matrix.abs().max()))
    for method in (RawAttention, AttentionRollout):
        maps = method(model).attribute(ids, additional_forward_args={"attention_mask": mask})
        expected = method(model).attribute(ids[1:, 4:])
        assert (maps[1, :4] == 0).all()
        torch.testing.assert_close(maps[1:, 4:], expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


@pytest.mark.parametrize("name", ["Mamba", "Mamba2", "Bamba", "GPT2"])
def test_generating_before_and_after_a_trace(models, name):
    model, (ids, mask) = models(name), texts("left")

    def generated():
        return model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=None)

    with torch.no_grad():
        before, own = generated(), model(ids, attention_mask=mask).logits
        for _ in range(2):
            with trace(model) as record:
                logits = model(ids, attention_mask=mask).logits
            torch.testing.assert_close(logits[mask.bool()], own[mask.bool()], rtol=0, atol=1e-5)
            assert torch.equal(generated(), before)
            assert record[0].attention().shape == (2, 11, 11)
        with pytest.raises(UnsupportedModelError, match="generate first, then trace the whole text in one forward"):
            with trace(model):
                generated()
        assert torch.equal(generated(), before)


@pytest.mark.parametrize("name", ["Mamba", "FalconMamba", "Mamba2"])
def test_methods_that_follow_relevance(models, name):
    """MambaLRP checks itself that relevance is conserved: norms behind the gate are met."""
    model, (ids, _) = models(name), texts()
    maps = MambaLRP(model).attribute(ids, 5)
    assert maps.shape == ids.shape
    assert MambaAttribution(model).attribute(ids, 5).abs().amax(1).min() > 0


@pytest.mark.parametrize("name", ["seq_idx", "cu_seqlens", "cu_seq_lens_q"])
def test_several_texts_in_one_row_are_refused_even_where_the_model_ignores_it(models, name):
    model, (ids, _) = models("Mamba"), texts()
    with (
        pytest.raises(UnsupportedModelError, match=f"called with {name}, several texts .* give each text a row"),
        trace(model),
    ):
        model(ids, **{name: torch.zeros(1, 11, dtype=torch.int32)})


@pytest.mark.parametrize("make", [MambaLRP, Saliency])
def test_weights_that_a_cpu_cannot_use_are_named(make):
    narrow = build("Mamba").to(torch.float8_e4m3fn)
    with pytest.raises(UnsupportedModelError, match="is float8_e4m3fn, which PyTorch does not compute with on a CPU"):
        make(narrow).attribute(texts()[0])
    quantised = build("Mamba")
    quantised.backbone.layers[1].mixer.dt_proj.weight = None
    quantised.backbone.layers[1].mixer.dt_proj.__dict__["weight"] = lambda: torch.ones(1)  # as torch.ao's Linear has it
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.1\.mixer\.dt_proj is a Linear, quantised: take the model"
    ):
        make(quantised).attribute(texts()[0])


def test_several_texts_in_one_row_are_refused(models):
    mixer, x = models("Mamba2").backbone.layers[0].mixer, torch.randn(1, 6, 16)
    if transformers.__version__.startswith("4"):
        pytest.skip("its forward takes no seq_idx")
    _, adapter = find_mixers(mixer)[""]
    with pytest.raises(UnsupportedModelError, match=r"called with seq_idx, .* give each text a row of its own"):
        adapter.project(mixer, x, seq_idx=torch.zeros(1, 6, dtype=torch.int32), rules=PLAIN, seen=Seen())
