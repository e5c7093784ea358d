"""Softmax attention seen at its doors: torch's own functions, whatever code stands around them."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import mamba_attn
from mamba_attn import attribution, orders
from mamba_attn.core.rules import Rules
from mamba_attn.errors import TraceError, UnsupportedModelError
from mamba_attn.tracing import softmax_doors
from tests.tracing.foreign import CHANNELS, Line, Net, Shuffled, Windows

GRID, TOKENS = (4, 5), 20
FUNCTIONS = [(F, "scaled_dot_product_attention"), (F, "multi_head_attention_forward")]
FUNCTIONS += [(torch, "_native_multi_head_attention"), (torch, "_transformer_encoder_layer_fwd")]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _doors_are_shut():
    own = [getattr(holder, name) for holder, name in FUNCTIONS]
    yield
    assert [getattr(holder, name) for holder, name in FUNCTIONS] == own


class Attention(nn.Module):
    """Attention of (batch, tokens, channels) through the function, with its options; ``spelt`` out in float64."""

    def __init__(self, heads=2, key_heads=None, spelt=False, **options):
        super().__init__()
        self.heads, self.key_heads, self.spelt, self.options = heads, key_heads or heads, spelt, options
        width = CHANNELS // heads
        self.q = nn.Linear(CHANNELS, CHANNELS)
        self.kv = nn.Linear(CHANNELS, 2 * self.key_heads * width)
        self.out = nn.Linear(CHANNELS, CHANNELS)
        self.probabilities = None

    def forward(self, x):
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.key_heads, -1)).permute(2, 0, 3, 1, 4)
        options = dict(self.options, enable_gqa=self.key_heads != self.heads)
        y = self.naive(q, k, v, options) if self.spelt else F.scaled_dot_product_attention(q, k, v, **options)
        return self.out(y.transpose(1, 2).flatten(2))

    def naive(self, q, k, v, options):
        k, v = (t.repeat_interleave(self.heads // self.key_heads, 1) for t in (k, v))
        logits = q @ k.mT * (options.get("scale") or q.shape[-1] ** -0.5)
        mask = options.get("attn_mask")
        if options.get("is_causal"):
            mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        self.probabilities = logits.softmax(-1)
        if self.probabilities.requires_grad:
            self.probabilities.retain_grad()
        return self.probabilities @ v


def mask(kind):
    allowed = torch.rand(TOKENS, TOKENS) < 0.6
    allowed.fill_diagonal_(True)
    return allowed if kind == "bool" else torch.randn(2, 1, TOKENS, TOKENS)


OPTIONS = {
    "plain": dict,
    "causal": lambda: {"is_causal": True},
    "boolean mask": lambda: {"attn_mask": mask("bool")},
    "added mask": lambda: {"attn_mask": mask("float")},
    "scale": lambda: {"scale": 1.7},
    "grouped queries": lambda: {"heads": 3, "key_heads": 1, "is_causal": True},
}


def images(batch=2):
    return torch.randn(batch, 3, 16, 20)


def traced(model, x, **options):
    with torch.no_grad(), mamba_attn.trace(model, **options) as trace:
        model(x)
    return trace


def twin(model):
    """The same model with its attention spelt out."""
    other = Net(*(Attention(m.heads, m.key_heads, spelt=True, **m.options) for m in model.mixers))
    other.load_state_dict(model.state_dict())
    return other.double().eval()


@pytest.mark.parametrize("case", OPTIONS)
def test_matrices_and_gradients_are_those_of_the_attention_spelt_out(case):
    options = OPTIONS[case]()
    model = Net(Attention(**options), Attention(**options)).eval()
    other = twin(model)
    if "attn_mask" in options and options["attn_mask"].is_floating_point():
        for mixer in other.mixers:
            mixer.options = {"attn_mask": options["attn_mask"].double()}
    x = images()
    plain = model(x)
    with mamba_attn.trace(model) as trace:
        logits = model(x)
        assert torch.equal(logits, plain)
    gradients = trace.gradients(logits[:, 1].sum())
    assert all(p.grad is None for p in model.parameters())
    other(x.double())[:, 1].sum().backward()
    for name, mixer in zip(["mixers.0", "mixers.1"], other.mixers, strict=True):
        layer = trace[name]
        torch.testing.assert_close(layer.attention("each").double(), mixer.probabilities, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients[name].double(), mixer.probabilities.grad, rtol=1e-4, atol=1e-6)
        assert layer.layout.grid == GRID
        assert layer.share > 0.9


class Torch(nn.Module):
    """nn.MultiheadAttention, with the arguments of its call."""

    def __init__(self, batch_first=True, dropout=0.0, heads=2, **call):
        super().__init__()
        self.attn, self.call = nn.MultiheadAttention(CHANNELS, heads, dropout, batch_first=batch_first), call
        self.weights = None

    def forward(self, x):
        x = x if self.attn.batch_first else x.transpose(0, 1)
        y, self.weights = self.attn(x, x, x, **self.call)
        return y if self.attn.batch_first else y.transpose(0, 1)


def padding():
    hidden = torch.zeros(2, TOKENS, dtype=torch.bool)
    hidden[0, 15:] = hidden[1, 3:7] = True
    return hidden


CALLS = {
    "weights": {"need_weights": True, "average_attn_weights": False},
    "averaged weights": {"need_weights": True},
    "no weights": {"need_weights": False},
    "tokens first": {"batch_first": False, "need_weights": True, "average_attn_weights": False},
    "three heads": {"heads": 3, "need_weights": False},
    "mask": {"attn_mask": ~torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()},
    "padding": {"key_padding_mask": padding(), "need_weights": False},
    "both": {"attn_mask": ~torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(), "key_padding_mask": padding()},
    "added": {"attn_mask": torch.randn(TOKENS, TOKENS), "need_weights": True, "average_attn_weights": False},
}


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("case", CALLS)
def test_torchs_module_on_each_of_its_paths(case, gradients):
    options = dict(CALLS[case])
    model = Net(Torch(**options)).eval()
    x = images()
    with torch.set_grad_enabled(gradients):
        plain = model(x)
        with mamba_attn.trace(model) as trace:
            logits = model(x)
    assert torch.equal(logits, plain)
    layer, mixer = trace["mixers.0.attn"], model.mixers[0]
    found = layer.attention("each").double()
    assert layer.layout.grid == GRID
    mixer.call |= {"need_weights": True, "average_attn_weights": False}
    model.double()
    if options.get("attn_mask", padding()).is_floating_point():
        mixer.call["attn_mask"] = mixer.call["attn_mask"].double()
    model(x.double())
    torch.testing.assert_close(found, mixer.weights.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("averaged", [True, False])
def test_gradients_of_a_module_whose_weights_are_used_too(averaged):
    mixer = Torch(need_weights=True, average_attn_weights=averaged)
    model, x = Net(mixer).double().eval(), images().double()
    with mamba_attn.trace(model) as trace:
        logits = model(x)
        scalar = logits[:, 2].sum() + (mixer.weights * torch.linspace(0, 1, TOKENS)).sum()
    found = trace.gradients(scalar)["mixers.0.attn"]
    query = trace["mixers.0.attn"].call.inputs()
    probabilities = query.probabilities().requires_grad_()
    heads = (probabilities @ query.values).transpose(1, 2).flatten(2)
    normed = model.stem(x).permute(0, 2, 3, 1).flatten(1, 2)
    y = model.head(model.norms[-1](normed + mixer.attn.out_proj(heads)).mean(1))[:, 2].sum()
    weights = probabilities.mean(1) if averaged else probabilities
    (y + (weights * torch.linspace(0, 1, TOKENS)).sum()).backward()
    torch.testing.assert_close(found, probabilities.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm_first", [True, False])
def test_an_encoder_layer_keeps_its_fast_path(norm_first, monkeypatch):
    taken = []
    own = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: taken.append(1) or own(*a))
    monkeypatch.setitem(softmax_doors._DOORS, torch._transformer_encoder_layer_fwd, softmax_doors._DOORS[own])
    torch._transformer_encoder_layer_fwd.__name__ = "_transformer_encoder_layer_fwd"
    layer = nn.TransformerEncoderLayer(CHANNELS, 2, 16, batch_first=True, norm_first=norm_first)
    model = Net(layer).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = images()
    with torch.no_grad():
        plain = model(x)
        with mamba_attn.trace(model) as trace:
            assert torch.equal(model(x), plain)
    assert len(taken) == 2
    assert trace.unseen == {}
    with mamba_attn.trace(model) as slow:
        model(x)
    names = ["mixers.0.self_attn"]
    assert list(trace) == list(slow) == names
    torch.testing.assert_close(trace[0].attention("each"), slow[0].attention("each"), rtol=1e-5, atol=1e-6)


def test_law_11_a_vit_at_its_door_and_through_its_adapter(monkeypatch):
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=(48, 64), depth=2, num_classes=5, class_token=True)
    model.eval()
    x = torch.randn(2, 3, 48, 64)
    with mamba_attn.trace(model) as adapted:
        expected = adapted.gradients(model(x)[:, 1].sum())
    monkeypatch.setattr("mamba_attn.tracing.traceable.find_mixers", lambda *_: {})
    with mamba_attn.trace(model) as at_doors:
        found = at_doors.gradients(model(x)[:, 1].sum())
    assert list(at_doors) == list(adapted)
    for name in adapted:
        a, b = (trace[name].attention("each") for trace in (at_doors, adapted))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
        assert at_doors[name].layout == adapted[name].layout


def test_windows_are_blocks_of_an_images_matrix():
    block = Windows()
    block.mixer = Attention()
    model = Net(block).eval()
    layer = traced(model, images(5))["mixers.0.mixer"]
    record, own = layer.record, layer.row_frame
    assert (record.batch, record.heads, own.batch) == (5, 2, 20)
    assert record.tokens == TOKENS + 16  # all padding: the windows take it in
    cells = torch.full((6, 6), -1)
    cells[:4, :5] = torch.arange(20).view(4, 5)
    windows = cells.view(2, 3, 2, 3).movedim(2, 1).reshape(4, 9)
    matrix = layer.attention()
    for number, window in enumerate(windows):
        inside = window >= 0
        block = own.probabilities.mean(1).view(5, 4, 9, 9)[:, number][:, inside][:, :, inside]
        torch.testing.assert_close(matrix[:, window[inside]][:, :, window[inside]], block)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(5, 36))
    outside = torch.ones(36, 36, dtype=torch.bool)
    for window in windows:
        outside[window[window >= 0][:, None], window[window >= 0]] = False
    assert bool((matrix[:, :20, :20][:, outside[:20, :20]] == 0).all())
    assert layer.layout.to_grid(layer.row(7)).shape == (5, *GRID)


def test_tokens_in_the_parents_order_are_put_in_their_place():
    order = torch.as_tensor(orders.hilbert(*GRID))
    block = Shuffled(order)
    block.mixer = Attention()
    layer = traced(Net(block, Attention()).eval(), images())["mixers.0.mixer"]
    expected = torch.zeros(2, TOKENS, TOKENS)
    expected[:, order[:, None], order] = layer.row_frame.probabilities.mean(1)
    assert torch.equal(layer.attention(), expected)
    given = traced(Net(block).eval(), images(), orders=order[None])["mixers.0.mixer"]
    assert given.record.tokens == TOKENS


class Flat(nn.Module):
    """Heads in the batch, or an axis more; ``apart`` takes keys from a turned sequence."""

    def __init__(self, axes, apart=False):
        super().__init__()
        self.joint, self.axes, self.apart = nn.Linear(CHANNELS, 3 * CHANNELS), axes, apart

    def forward(self, x):
        q, k, v = self.joint(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        if self.apart:
            k, v = k.flip(2), v.flip(2)
        if self.axes == 3:
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        if self.axes == 5:  # windows of four tokens
            q, k, v = (t.unflatten(2, (-1, 4)) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return (y if self.axes == 4 else y.reshape(len(x), 2, x.shape[1], -1)).transpose(1, 2).flatten(2)


def test_heads_and_windows_in_other_axes():
    x, found = images(3), {}
    for axes in (3, 4, 5):
        torch.manual_seed(1)
        found[axes] = traced(Net(Flat(axes)).eval(), x)["mixers.0"]
        assert (found[axes].record.heads, found[axes].batch, found[axes].tokens) == (2, 3, TOKENS)
    torch.testing.assert_close(found[3].attention("each"), found[4].attention("each"))
    blocks = found[5].attention().unflatten(1, (5, 4)).unflatten(3, (5, 4)).transpose(2, 3)
    assert torch.equal((blocks != 0).flatten(3).any(-1), torch.eye(5, dtype=torch.bool).expand(3, 5, 5))


class Cross(nn.Module):
    """Attention to some of the tokens, or to other ones."""

    def __init__(self, length):
        super().__init__()
        self.attn, self.length = Torch(), length

    def forward(self, x):
        memory = x[:, : self.length].flip(1)
        return self.attn.attn(x, memory, memory, need_weights=False)[0]


def test_attention_to_other_tokens_is_named_and_is_no_layer():
    model, x = Net(Attention(), Cross(7)).eval(), images()
    with pytest.warns(UserWarning, match=r"mixers\.1\.attn\.attn mix tokens next to"):
        trace = traced(model, x)
    assert list(trace) == ["mixers.0"]
    assert trace.unseen["mixers.1.attn.attn"] == "reads tokens of another sequence"
    assert trace.unseen_mixers == ["mixers.1.attn.attn"]
    with pytest.raises(UnsupportedModelError, match=r"AttentionRollout: mixers\.1\.attn\.attn mix tokens"):
        attribution.AttentionRollout(model).attribute(x)


@pytest.mark.parametrize("make", [lambda: Cross(TOKENS), lambda: Flat(4, apart=True)])
def test_as_many_tokens_of_another_sequence_are_found_out(make):
    model = Net(Attention(), make()).eval()
    trace = traced(model, images())
    with pytest.raises(UnsupportedModelError, match=r"mixers\.1.*: its keys were not found to come from the tokens"):
        trace[1].attention()
    assert trace[1].row_frame.probabilities.shape == (2, 2, TOKENS, TOKENS)
    assert trace[0].attention().shape == (2, TOKENS, TOKENS)


def test_dropout_in_training_is_not_in_the_matrix_and_not_in_gradients():
    for mixer in (Attention(dropout_p=0.5), Torch(dropout=0.5, need_weights=True)):
        model, x = Net(mixer), images()
        model.drop.p = 0.0
        with mamba_attn.trace(model) as trace:
            logits = model(x)
        torch.testing.assert_close(trace[0].attention().sum(-1), torch.ones(2, TOKENS))
        with pytest.raises(TraceError, match=r"active dropout zeroed; use model\.eval\(\)"):
            trace.gradients(logits.sum())


def test_a_hybrid_of_scans_and_attention():
    model, x = Net(Line(), Attention(), Line(), Torch()).eval(), images()
    with torch.no_grad():
        plain = model(x)
        with mamba_attn.trace(model) as trace:
            assert torch.equal(model(x), plain)
    assert list(trace.softmax) == ["mixers.1", "mixers.3.attn"]
    assert [name for name in trace if "mixers.0" in name or "mixers.2" in name] == list(trace.scans)
    assert list(trace)[2] == "mixers.1"
    assert trace.unseen_mixers == []
    for method in (attribution.RawAttention, attribution.AttentionRollout):
        assert method(model).attribute(x).shape == (2, 1, 16, 20)


class Text(nn.Module):
    """A decoder of words."""

    def __init__(self):
        super().__init__()
        self.embed, self.mixers = (
            nn.Embedding(11, CHANNELS),
            nn.ModuleList([Attention(is_causal=True) for _ in range(2)]),
        )
        self.head = nn.Linear(CHANNELS, 11)

    def forward(self, words):
        x = self.embed(words)
        for mixer in self.mixers:
            x = x + mixer(x)
        return self.head(x)


def test_a_decoder_of_words():
    trace = traced(Text().eval(), torch.randint(11, (3, 13)))
    for layer in trace.layers:
        matrix = layer.attention()
        assert bool((matrix == matrix.tril()).all())
        assert layer.layout.grid == (13,)


def test_rules_are_refused():
    model = Net(Attention()).eval()
    with (
        pytest.raises(UnsupportedModelError, match=r"mixers\.0: no adapter recognises this attention, and at its door"),
        mamba_attn.trace(model, rules=Rules()),
    ):
        model(images())


def test_methods_for_softmax_attention_run():
    model, x = Net(Attention(), Torch()).eval(), images()
    for method in (attribution.TransformerAttribution, attribution.AttentionGradCAM):
        assert method(model).attribute(x, target=1).shape == (2, 1, 16, 20)


def test_checkpointing_repeats_no_layer_and_gradients_are_the_same():
    class Saved(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Attention()

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    model, x, found = Net(Saved()).eval(), images(), []
    for saved in (True, False):
        if not saved:
            Saved.forward = lambda self, x: self.inner(x)
        with mamba_attn.trace(model) as trace:
            logits = model(x)
        assert list(trace) == ["mixers.0.inner"]
        found.append(trace.gradients(logits[:, 0].sum())[0])
    torch.testing.assert_close(*found)


def test_threads_see_their_own_attention():
    first, second, found = Net(Attention()).eval(), Net(Attention(), Attention()).eval(), []
    entered, leave = threading.Event(), threading.Event()

    def other():
        with torch.no_grad(), mamba_attn.trace(second) as trace:
            entered.set()
            leave.wait(30)
            second(images())
            first(images())
        found.append(len(trace))

    thread = threading.Thread(target=other)
    with torch.no_grad(), mamba_attn.trace(first) as trace:
        thread.start()
        assert entered.wait(30)
        first(images())
        second(images())
    leave.set()
    thread.join()
    assert (len(trace), found) == (1, [2])


def test_an_exception_shuts_the_doors():
    with pytest.raises(ZeroDivisionError), mamba_attn.trace(Net(Attention()).eval()):
        raise ZeroDivisionError


def test_a_model_in_half_precision():
    model, x = Net(Attention()).eval(), images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer = traced(model, x)[0]
    torch.testing.assert_close(layer.attention().sum(-1), torch.ones(2, TOKENS))
    assert layer.dtype == torch.float32
