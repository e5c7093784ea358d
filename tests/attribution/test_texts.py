"""Texts: ids in, one number per token out, with every method; padding, targets, positions, and what is refused."""

import captum.attr
import pytest
import torch
from torch import nn

from mamba_attn import TokenLayout, trace
from mamba_attn.attribution import (
    AttentionRollout,
    CentreMap,
    FrozenContribution,
    ImplicitAttention,
    InputXGradient,
    IntegratedGradients,
    LayerGradCam,
    MambaAttribution,
    MambaLRP,
    Occlusion,
    RandomMap,
    RawAttention,
    RelevanceAttentionRanks,
    Saliency,
)
from tests.attribution.texts import TOKENS, VOCABULARY, Words, ids, padded

METHODS = {
    "raw": RawAttention,
    "rollout": AttentionRollout,
    "rollout, signed": lambda model: AttentionRollout(model, signed=True),
    "Mamba-Attribution": MambaAttribution,
    "Mamba-Attribution of rows": lambda model: MambaAttribution(model, rollout=False),
    "LRP": MambaLRP,
    "frozen": FrozenContribution,
    "implicit": ImplicitAttention,
    "implicit, rows": lambda model: ImplicitAttention(model, rollout=False),
    "ranks": RelevanceAttentionRanks,
    "integrated gradients": lambda model: IntegratedGradients(model, n_steps=3),
    "input x gradient": InputXGradient,
    "saliency": Saliency,
    "occlusion": Occlusion,
    "GradCAM": LayerGradCam,
}
every = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


@pytest.fixture(scope="module")
def model():
    return Words()


@every
def test_a_number_per_token_that_is_zero_at_padding_and_as_without_it(model, make):
    texts, mask = padded()
    before = texts.clone()
    maps = make(model).attribute(texts, 5, additional_forward_args={"attention_mask": mask})
    assert maps.shape == texts.shape
    assert maps.is_floating_point()
    assert (maps[1, :4] == 0).all()
    assert maps.abs().amax(1).min() > 0
    assert torch.equal(texts, before)
    alone = make(model).attribute(texts[1:, 4:], 5)
    if make is LayerGradCam:  # it divides by all tokens, padding included
        alone = alone * 5 / TOKENS
    if make is not RelevanceAttentionRanks:  # which ranks padding, too
        torch.testing.assert_close(maps[1:, 4:], alone, rtol=1e-6, atol=1e-9 * float(alone.abs().max()))


@every
def test_a_position_sees_what_is_before_it(model, make):
    texts = ids()
    inner = make(model).attribute(texts, (4, 3))
    if make in (LayerGradCam, RelevanceAttentionRanks):  # both weigh all tokens of the text
        return
    cut = make(model).attribute(texts[:, :5], 3)
    assert (inner[:, 5:] == 0).all()
    torch.testing.assert_close(inner[:, :5], cut, rtol=1e-9, atol=1e-12 * float(cut.abs().max()))


