"""The edges of tracing: other threads, hooks in between, registries, and each kind of wrong adapter."""

import copy
import threading
from typing import ClassVar

import pytest
import torch
from mamba_attn.integrations.vim import VimAdapter
from torch import nn

import mamba_attn
from mamba_attn.core.rules import Rules
from mamba_attn.errors import TraceError
from mamba_attn.testing import LawError, check_adapter
from mamba_attn.tracing.adapters import _registered, find_mixers


def vim(**options: object) -> nn.Module:
    return mamba_attn.models.create("vim_micro", image_size=(24, 40), depth=3, embed_dim=16, **options)


def vmamba(**options: object) -> nn.Module:
    return mamba_attn.models.create("vmamba_micro", image_size=64, **options)


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 24, 40)


@pytest.mark.parametrize("mode", ["route", "observe"])
@pytest.mark.parametrize("make", [vim, vmamba])
def test_another_threads_pass_leaves_the_record_alone(make: object, mode: str) -> None:
    model = make()
    with torch.no_grad(), mamba_attn.trace(model, mode=mode) as trace:
        other = threading.Thread(target=torch.no_grad()(lambda: model(torch.randn(1, 3, 40, 24))))
        other.start()
        other.join()
        assert len(trace) == 0
        mixer = next(iter(find_mixers(model).values()))[0]
        hook = mixer.register_forward_pre_hook(lambda *_: interrupt())

        def interrupt() -> None:  # between the patch embedding and the first mixer
            hook.remove()
            other = threading.Thread(target=torch.no_grad()(lambda: model(torch.randn(1, 3, 48, 48))))
            other.start()
            other.join()

        model(torch.randn(1, 3, 24, 40))
    assert trace.layers[0].layout.grid == ((3, 5) if make is vim else (6, 10))
    assert trace.layers[0].layout.patch_size == (8 if make is vim else 4)


def test_gradients_can_be_asked_for_twice_and_are_zero_behind_the_scalar() -> None:
    model = vim()
    with mamba_attn.trace(model) as trace:
        logits = model(images())
    first, second = (trace.gradients(logits[0, 1])["layers.0.mixer"] for _ in range(2))
    assert torch.equal(first, second)
    early = trace.gradients(trace.layers[1].y.sum())
    assert early["layers.0.mixer"].abs().max() > 0
    assert not early["layers.2.mixer"].any()


@pytest.mark.parametrize("mode", ["route", "observe"])
def test_keyword_arguments_reach_the_adapter(mode: str) -> None:
    mixer = vim().layers[0].mixer
    orders = torch.stack([torch.randperm(9), torch.randperm(9)])
    with torch.no_grad(), mamba_attn.trace(mixer, mode=mode) as trace:
        mixer(torch.randn(1, 9, 16), orders=orders)
    assert torch.equal(trace.layers[0].scan.read_order, orders)


