"""trace(): what it records, and that nothing stays behind whatever happens."""

import threading

import pytest
import torch
from torch import nn

import mamba_attn
from mamba_attn.core.rules import Rules
from mamba_attn.errors import NonFiniteError, TraceError, UnknownLayerError, UnsupportedModelError
from mamba_attn.ops import reference
from tests.leaks import differences, state_of


def vim(**options: object) -> nn.Module:
    return mamba_attn.models.create("vim_micro", image_size=(24, 40), depth=3, embed_dim=16, **options)


def vmamba(**options: object) -> nn.Module:
    return mamba_attn.models.create("vmamba_micro", image_size=64, **options)


def snapshot(model: nn.Module) -> dict[tuple[str, str], object]:
    return {
        (f"{name} {aspect}", item): value
        for name, module in model.named_modules()
        for (aspect, item), value in state_of(module).items()
    }


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 24, 40)


def test_the_first_screen() -> None:
    model = vim()
    with mamba_attn.trace(model, attention="mean") as trace:
        logits = model(images())
    assert list(trace) == ["layers.0.mixer", "layers.1.mixer", "layers.2.mixer"]
    attention = trace["layers.1.mixer"].attention()
    assert attention.shape == (2, 16, 16)
    truth = reference.merge(
        trace["layers.1.mixer"].scan, reference.hidden_attention(trace["layers.1.mixer"].scan, None, None, "mean")
    )
    torch.testing.assert_close(attention.double(), truth, rtol=1e-5, atol=1e-7)
    assert torch.equal(logits, model.eval()(images()) * 0 + logits)
    assert trace.layers[0].layout.grid == (3, 5)
    assert trace.layers[0].layout.class_tokens == (7,)