@pytest.mark.parametrize("make", [MambaLRP, Saliency, Occlusion])
def test_forms_of_a_target(model, make):
    texts = ids()
    likeliest = model(texts)[:, -1].argmax(1)
    assert likeliest[0] != likeliest[1]
    default = make(model).attribute(texts)
    same = [
        likeliest,
        likeliest.tolist(),
        [(-1, int(token)) for token in likeliest],
        torch.stack([torch.full((2,), TOKENS - 1), likeliest], 1),
        lambda logits: logits[torch.arange(2), -1, likeliest],
    ]
    for target in same:
        torch.testing.assert_close(make(model).attribute(texts, target), default, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("make", [AttentionRollout, MambaLRP, IntegratedGradients])
def test_outputs_of_several_tensors(model, make):
    wrapped, options = Words(wrapped=True), {"n_steps": 2} if make is IntegratedGradients else {}
    expected = make(model, **options).attribute(ids(), 7)
    torch.testing.assert_close(make(wrapped, **options).attribute(ids(), 7), expected)


def test_the_layout_of_a_text_is_a_line(model):
    with torch.no_grad(), trace(model) as record:
        model(input_ids=ids())
    assert [layer.layout for layer in record.layers] == 2 * [TokenLayout.line(TOKENS)]
    with pytest.raises(ValueError, match="the tokens of a text have no pixels; number them by their position"):
        record[0].layout.to_pixels(record[0].row(0))


def test_a_query_reads_the_row_of_a_position(model):
    texts, mask = padded()
    with torch.no_grad(), trace(model) as record:
        model(texts, mask)
    rows = torch.stack([layer.attention().clamp(min=0) for layer in record.layers]).mean(0)
    method, given = RawAttention(model), {"additional_forward_args": (mask,)}
    torch.testing.assert_close(method.attribute(texts, query=5, **given), rows[:, 5])
    torch.testing.assert_close(method.attribute(texts, query=-2, **given), rows[:, TOKENS - 2])
    torch.testing.assert_close(method.attribute(texts, **given), rows[:, -1])
    torch.testing.assert_close(method.attribute(texts, (6, 1), **given), rows[:, 6])
    both = method.attribute(texts, query=[1, 7], **given)
    torch.testing.assert_close(both, torch.stack([rows[0, 1], rows[1, 7]]))
    torch.testing.assert_close(method.attribute(texts, trace=record), rows[:, -1])
    assert [row.shape for row in RawAttention(model).rows(texts, query=3).values()] == 2 * [texts.shape]


def test_a_mask_is_known_by_its_place_too(model):
    texts, mask = padded()
    maps = [RawAttention(model).attribute(texts, additional_forward_args=each) for each in (mask, (mask == 1,))]
    by_name = RawAttention(model).attribute(texts, additional_forward_args={"attention_mask": mask})
    assert torch.equal(maps[0], by_name)
    assert torch.equal(maps[1], by_name)


def test_the_last_token_of_a_text_padded_on_the_right_is_its_own(model):
    texts, mask = padded()
    mask = mask.flip(1)  # the second ends after five tokens
    maps = MambaLRP(model).attribute(texts, 5, additional_forward_args=mask)
    torch.testing.assert_close(maps[1:, :5], MambaLRP(model).attribute(texts[1:, :5], 5))
    assert (maps[1, 5:] == 0).all()


def after_embedding(model, texts, embedded):
    hook = model.embedding.register_forward_hook(lambda module, args, output: embedded)
    try:
        return model(texts.repeat(len(embedded) // len(texts), 1))
    finally:
        hook.remove()


def test_captums_methods_see_embeddings(model):
    texts = ids()
    embedded = model.embedding(texts).detach().requires_grad_()
    value = after_embedding(model, texts, embedded)[:, -1, 5]
    (gradient,) = torch.autograd.grad(value.sum(), embedded)
    torch.testing.assert_close(InputXGradient(model).attribute(texts, 5), (embedded * gradient).sum(-1).detach())
    torch.testing.assert_close(Saliency(model).attribute(texts, 5), gradient.abs().sum(-1))
    baselines = model.embedding(torch.full_like(texts, 2)).detach()
    path = captum.attr.IntegratedGradients(lambda x: after_embedding(model, texts, x)[:, -1])
    expected = path.attribute(embedded, baselines, 5, n_steps=7).sum(-1)
    maps, delta = IntegratedGradients(model, n_steps=7).attribute(texts, 5, baselines=2, return_convergence_delta=True)
    torch.testing.assert_close(maps, expected.detach())
    change = value - model(torch.full_like(texts, 2))[:, -1, 5]
    torch.testing.assert_close(maps.sum(1) - delta, change.detach())
    covered = Occlusion(model, baselines=2).attribute(texts, 5)
    for position in range(TOKENS):
        other = texts.clone()
        other[:, position] = 2
        falls = (value - model(other)[:, -1, 5]).detach()
        torch.testing.assert_close(covered[:, position], falls, check_dtype=False, rtol=1e-5, atol=1e-6)


def test_the_sum_of_a_texts_relevance_is_its_logit(model):
    shares = FrozenContribution(model).contributions(ids(), 5)
    torch.testing.assert_close(shares.total, model(ids())[:, -1, 5].detach())
    found = MambaLRP(model)
    total = found.relevances(ids(), (3, 5))[0].sum(1) + sum(found.bias_relevances(ids(), (3, 5)).values())
    torch.testing.assert_close(total, model(ids())[:, 3, 5].detach())


@pytest.mark.parametrize("control", [RandomMap, CentreMap])
def test_controls(model, control):
    maps = control(model).attribute(ids())
    assert maps.shape == (2, TOKENS)
    assert maps.std(1).min() > 0


class Encoder(nn.Module):
    """Answers for the text as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.words = Words()

    def forward(self, input_ids):
        return self.words(input_ids)[:, -1, :3]


def test_a_classifier_of_texts_has_classes(model):
    maps = MambaLRP(Encoder()).attribute(ids(), [1, 2])
    torch.testing.assert_close(maps, MambaLRP(model).attribute(ids(), [1, 2]))


class Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = Words()

    def forward(self, input_ids):
        return {"last_hidden_state": self.words(input_ids)}


REFUSED = {
    "no tokens": (lambda: ids(tokens=0), {}, r"attribute: ids\(2, 0\): the text is empty; give at least one token"),
    "of another tokenizer": (
        lambda: ids() + VOCABULARY,
        {},
        rf"attribute: ids\(2, 9\): \d+ is no token of this Words, whose ids are 0..{VOCABULARY - 1}; use the tokenizer",
    ),
    "negative": (lambda: ids() - VOCABULARY, {}, r"ids\(2, 9\): -\d+ is no token of this Words"),
    "one axis": (lambda: ids()[0], {}, r"expected images .*, or texts as ids \(batch, tokens\), integers"),
    "all padding": (
        ids,
        {"additional_forward_args": torch.tensor([TOKENS * [1], TOKENS * [0]])},
        r"attention_mask\): text 1 is all padding",
    ),
    "pixel": (ids, {"pixel": (1, 1)}, r"a text has no pixels; give query=position"),
    "position": (ids, {"query": 9}, r"query=9\): text 0 has no token at position 9; expected 0\.\.8, or -1"),
    "positions": (ids, {"query": [1, 2, 3]}, r"expected a position, or a list of one for each of the 2 texts"),
    "target": (ids, {"target": torch.tensor([0.5, 1.5])}, r"expected numbers of tokens; give target=token"),
    "targets": (ids, {"target": [1, 2, 3]}, r"3 targets for 2 texts"),
    "token": (ids, {"target": VOCABULARY}, rf"target={VOCABULARY}\): expected tokens in 0\.\.{VOCABULARY - 1}"),
    "padding": (
        lambda: padded()[0],
        {"target": (2, 1), "additional_forward_args": padded()[1]},
        r"target=\(2, 1\)\): text 1 has no token at position 2; expected 4\.\.8",
    ),
}


@pytest.mark.parametrize(("texts", "options", "sentence"), REFUSED.values(), ids=REFUSED)
def test_refused(model, texts, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        RawAttention(model).attribute(texts(), **options)


def test_refused_by_some(model):
    with pytest.raises(ValueError, match=r"query=\[3, 3\]\): this method reads no token's row; leave query out"):
        MambaLRP(model).attribute(ids(), 1, query=3)
    with pytest.raises(ValueError, match=r"features, and no scores of tokens, .*AutoModelForCausalLM"):
        MambaAttribution(Features()).attribute(ids())
    with pytest.raises(ValueError, match=r"TokenLayout.line\(0\): the text is empty"):
        TokenLayout.line(0)
    with pytest.raises(ValueError, match=r"is no token of this Words"), trace(model):
        model(ids() + VOCABULARY)


def test_leaving_a_token_out_is_running_the_text_without_it(model):
    texts, mask = padded()
    target = [(7, 5), (6, 3)]
    found = Occlusion(model, tokens="delete").attribute(texts, target, additional_forward_args={"attention_mask": mask})
    for text, (place, token) in enumerate(target):
        whole = model(texts, mask)[text, place, token]
        for left_out in range(TOKENS):
            kept = [other for other in range(TOKENS) if other != left_out]
            logits = model(texts[:, kept], mask[:, kept])[text]
            expected = whole - logits[place - (left_out < place), token]
            free = left_out == place or not mask[text, left_out]  # where the target is read, and padding
            torch.testing.assert_close(found[text, left_out], torch.zeros_like(expected) if free else expected)
    torch.testing.assert_close(found[0, 8:], torch.zeros(1).double(), rtol=0, atol=1e-12)  # not seen by the target


def test_swapping_is_within_a_kind(model):
    texts = ids()
    kinds = [range(8), (8, 20, 9)]
    found = Occlusion(model, tokens="swap", kinds=kinds).attribute(texts, 5)
    whole = model(texts)[:, -1, 5]
    there = {each: (each + 4) % 8 for each in range(8)} | {8: 20, 20: 9, 9: 8}
    for token in range(TOKENS):
        other = texts.clone()
        other[:, token] = torch.tensor([there.get(each, each) for each in other[:, token].tolist()])
        torch.testing.assert_close(found[:, token], whole - model(other)[:, -1, 5])
    unmoved = torch.tensor([[each not in there for each in row] for row in texts.tolist()])
    assert unmoved.any()
    assert (found[unmoved] == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": "drop"}, "tokens='drop'.*no such mode"),
        ({"tokens": "swap"}, "tokens='swap' and kinds= go together"),
        ({"kinds": [(1, 2)]}, "tokens='swap' and kinds= go together"),
        ({"tokens": "swap", "kinds": [(1, 2), (2, 3)]}, "id 2 is listed twice"),
        ({"tokens": "swap", "kinds": [(1,)]}, r"expected kinds of two ids or more, got \[1\]"),
    ],
)
def test_modes_of_occlusion_that_are_none(model, options, message):
    with pytest.raises(ValueError, match=message):
        Occlusion(model, **options)


def test_modes_of_occlusion_are_for_texts_and_targets_by_number(model):
    with pytest.raises(ValueError, match="need the target as numbers"):
        Occlusion(model, tokens="delete").attribute(ids(), lambda output: output[:, -1, 0])
    with pytest.raises(ValueError, match="a text of one token has none to leave out"):
        Occlusion(model, tokens="delete").attribute(ids()[:, :1])
    with pytest.raises(ValueError, match="'delete' and 'swap' are for texts"):
        Occlusion(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), tokens="delete").attribute(torch.ones(1, 3, 2, 2))