class Doubled(Rules):
    def gate(self, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return 2 * y * gate


class Slower(Rules):
    def scan(self, record: mamba_attn.ScanRecord) -> mamba_attn.ScanRecord:
        return record.replace(source_delta=record.source_delta * 0.5)


def test_rules_of_an_outer_trace_hold_inside_and_reach_the_scan() -> None:
    model, x = vim(), images()
    with torch.no_grad():
        with mamba_attn.trace(model, rules=Doubled()):
            expected = model(x)
            with mamba_attn.trace(model):
                assert torch.equal(model(x), expected)
        with mamba_attn.trace(model, rules=Slower()) as slower:
            model(x)
        with mamba_attn.trace(model) as plain:
            model(x)
    torch.testing.assert_close(slower.layers[0].scan.delta, plain.layers[0].scan.delta * 0.5)


@pytest.mark.parametrize("mode", ["route", "observe"])
def test_matrices_of_the_pass_are_kept_per_fold(mode: str) -> None:
    model, x = vim(), images()
    with torch.no_grad(), mamba_attn.trace(model, mode=mode, attention="mean") as outer:
        with mamba_attn.trace(model, mode=mode, attention="sum") as inner:
            model(x)
    mean, total = outer.layers[0], inner.layers[0]
    assert mean.attention() is mean.attention()
    assert total.attention("sum") is total.attention("sum")
    channels = mean.scan.channels
    torch.testing.assert_close(total.attention("sum"), mean.attention() * channels, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(mean.attention("sum"), total.attention("sum"))
    rows = torch.full((2, channels, 16), 3.0)
    torch.testing.assert_close(mean.attention(row_weight=rows), 3 * mean.attention())


def test_weights_and_folds_reach_rows_columns_products_and_routes() -> None:
    model = vmamba()
    with torch.no_grad(), mamba_attn.trace(model) as trace:
        model(images())
    layer = trace.layers[0]
    scan = layer.scan
    rows = torch.randn(2, scan.channels, scan.tokens)
    matrix = layer.attention("sum", row_weight=rows)
    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(layer.row(5, fold="sum", row_weight=rows), matrix[:, 5], **close)
    torch.testing.assert_close(layer.column(5, fold="sum", row_weight=rows), matrix[:, :, 5], **close)
    vector = torch.randn(2, scan.tokens)
    left = layer.left_product(vector, fold="sum", row_weight=rows)
    torch.testing.assert_close(left, vector + torch.einsum("bi,bij->bj", vector, matrix), **close)
    each = torch.randn(2, 4, scan.channels, scan.length)
    parts = layer.attention("sum", "each", row_weight=each)
    torch.testing.assert_close(parts.sum(1), layer.attention("sum", row_weight=each), **close)


def test_a_given_layout_is_kept_and_one_that_does_not_fit_is_not() -> None:
    model = vim()
    layout = mamba_attn.TokenLayout(grid=(3, 5), patch_size=80, class_tokens=(7,))
    with torch.no_grad(), mamba_attn.trace(model, layout=layout) as trace:
        model(images())
    assert trace.layers[0].layout is layout
    with torch.no_grad(), mamba_attn.trace(model, layout=mamba_attn.TokenLayout(grid=(7, 7))) as trace:
        model(images())
    with pytest.raises(TraceError):
        _ = trace.layers[0].layout
    model = vmamba()
    layout = mamba_attn.TokenLayout(grid=(6, 10), patch_size=80)
    with torch.no_grad(), mamba_attn.trace(model, layout=layout) as trace:
        model(images())
    assert trace.layers[0].layout is layout
    assert trace.layers[2].layout.grid == (3, 5)  # of the next stage


def test_class_token_first_and_patch_sizes_round_to_the_nearest_power() -> None:
    model = vim(class_token="first")
    with torch.no_grad(), mamba_attn.trace(model) as trace:
        model(images())
    assert trace.layers[0].layout.class_tokens == (0,)
    model = mamba_attn.models.create("vanilla_vmamba_tiny", depths=(1, 1, 1, 1), dims=(8, 16, 32, 64))
    with torch.no_grad(), mamba_attn.trace(model) as trace:
        model(torch.randn(1, 3, 70, 70))  # 17 tokens a side: 4.1 pixels each
    assert [layer.layout.patch_size for layer in trace.layers] == [4, 8, 16, 32]


class Shifted(VimAdapter):
    """Says that out_proj receives something else than it does."""

    family: ClassVar[str] = "shifted"

    def scan_output(self, module, record, y):
        receiver, value = super().scan_output(module, record, y)
        return receiver, value * 1.01


class Littering(VimAdapter):
    """Leaves an attribute on the mixer."""

    family: ClassVar[str] = "littering"

    def project(self, module, x, orders=None, *, rules, seen):
        module.seen_by = "me"
        return super().project(module, x, orders, rules=rules, seen=seen)


class Loud(VimAdapter):
    """Changes a weight that is used later in the pass."""

    family: ClassVar[str] = "loud"

    def __init__(self, head: nn.Linear) -> None:
        self.head = head

    def project(self, module, x, orders=None, *, rules, seen):
        self.head.weight.data *= 1.001
        return super().project(module, x, orders, rules=rules, seen=seen)


@pytest.mark.changes_model("attributes")
def test_check_adapter_catches_each_kind_of_mistake() -> None:
    x = images()
    with pytest.raises(LawError, match="law 1"):
        check_adapter(vim(), x, adapters=[Shifted()])
    with pytest.raises(LawError, match="the model was left changed"):
        check_adapter(vim(), x, adapters=[Littering()])
    with pytest.raises(LawError, match="mode='observe' changed"):
        check_adapter(model := vim(), x, adapters=[Loud(model.head)])
    with pytest.raises(LawError, match="no recognised layer ran"):
        check_adapter(vim(), x, call=lambda model, x: x)


def test_mixers_inside_mixers_and_the_order_of_adapters() -> None:
    model = vim()
    model.layers[0].mixer.add_module("inner", vim().layers[0].mixer)
    assert "layers.0.mixer.inner" not in find_mixers(model)
    first, second = Shifted(), VimAdapter()
    mamba_attn.register_adapter(second)
    mamba_attn.register_adapter(first)
    try:
        assert find_mixers(model)["layers.0.mixer"][1] is first
    finally:
        _registered.clear()


def test_a_copy_made_inside_a_trace_is_a_plain_model() -> None:
    model, x = vim(), images()
    with torch.no_grad():
        expected = model(x)
        with mamba_attn.trace(model) as trace:
            twin = copy.deepcopy(model)
            assert torch.equal(twin(x), expected)
            assert len(trace) == 0
        assert torch.equal(twin(x), expected)
        twin.layers[0].mixer.out_proj.weight.mul_(2)
        assert not torch.equal(twin(x), expected)
        assert torch.equal(model(x), expected)


class Parallel(torch.nn.Module):
    """One mixer for three parts of the channels, as UltraLight VM-UNet has it."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = mamba_attn.models.create("vim_micro", depth=1, embed_dim=16).layers[0].mixer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.mixer(part) for part in x.chunk(3, -1)], -1)


@pytest.mark.parametrize("mode", ["route", "observe"])
def test_calls_of_one_mixer_in_one_forward_are_several_layers(mode):
    model, x = Parallel().eval(), torch.randn(2, 7, 48)
    with torch.no_grad(), mamba_attn.trace(model, mode=mode) as trace:
        model(x)
    assert list(trace) == trace.names == ["mixer", "mixer#2", "mixer#3"]
    for name, part in zip(trace, x.chunk(3, -1), strict=True):
        with torch.no_grad(), mamba_attn.trace(model.mixer, mode=mode) as alone:
            model.mixer(part)
        torch.testing.assert_close(trace[name].attention(), alone[0].attention(), rtol=1e-5, atol=1e-7)
    report = check_adapter(model, x)
    assert [layer.name for layer in report.layers] == list(trace)
    with torch.no_grad(), mamba_attn.trace(model, mode=mode) as twice:
        model(x)
        model(x)
    with pytest.raises(TraceError, match="mixer ran twice inside one trace"):
        twice["mixer"]
