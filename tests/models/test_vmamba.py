import copy
import itertools

import pytest
import torch
from torch import nn

from mamba_attn import orders as patch_orders
from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.rules import Rules
from mamba_attn.models import vmamba
from mamba_attn.models.vmamba import SS2D, VSSM
from mamba_attn.ops import reference
from tests.models import naive

SMALL = {"num_classes": 5, "dims": 16, "depths": (1, 2, 1), "d_state": 2}
V0 = {"generation": "v0", "ssm_ratio": 2.0, "mlp_ratio": 0.0}
DTYPES = [(torch.float32, 1e-5), (torch.float64, 1e-10)]


def small(dtype=torch.float64, **options):
    return naive.randomise(VSSM(**{**SMALL, **options}).to(dtype).eval())


def images(height=24, width=40, batch=2, dtype=torch.float64):
    return torch.randn(batch, 3, height, width, dtype=dtype)


def mixer(dtype=torch.float64, **options):
    return naive.randomise(SS2D(16, **options).to(dtype).eval())


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("options", [{}, V0, {"ssm_ratio": 2.0, "d_state": 1}])
@pytest.mark.parametrize("size", [(24, 40), (25, 19)])
def test_equals_the_equations(dtype, tolerance, options, size):
    model, x = small(dtype, **options), images(*size, dtype=dtype)
    expected = naive.vmamba(model.state_dict(), x, depths=(1, 2, 1), v0=options is V0)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{}, V0])
@pytest.mark.parametrize("size", [(100, 60), (33, 47), (4, 4), (5, 7)])
def test_layout_is_the_grid_of_each_stage(options, size):
    model, seen = small(**options), []
    for stage in model.layers:
        stage.blocks[0].register_forward_hook(lambda _, args, output: seen.append(tuple(output.shape[1:3])))
    with torch.no_grad():
        model(images(*size))
    layouts = [model.layout(*size, stage) for stage in range(3)]
    assert seen == [layout.grid for layout in layouts]
    assert [layout.patch_size for layout in layouts] == [4, 8, 16]


def test_batch_mates_do_not_matter():
    model, x = small(), images(batch=3)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-12, atol=1e-12)


def test_order_changes_the_output_and_raster_is_the_default():
    model, x = small(), images()
    outputs = []
    orders = ("raster", "transpose"), ("spiral", "transpose"), ("diagonal", "transpose"), ("diagonal", "mirror")
    for order, second in orders:
        other = VSSM(**SMALL, order=order, second=second).double().eval()
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            outputs.append(other(x))
    with torch.no_grad():
        torch.testing.assert_close(outputs[0], model(x), rtol=0, atol=0)
    assert all((a - b).abs().max() > 1e-4 for a, b in itertools.pairwise(outputs))


def test_record_reads_in_the_order_of_the_mixer():
    module = mixer(order="morton", second="mirror")
    record = vmamba.project(module, torch.randn(1, 3, 5, 16, dtype=torch.float64), orders=module.routes(3, 5))
    assert torch.equal(record.read_order, patch_orders.cross("morton", 3, 5, "mirror"))
    torch.testing.assert_close(record.u[:, 1], record.source_u[:, 0, :, record.read_order[1]])


@pytest.mark.parametrize("options", [{}, {"order": "zigzag", "second": "mirror"}, V0])
def test_the_matrices_give_what_enters_out_norm(options):
    model, seen = small(**options), {}
    op = model.layers[1].blocks[1].op
    op.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    op.out_norm.register_forward_pre_hook(lambda _, args: seen.update(merged=args[0]))
    with torch.no_grad():
        model(images(24, 40))
        record = vmamba.project(op, seen["x"], orders=op.routes(*seen["x"].shape[1:3]))
    assert seen["merged"].shape[1:3] == (3, 5)
    M = reference.channel_matrices(record)
    D = record.D.unsqueeze(-1)
    y = (M @ record.u.unsqueeze(-1)).squeeze(-1) + D * record.u
    merged = seen["merged"].flatten(1, 2).mT
    torch.testing.assert_close(reference.merge_tokens(record, y), merged, rtol=1e-10, atol=1e-10)
    u = record.source_u[:, 0]
    together = (reference.merge(record, M) @ u.unsqueeze(-1)).squeeze(-1) + D.sum(0) * u
    torch.testing.assert_close(together, merged, rtol=1e-10, atol=1e-10)


def test_default_routes_and_layout_of_project():
    record = vmamba.project(mixer(), torch.randn(1, 2, 3, 16, dtype=torch.float64))
    assert record.read_order.tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0, 3, 1, 4, 2, 5],
        [5, 4, 3, 2, 1, 0],
        [5, 2, 4, 1, 3, 0],
    ]
    assert record.layout == TokenLayout(grid=(2, 3))
    assert record.source_u.shape == (1, 1, 16, 6)
    assert record.source_delta.shape == (1, 4, 16, 6)
    assert record.source_u.stride(2) == record.source_delta.stride(2) == 1


def test_finish_needs_a_layout():
    module, x = mixer(), torch.randn(1, 2, 3, 16, dtype=torch.float64)
    record = vmamba.project(module, x).replace(layout=None)
    with pytest.raises(ValueError, match=r"finish\(record\): the record has no layout"):
        vmamba.finish(module, record, record.source_u[:, 0])


class ChannelFirstLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x.movedim(1, 3)).movedim(3, 1)


class ChannelFirstNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.movedim(1, 3)).movedim(3, 1)


class GroupedLinear(nn.Linear):
    """Every quarter of the channels through its own quarter of the rows; (batch, channels, length)."""

    groups = 4

    def __init__(self, weight):
        super().__init__(weight.shape[1], weight.shape[0], bias=False)
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        pairs = zip(x.chunk(4, 1), self.weight.chunk(4), strict=True)
        return torch.cat([weight @ part for part, weight in pairs], 1)


