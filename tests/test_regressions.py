"""Every test here failed, hung or killed the process before its fix."""

import pytest
import torch

import mamba_attn
from mamba_attn import attribution, models, ops
from mamba_attn.attribution import catalogue
from mamba_attn.errors import TraceError
from mamba_attn.ops import build_cache
from tests.ops.cases import Case, double, make
from tests.ops.test_gradients import leaves

with mamba_attn.cpu_stand_ins():
    from mamba_ssm import Mamba


def vim() -> torch.nn.Module:
    return mamba_attn.models.create("vim_micro", image_size=(24, 40), depth=2, embed_dim=16)


@pytest.mark.parametrize(
    ("size", "axis"),
    [((0, 4, 3, 6), "batch"), ((2, 0, 3, 6), "channels"), ((2, 4, 0, 6), "states"), ((2, 4, 3, 0), "length")],
)
def test_empty_axes_are_refused(size: tuple[int, ...], axis: str) -> None:  # SIGFPE in the kernel
    batch, channels, states, length = size
    delta, A, B = torch.rand(batch, channels, length), -torch.ones(channels, states), torch.randn(batch, states, length)
    for call in (lambda: ops.hidden_attention(delta, A, B, B), lambda: ops.selective_scan(delta, delta, A, B, B)):
        with pytest.raises(ValueError, match=f"{axis}.* must be at least 1"):
            call()


def test_orders_of_a_record_stay_inside_and_may_be_int32() -> None:  # SIGSEGV, or silent writes past the result
    record = make(Case(routes=2, grid=(3, 5)))
    changed = record.replace(write_order=record.write_order.clone())
    changed.write_order.mul_(2)  # since it was looked at
    with pytest.raises(ValueError, match=r"write_order visits 0\.\.28, but there are 15 tokens"):
        ops.selective_scan(changed, backend="native")
    with pytest.raises(ValueError, match="visits"):
        ops.hidden_attention(changed, backend="native")
    narrow = record.replace(read_order=record.read_order.int(), write_order=record.write_order.int())
    assert torch.equal(ops.selective_scan(narrow), ops.selective_scan(record))
    assert torch.equal(ops.hidden_attention(narrow), ops.hidden_attention(record))


def test_weights_on_another_device_are_refused() -> None:  # was ignored on meta, read as a foreign pointer on CUDA
    record = make(Case())
    with pytest.raises(TypeError, match="row_weight must be a tensor on cpu, got one on meta"):
        ops.hidden_attention(record, row_weight=torch.ones(2, 5, 15, device="meta"))


@pytest.mark.parametrize("backend", ["blocked", "reference", "native"])
def test_a_look_without_gradients_does_not_cut_the_graph(backend: str) -> None:
    record = leaves(make(Case()))
    with torch.no_grad():
        ops.selective_scan(record, backend=backend)
    y = ops.selective_scan(record, backend=backend)
    for _ in range(2):  # and a second pass needs no retained graph
        y = ops.selective_scan(record, backend=backend)
        torch.autograd.grad(y.sum(), [record.source_u, record.source_delta, record.source_B, record.source_C])


def test_products_in_and_after_inference_mode() -> None:
    model = vim()
    with torch.inference_mode(), mamba_attn.trace(model) as trace:
        model(torch.randn(2, 3, 24, 40))
        inside = trace.layers[0].left_product(torch.ones(2, 16))
    assert torch.equal(trace.layers[0].left_product(torch.ones(2, 16)), inside)


def test_autocast_does_not_round_the_matrices() -> None:
    record = make(Case(channels=32, states=8, grid=(8, 8)))
    plain = ops.hidden_attention(record, backend="blocked")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.hidden_attention(record, backend="blocked"), plain)


def test_very_fast_decay_is_zero_not_nan() -> None:
    record = make(Case(routes=1, grid=(1, 50), delta_scale=1e3))
    record = record.replace(A=record.A * 1e6)
    truth = ops.hidden_attention(double(record), backend="reference")
    torch.testing.assert_close(ops.hidden_attention(record, backend="native").double(), truth, rtol=1e-5, atol=1e-3)


def test_without_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MAMBA_ATTN_CACHE", raising=False)
    monkeypatch.setattr(build_cache.Path, "home", nowhere)
    assert build_cache.cache_folder().is_dir()