@pytest.mark.parametrize("make", [vim, vmamba])
@pytest.mark.parametrize("mode", ["route", "observe"])
def test_outputs_and_records_agree_in_both_modes(make: object, mode: str) -> None:
    model = make()
    x = images()
    with torch.no_grad():
        plain = model(x)
        with mamba_attn.trace(model, mode=mode) as trace:
            traced = model(x)
    assert torch.equal(traced, plain)
    with torch.no_grad(), mamba_attn.trace(model) as again:
        model(x)
    for name in again:
        torch.testing.assert_close(trace[name].attention(), again[name].attention(), rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(trace[name].y, again[name].y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [vim, vmamba])
def test_gradients_of_both_modes_equal_a_hook_on_the_untouched_model(make: object) -> None:
    model = make()
    x = images()
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        target = getattr(module, "out_norm", None)
        if hasattr(module, "A_log"):
            target = module.out_proj
        if isinstance(target, nn.Module):

            def keep(module: nn.Module, args: tuple[torch.Tensor], name: str = name) -> None:
                args[0].retain_grad()
                seen[name] = args[0]

            handles.append(target.register_forward_pre_hook(keep))
    model(x)[:, 3].sum().backward()
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    for mode in ("route", "observe"):
        with mamba_attn.trace(model, mode=mode) as trace:
            logits = model(x)
        gradients = trace.gradients(logits[:, 3].sum())
        assert list(gradients) == list(seen)
        for name, gradient in gradients.items():
            expected = seen[name].grad.flatten(1, -2).mT
            gate = trace[name].scan.gate
            expected = expected if gate is None else expected * gate
            scale = expected.abs().max().item()
            torch.testing.assert_close(gradient, expected, rtol=0, atol=2e-5 * scale)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("make", [vim, vmamba])
@pytest.mark.parametrize("frozen", [False, True])
def test_outputs_and_their_gradients_equal_those_of_the_untouched_model(make: object, frozen: bool) -> None:
    model = make()
    x = images()
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if hasattr(module, "out_proj"):

            def keep(module: nn.Module, args: object, output: torch.Tensor, name: str = name) -> None:
                output.retain_grad()
                seen[name] = output

            handles.append(module.register_forward_hook(keep))
    model(x)[:, 3].sum().backward()
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    model.requires_grad_(not frozen)
    for mode in ("route",) if frozen else ("route", "observe"):
        with mamba_attn.trace(model, mode=mode) as trace:
            logits = model(x)
        gradients = trace.gradients(logits[:, 3].sum(), of="output")
        assert list(gradients) == list(seen)
        for name, gradient in gradients.items():
            assert torch.equal(trace[name].output, seen[name])
            scale = seen[name].grad.abs().max().item()
            torch.testing.assert_close(gradient, seen[name].grad, rtol=0, atol=2e-5 * scale)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_of_what_is_no_tensor_or_not_known() -> None:
    model = vim()
    with mamba_attn.trace(model) as trace:
        logits = model(images())
    with pytest.raises(ValueError, match=r"gradients\(of='z'\): expected one of \('y', 'output'\)"):
        trace.gradients(logits[0, 1], of="z")
    trace.layers[1]._output = (logits,)
    with pytest.raises(TraceError, match=r"layers\.1\.mixer: the mixer returned tuple, not a tensor"):
        trace.gradients(logits[0, 1], of="output")


def test_gradients_of_a_frozen_model_and_of_a_pass_without_them() -> None:
    model = vim().requires_grad_(False)
    with mamba_attn.trace(model) as trace:
        logits = model(images())
    assert trace.gradients(logits[0, 1])["layers.0.mixer"].abs().max() > 0
    with torch.no_grad(), mamba_attn.trace(model) as trace:
        logits = model(images())
    with pytest.raises(TraceError, match="ran without gradients; call the model outside no_grad"):
        trace.gradients(logits[0, 1])


def test_records_keep_the_graph_only_with_gradients() -> None:
    model = vim()
    with mamba_attn.trace(model) as trace:
        model(images())
    assert trace.layers[1].scan.source_u.requires_grad
    assert trace.layers[1].attention().requires_grad
    with torch.no_grad(), mamba_attn.trace(model) as trace:
        model(images())
    assert not trace.layers[1].scan.source_u.requires_grad


def test_layer_rows_columns_and_products() -> None:
    model = vmamba()
    with torch.no_grad(), mamba_attn.trace(model) as trace:
        model(images())
    layer = trace["layers.1.blocks.0.op"]
    matrix = layer.attention()
    torch.testing.assert_close(layer.row(4), matrix[:, 4], rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(layer.column(4), matrix[:, :, 4], rtol=1e-4, atol=1e-8)
    vector = torch.randn(2, layer.scan.tokens)
    expected = vector + torch.einsum("bi,bij->bj", vector, matrix)
    torch.testing.assert_close(layer.left_product(vector), expected, rtol=1e-4, atol=1e-5)
    weight = torch.randn(2, layer.scan.channels, layer.scan.tokens)
    weighted = layer.attention("sum", col_weight=weight)
    torch.testing.assert_close(layer.row(4, fold="sum", col_weight=weight), weighted[:, 4], rtol=1e-4, atol=1e-5)
    column = layer.column(4, fold="sum", col_weight=weight)
    torch.testing.assert_close(column, weighted[:, :, 4], rtol=1e-4, atol=1e-5)
    alone = layer.left_product(vector, fold="sum", col_weight=weight, residual=False)
    torch.testing.assert_close(alone, torch.einsum("bi,bij->bj", vector, weighted), rtol=1e-4, atol=1e-4)
    each = layer.attention(routes="each")
    assert each.shape == (2, 4, layer.scan.tokens, layer.scan.tokens)
    torch.testing.assert_close(each.sum(1), matrix, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(layer.attention(routes=2), each[:, 2])
    with pytest.raises(ValueError, match=r"routes=4\): expected 'sum', 'each' or 0\.\.3"):
        layer.attention(routes=4)


def test_submodules_are_called_as_modules() -> None:
    model = vim()
    mixer = model.layers[1].mixer
    calls: list[str] = []
    handles = [
        getattr(mixer, name).register_forward_hook(lambda *_, name=name: calls.append(name))
        for name in ("in_proj", "conv1d", "x_proj_b", "dt_proj", "out_proj")
    ]
    with torch.no_grad(), mamba_attn.trace(model):
        model(images())
    assert sorted(calls) == ["conv1d", "dt_proj", "in_proj", "out_proj", "x_proj_b"]
    for handle in handles:
        handle.remove()


def test_autocast_is_obeyed() -> None:
    model = vim()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = model(images())
        with mamba_attn.trace(model) as trace:
            traced = model(images())
    assert traced.dtype == plain.dtype
    assert trace.layers[0].scan.source_B.dtype == torch.bfloat16
    assert trace.layers[0].attention().dtype == torch.float32


class Doubled(Rules):
    def gate(self, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return 2 * y * gate


def test_rules_change_the_forward_while_traced() -> None:
    model, x = vim(), images()
    with torch.no_grad():
        plain = model(x)
        with mamba_attn.trace(model, rules=Doubled()):
            changed = model(x)
        assert torch.equal(model(x), plain)
    assert not torch.allclose(changed, plain)
    with pytest.raises(ValueError, match="rules change the forward; use mode='route'"):
        with mamba_attn.trace(model, mode="observe", rules=Doubled()):
            pass


# ---- nothing stays behind


@pytest.mark.parametrize("mode", ["route", "observe"])
def test_an_exception_in_the_block_leaves_nothing(mode: str) -> None:
    model = vim()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt), mamba_attn.trace(model, mode=mode):
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError), mamba_attn.trace(model, mode=mode):
        model(torch.randn(2, 5, 24, 40))
    assert not differences(before, snapshot(model), "model")


def test_a_failure_half_way_through_installation_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vim()
    before = snapshot(model)
    broken = model.layers[2].mixer

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no more hooks")

    monkeypatch.setattr(broken, "register_forward_hook", refuse, raising=False)
    with pytest.raises(OSError, match="no more hooks"), mamba_attn.trace(model, mode="observe"):
        pass
    monkeypatch.undo()
    assert not differences(before, snapshot(model), "model")


def test_nesting_gives_both_traces_the_pass_and_inner_exit_keeps_the_outer() -> None:
    model, x = vim(), images()
    with torch.no_grad(), mamba_attn.trace(model) as outer:
        with mamba_attn.trace(model, layers=["layers.1.mixer"]) as inner:
            model(x)
        assert list(inner) == ["layers.1.mixer"]
        assert len(outer) == 3
    assert inner["layers.1.mixer"].scan is outer["layers.1.mixer"].scan
    with torch.no_grad(), mamba_attn.trace(model) as outer:
        with mamba_attn.trace(model, layers=["layers.1.mixer"]) as inner:
            pass
        model(x)
    assert len(outer) == 3
    assert len(inner) == 0


def test_leaving_traces_out_of_order_restores_the_model() -> None:
    model = vim()
    before = snapshot(model)
    first, second = mamba_attn.trace(model), mamba_attn.trace(model)
    first.__enter__()
    record = second.__enter__()
    first.__exit__(None, None, None)
    with torch.no_grad():
        model(images())
    second.__exit__(None, None, None)
    assert len(record) == 3
    assert not differences(before, snapshot(model), "model")


def test_two_threads_on_one_model_see_their_own_pass() -> None:
    model = vim()
    before = snapshot(model)
    barrier = threading.Barrier(2)
    found: dict[int, float] = {}
    wanted: dict[int, float] = {}

    def work(index: int) -> None:
        x = torch.full((1, 3, 24, 40), float(index + 1))
        with torch.no_grad():
            with mamba_attn.trace(model) as trace:
                barrier.wait()
                model(x)
                barrier.wait()
            found[index] = trace.layers[0].y.abs().sum().item()
            with mamba_attn.trace(model) as alone:
                model(x)
            wanted[index] = alone.layers[0].y.abs().sum().item()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted
    assert found[0] != found[1]
    assert not differences(before, snapshot(model), "model")


def test_an_instance_level_forward_is_put_back() -> None:
    model = vmamba()
    op = model.layers[0].blocks[0].op
    own = type(op).forward.__get__(op)
    op.forward = own
    with torch.no_grad(), mamba_attn.trace(model) as trace:
        model(images())
    assert op.__dict__["forward"] is own
    assert len(trace) == 10


# ---- sentences


def test_reading_too_early_or_twice_or_misspelt() -> None:
    model = vim()
    with torch.no_grad(), mamba_attn.trace(model) as trace:
        with pytest.raises(TraceError, match="has not run: call the model inside the with-block"):
            _ = trace["layers.0.mixer"]
        with pytest.raises(KeyError, match=r"Did you mean 'layers\.0\.mixer'"):
            trace["layer.0.mixer"]
        model(images())
        model(images())
        with pytest.raises(TraceError, match=r"layers\.2\.mixer ran twice inside one trace"):
            _ = trace["layers.2.mixer"]
    with pytest.raises(UnknownLayerError, match=r"'layers\.9\.mixer' fits no layer"):
        with mamba_attn.trace(model, layers=["layers.9.mixer"]):
            pass
    with torch.no_grad(), mamba_attn.trace(model, layers=["layers.[02].*"]) as trace:
        model(images())
    assert list(trace) == ["layers.0.mixer", "layers.2.mixer"]


def test_a_model_with_nothing_to_trace() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(
        UnsupportedModelError,
        match=r"Families known: Vim, Mamba of language models, Mamba, VMamba, .*timm ViT\..*Sequential x 1, Conv2d x 1",
    ):
        with mamba_attn.trace(model):
            pass


def test_not_finite_activations_name_the_layer() -> None:
    model = vim()
    with torch.no_grad():
        model.layers[1].mixer.dt_proj.bias.fill_(float("nan"))
        with mamba_attn.trace(model) as trace:
            model(images())
    assert torch.isfinite(trace["layers.0.mixer"].attention()).all()
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mixer: delta contain NaN or Inf"):
        trace["layers.1.mixer"].attention()
    with pytest.raises(NonFiniteError, match=r"layers\.2\.mixer: u"):
        trace["layers.2.mixer"].row(0)


def test_inputs_on_another_device() -> None:
    model = vim()
    with mamba_attn.trace(model), pytest.raises(ValueError, match="is on cpu and its input on meta: move one"):
        model(images().to("meta"))


def test_unknown_mode_and_fold() -> None:
    with pytest.raises(ValueError, match="mode='hook'"), mamba_attn.trace(vim(), mode="hook"):
        pass
    with pytest.raises(ValueError, match="attention='max'"), mamba_attn.trace(vim(), attention="max"):
        pass


def test_without_a_layout_maps_are_refused() -> None:
    model = vim()
    mixer = model.layers[0].mixer
    with torch.no_grad(), mamba_attn.trace(mixer) as trace:
        mixer(torch.randn(1, 9, 16))
    layer = trace.layers[0]
    assert layer.attention().shape == (1, 9, 9)
    with pytest.raises(TraceError, match="the tokens' place in the image is not known"):
        _ = layer.layout
    layout = mamba_attn.TokenLayout(grid=(2, 4), class_tokens=(4,))
    with torch.no_grad(), mamba_attn.trace(mixer, layout=layout) as trace:
        mixer(torch.randn(1, 9, 16))
    assert trace.layers[0].layout is layout


def test_layers_of_one_kind() -> None:
    model = mamba_attn.models.create("vit_micro", image_size=128).eval()
    with torch.no_grad(), mamba_attn.trace(model) as record:
        with pytest.raises(TraceError, match="no layer has run yet"):
            record.scans  # noqa: B018 - the access is the test
        model(torch.randn(2, 3, 128, 128))
    assert list(record.softmax.values()) == record.layers
    assert record.softmax[-1] is record.layers[-1]
    assert not record.scans


def test_softmax_attention_is_one_route() -> None:
    model = mamba_attn.models.create("vit_micro", image_size=128).eval()
    with torch.no_grad(), mamba_attn.trace(model) as record:
        model(torch.randn(2, 3, 128, 128))
    layer = record[0]
    assert torch.equal(layer.attention(routes="each"), layer.attention().unsqueeze(1))
    assert torch.equal(layer.attention("each", routes=0), layer.attention("each"))
    with pytest.raises(ValueError, match=r"routes=1\): expected 'sum', 'each' or 0\.\.0"):
        layer.attention(routes=1)