@pytest.mark.parametrize("options", [{}, {"gated": True, "conv_bias": True, "ratio": 2.0, "d_state": 4}])
def test_foreign_channel_first_modules_with_the_other_names(options):
    ours, x = mixer(**options), torch.randn(2, 3, 5, 16, dtype=torch.float64)
    channels = ours.out_norm.normalized_shape[0]
    foreign = copy.deepcopy(ours)
    foreign.channel_first = True
    foreign.in_proj = ChannelFirstLinear(16, ours.in_proj.out_features, bias=False, dtype=torch.float64)
    foreign.out_proj = ChannelFirstLinear(channels, 16, bias=False, dtype=torch.float64)
    foreign.out_norm = ChannelFirstNorm(channels, dtype=torch.float64)
    foreign.load_state_dict(ours.state_dict())
    foreign.x_proj = GroupedLinear(foreign.x_proj_weight.detach().flatten(0, 1))
    foreign.dt_projs = GroupedLinear(foreign.dt_projs_weight.detach().flatten(0, 1))
    del foreign.x_proj_weight, foreign.dt_projs_weight
    foreign.out_act = nn.Identity()
    foreign.dropout = nn.Dropout(0.0)
    torch.testing.assert_close(foreign(x), ours(x), rtol=1e-12, atol=1e-12)
    foreign.dropout = None
    torch.testing.assert_close(foreign(x), ours(x), rtol=1e-12, atol=1e-12)


def test_foreign_variants():
    module, x = mixer(gated=True), torch.randn(1, 2, 3, 16, dtype=torch.float64)
    plain = vmamba.project(module, x)
    module.disable_z_act = True
    z = module.in_proj(x)[..., 16:].flatten(1, 2).mT
    torch.testing.assert_close(vmamba.project(module, x).gate, z)
    module.x_proj_bias = torch.ones(module.x_proj_weight.shape[:2].numel(), dtype=torch.float64)
    torch.testing.assert_close(vmamba.project(module, x).source_B, plain.source_B + 1)
    del module.conv2d
    u = torch.nn.functional.silu(module.in_proj(x)[..., :16]).flatten(1, 2).mT
    torch.testing.assert_close(vmamba.project(module, x).source_u[:, 0], u)


def test_rules_are_asked():
    class Recorder(Rules):
        asked = ()

        def activation(self, function, x):
            self.asked += ("activation",)
            return super().activation(function, x)

        def gate(self, y, gate):
            self.asked += ("gate",)
            return super().gate(y, gate)

        def norm(self, module, x, call=None):
            self.asked += (module,)
            return super().norm(module, x, call)

    rules, module = Recorder(), mixer(gated=True)
    record = vmamba.project(module, torch.randn(1, 2, 3, 16, dtype=torch.float64), rules=rules)
    vmamba.finish(module, record, record.source_u[:, 0], rules)
    assert rules.asked == ("activation", "activation", module.out_norm, "gate")


def test_step_sizes_stay_float32_under_autocast():
    module, x = mixer(torch.float32), torch.randn(2, 3, 5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        record = vmamba.project(module, x)
        output = module(x)
    assert (record.source_delta.dtype, record.A.dtype, record.source_u.dtype) == (
        torch.float32, torch.float32, torch.bfloat16,
    )  # fmt: skip
    with torch.no_grad():
        exact = module(x)
    assert (output - exact).abs().max() < 0.05 * exact.abs().max()


def test_training_reaches_every_parameter():
    model = small(torch.float32, drop_path=0.2).train()
    rates = [block.drop_path.rate for stage in model.layers for block in stage.blocks]
    assert rates == pytest.approx([0, 0.2 / 3, 0.4 / 3, 0.2])
    for stage in model.layers:
        for block in stage.blocks:
            block.drop_path.rate = 0
    with torch.inference_mode():  # the remembered routes must serve training afterwards
        model(images(23, 37, dtype=torch.float32))
    model(images(23, 37, dtype=torch.float32)).square().sum().backward()
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in model.parameters())


def test_no_weight_decay():
    names = small().no_weight_decay()
    assert names == {
        f"layers.{stage}.blocks.{block}.op.{name}"
        for stage, depth in enumerate((1, 2, 1))
        for block in range(depth)
        for name in ("A_logs", "Ds", "dt_projs_bias")
    }


def test_no_classes_leave_the_features():
    assert small(num_classes=0)(images()).shape == (2, 64)


def test_widths_of_each_stage():
    assert small(dims=(8, 12, 20))(images()).shape == (2, 5)


def test_errors():
    with pytest.raises(ValueError, match=r"VSSM\(generation='v9'\): expected 'v0' or 'v05_noz'"):
        VSSM(generation="v9")
    with pytest.raises(ValueError, match=r"VSSM\(order='mortom'\): no such order. Did you mean 'morton'"):
        VSSM(order="mortom")
    with pytest.raises(ValueError, match=r"VSSM\(second='flip'\): expected 'transpose' or 'mirror'"):
        VSSM(second="flip")
    with pytest.raises(ValueError, match="expected one entry of each per stage"):
        VSSM(dims=(8, 16), depths=(1, 1, 1))
    with pytest.raises(ValueError, match=r"24 x 3 pixels leaves a stage .* the smallest possible size is 4 x 4"):
        small(**V0)(images(24, 3))
    with pytest.raises(ValueError, match=r"0 x 3 pixels leaves a stage .* the smallest possible size is 1 x 1"):
        small()(images(0, 3))