def test_a_forward_that_the_user_wraps_inside_stays() -> None:
    mixer = vim().layers[0].mixer
    with mamba_attn.trace(mixer):
        routed = mixer.forward
        mixer.forward = lambda *args: routed(*args)
        own = mixer.forward
    assert mixer.forward is own
    assert mixer(torch.randn(1, 9, 16)).shape == (1, 9, 16)
    with mamba_attn.trace(mixer := vim().layers[0].mixer):
        del mixer.forward
    assert "forward" not in vars(mixer)


test_a_forward_that_the_user_wraps_inside_stays = pytest.mark.changes_model("forward")(
    test_a_forward_that_the_user_wraps_inside_stays
)


def test_in_before_the_pass_and_gradients_of_another_pass() -> None:
    model, x = vim(), torch.randn(1, 3, 24, 40)
    with mamba_attn.trace(model) as trace:
        assert "layers.0.mixer" not in trace
        model(x)
        assert "layers.0.mixer" in trace
    with pytest.raises(TraceError, match="does not depend on this forward pass"):
        trace.gradients(model(x)[0, 1])


def test_sources_of_which_only_one_is_shared() -> None:
    record = make(Case(routes=2))
    record = leaves(record.replace(source_B=record.source_B[:, :1]))
    found = [
        torch.autograd.grad(ops.selective_scan(record, backend=b).sum(), [record.source_B, record.source_C])
        for b in ("native", "blocked")
    ]
    for native, blocked in zip(*found, strict=True):
        torch.testing.assert_close(native, blocked, rtol=1e-4, atol=1e-4)


def test_the_official_blocks_pass_inference_params() -> None:
    mixer = vim().layers[0].mixer
    original = mixer.forward
    mixer.forward = lambda x, inference_params=None: original(x)
    with mamba_attn.trace(mixer) as trace:
        mixer(torch.randn(1, 9, 16), inference_params=None)
    assert len(trace) == 1


class Block(torch.nn.Module):
    """A block of mamba_ssm over the cells of a map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mixer = torch.nn.LayerNorm(width), Mamba(d_model=width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).mT
        mixed: torch.Tensor = (tokens + self.mixer(self.norm(tokens))).mT.reshape(x.shape)
        return mixed


class TwoGrids(torch.nn.Module):
    """Blocks at two resolutions; the coarse map has as many channels times rows as the fine one has cells."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = torch.nn.Conv2d(3, 16, 4, 4), torch.nn.Conv2d(16, 32, 2, 2)
        self.fine, self.coarse, self.last = Block(16), Block(32), Block(16)
        self.up, self.head = torch.nn.ConvTranspose2d(32, 16, 2, 2), torch.nn.ConvTranspose2d(16, 3, 4, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        fine = self.fine(self.stem(images))
        scores: torch.Tensor = self.head(self.last(fine + self.up(self.coarse(self.down(fine)))))
        return scores


def test_a_grid_has_square_cells_and_methods_with_rules_find_it_too() -> None:
    torch.manual_seed(0)
    model, images = TwoGrids().eval(), torch.randn(2, 3, 48, 64)
    with torch.no_grad(), mamba_attn.trace(model) as trace:
        model(images)
    assert [layer.layout.grid for layer in trace.layers] == [(12, 16), (6, 8), (12, 16)]  # not 32 x 6
    layout = {"coarse.*": mamba_attn.TokenLayout((6, 8), 8), "*": mamba_attn.TokenLayout((12, 16), 4)}
    for method, options in ((attribution.MambaLRP, {}), (attribution.MambaAttribution, {"rollout": False})):
        found = method(model, **options).attribute(images, (1, 4, 5))
        torch.testing.assert_close(found, method(model, layout=layout, **options).attribute(images, (1, 4, 5)))


@pytest.mark.parametrize("name", ["raw_attention", "attention_rollout", "mamba_attribution", "mamba_lrp", "grad_cam"])
def test_maps_are_float32_whatever_the_precision(name: str) -> None:
    model = models.create("vim_tiny", image_size=32, depth=1, embed_dim=16, num_classes=3)
    images = torch.randn(1, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert catalogue.build(name, model).attribute(images, 1).dtype == torch.float32
    half = catalogue.build(name, model.bfloat16()).attribute(images.bfloat16(), 1)
    assert half.numpy().dtype == "float32"
