"""LaTIM against its sums, token by token and tap by tap, from what hooks see of the untouched model."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mamba_attn.attribution import LaTIM
from mamba_attn.attribution.interactions import InteractionRecorder, Interactions
from mamba_attn.attribution.queries import query_weights
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.tracing.tracer import trace
from tests.attribution.cases import MODELS, averaging, class_or_mean, images, layers_of, per_channel, vim, vmamba
from tests.attribution.test_implicit_at_doors import GRID, Directions, GatedCross, cross
from tests.attribution.test_implicit_at_doors import images as at_doors
from tests.attribution.texts import FEATURES, Words, padded
from tests.attribution.vit.test_attn_lrp import vit
from tests.tracing.foreign import Cross, Net

SMALL = (24, 16)  # VMamba's first grid is 6 x 4


def close(actual, expected, tolerance=1e-11):
    assert expected.abs().max() > 1e-9
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def seen(model, inputs):
    """Per mixer: (what its convolution receives, what enters its last norm or projection, its output, the stream)."""
    found, handles = [], []

    def tokens(tensor):
        return tensor.detach().flatten(1, -2).mT

    for block in model.modules():
        mixer = getattr(block, "op", getattr(block, "mixer", None))
        if mixer is None:
            continue
        channels = mixer.out_proj.in_features
        last = getattr(mixer, "out_norm", mixer.out_proj)
        handles += [
            block.norm.register_forward_pre_hook(lambda _, args: found.append([tokens(args[0])])),
            mixer.in_proj.register_forward_hook(
                lambda _, args, y, channels=channels: found[-1].append(tokens(y)[:, :channels])
            ),
            last.register_forward_pre_hook(lambda _, args: found[-1].append(tokens(args[0]))),
            mixer.register_forward_hook(lambda _, args, y: found[-1].append(tokens(y))),
        ]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return [(x, o, y, stream) for stream, x, o, y in found]


def readers(mixer, scan, route):
    """(weight per channel, step, the token that this tap reads there) of a convolution's taps along a route."""
    order, (height, width) = scan.read_order[route].tolist(), scan.layout.grid
    for step, token in enumerate(order):
        if hasattr(mixer, "conv2d"):
            row, column = divmod(token, width)
            for r in (-1, 0, 1):
                for c in (-1, 0, 1):
                    if 0 <= row + r < height and 0 <= column + c < width:
                        yield mixer.conv2d.weight[:, 0, r + 1, c + 1], step, token + r * width + c
        else:
            weight = (mixer.conv1d_b if route else mixer.conv1d).weight
            for tap in range(weight.shape[2]):
                before = step - (weight.shape[2] - 1 - tap)
                if before >= 0:
                    yield weight[:, 0, tap], step, order[before]


def slowly(model, layer, x, o, act=F.silu):
    """T_i(x_j), (batch, features, tokens i, tokens j), one pair of steps and one tap after the other."""
    mixer, scan = model.get_submodule(layer.name), layer.scan
    alpha = per_channel(layer) + torch.diag_embed(scan.D[:, :, None].expand(-1, -1, scan.length))
    V = torch.zeros(*x.shape, scan.tokens, dtype=x.dtype)
    for route, order in enumerate(scan.read_order.tolist()):
        for weight, step, j in readers(mixer, scan, route):
            handed = act(weight[None] * x[:, :, j])
            for later in range(step, scan.length):
                V[:, :, order[later], j] += scan.scale * alpha[:, route, :, later, step] * handed
    if hasattr(mixer, "out_norm"):
        deviation = (o.var(1, correction=0, keepdim=True) + mixer.out_norm.eps).sqrt()
        V = (V - V.mean(1, keepdim=True)) / deviation[..., None] * mixer.out_norm.weight[:, None, None]
    V = V if scan.gate is None else V * scan.gate[..., None]
    return torch.einsum("fc,bcij->bfij", mixer.out_proj.weight, V).detach()


def interactions(model, inputs):
    recorder = InteractionRecorder()
    with torch.no_grad(), trace(model, rules=recorder) as record:
        model(inputs)
        return [(layer, Interactions(layer, recorder, "LaTIM")) for layer in record.layers]


def vectors(parts, batch):
    """All T_i(x_j), their rows in an order of no block."""
    rows = torch.arange(parts.tokens).roll(2)
    return torch.stack([parts.vectors(image, rows)[:, rows.argsort()] for image in range(batch)])


def of_one_tap(model):
    """Leave one random tap of every channel and no bias: then f of every tap alone is f of their sum."""
    generator = torch.Generator().manual_seed(3)
    for name, module in model.named_modules():
        if "conv1d" in name or "conv2d" in name:
            weight = module.weight.data.flatten(1)
            chosen = torch.randint(weight.shape[1], (len(weight), 1), generator=generator)
            module.weight.data = torch.zeros_like(weight).scatter(1, chosen, 2.0).view(module.weight.shape)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_vectors_sum_to_the_mixers_output_where_the_surrogate_is_exact(name):
    model, inputs = of_one_tap(MODELS[name]()), images(2)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model, inputs = model.to(dtype), inputs.to(dtype)
        for (_, parts), (_, _, y, stream) in zip(interactions(model, inputs), seen(model, inputs), strict=True):
            close(vectors(parts, 2).sum(-1), y, tolerance)
            close(parts.output, y, tolerance)
            close(parts.stream, stream, tolerance)


def test_a_mixer_without_activation_is_split_exactly():
    model = vmamba()
    for stage in model.layers:
        for block in stage.blocks:
            block.op.act = nn.Identity()
    for (_, parts), (_, _, y, _) in zip(interactions(model, images(2)), seen(model, images(2)), strict=True):
        close(vectors(parts, 2).sum(-1), y, 1e-10)


def test_what_sums_lack_is_what_silu_of_single_taps_misses():
    model = vim()
    for (_, parts), (_, _, y, _) in zip(interactions(model, images(2)), seen(model, images(2)), strict=True):
        missed = (vectors(parts, 2).sum(-1) - y).norm() / y.norm()
        assert 1e-3 < missed < 1.5


@pytest.mark.parametrize("name", ["middle", "first", "vmamba", "vmamba_v0"])
def test_vectors_and_matrices_are_the_papers_sums(name):
    model, inputs = MODELS[name](), images(2, SMALL)
    matrices = {kind: LaTIM(model, aggregation=kind).matrices(inputs) for kind in ("alti", "l2")}
    for layer, (x, o, y, stream), (_, parts) in zip(
        layers_of(model, inputs), seen(model, inputs), interactions(model, inputs), strict=True
    ):
        truth = slowly(model, layer, x, o)
        close(vectors(parts, 2), truth)
        truth = truth + torch.diag_embed(stream)
        block = (stream + y)[..., None]
        alti = (block.abs().sum(1) - (block - truth).abs().sum(1)).clamp(min=0)
        l2 = truth.square().sum(1).sqrt()
        for kind, sizes in (("alti", alti), ("l2", l2)):
            found = matrices[kind][layer.name]
            close(found, sizes / sizes.sum(-1, keepdim=True), 1e-9)
            close(found.sum(-1), torch.ones_like(found[..., 0]))
            assert found.min() >= 0


@pytest.mark.parametrize("kind", ["alti", "l2"])
@pytest.mark.parametrize("make", [vim, vmamba])
def test_the_map_is_the_querys_row_of_the_product(make, kind):
    model, x = make(), images(3)
    method = LaTIM(model, aggregation=kind)
    layers = layers_of(model, x)
    product, before = torch.eye(layers[0].tokens).double(), layers[0].layout.grid
    for layer, matrix in zip(layers, method.matrices(x).values(), strict=True):
        grid = layer.layout.grid
        product, before = matrix @ (product if grid == before else averaging(before, grid) @ product), grid
    row = class_or_mean(layers[-1].layout) @ product
    close(row.sum(-1), torch.ones(3).double())
    close(method.attribute(x, grid=True).flatten(1), row[:, layers[0].layout.patches])


@pytest.mark.parametrize("make", [vim, vmamba])
def test_images_are_alone_and_the_class_plays_no_part(make, monkeypatch):
    model, x = make(), images(3)
    method = LaTIM(model)
    maps = method.attribute(x)
    assert torch.equal(maps, method.attribute(x, 2))
    for image in range(3):
        close(method.attribute(x[image : image + 1]), maps[image : image + 1])
    monkeypatch.setattr("mamba_attn.attribution.latim._WORKSPACE", 1)  # a row at a time
    close(method.attribute(x, pixel=(20, 9)), LaTIM(model).attribute(x, pixel=(20, 9)))
    close(method.attribute(x), maps)


def test_a_pixel_reads_its_tokens_row_of_the_last_layer():
    model, x = vim(), images(2)
    name = layers_of(model, x)[-1].name
    method = LaTIM(model, layers=[name])
    (matrix,) = method.matrices(x).values()
    layer = layers_of(model, x)[-1]
    token = int(query_weights(layer, None)[0].argmax())
    close(method.attribute(x, grid=True).flatten(1), matrix[:, token, layer.layout.patches])
    close(method.attribute(x, grid=True, pixel=(3, 20)).flatten(1), matrix[:, 2, layer.layout.patches])


CASES = {
    "one way": lambda: Net(Directions(1)),
    "both ways": lambda: Net(Directions()),
    "gates behind the scans": lambda: Net(Directions(fused=False)),
    "zeros in front": lambda: Net(Directions(padded=True)),
    "no activation": lambda: Net(Directions(act=lambda x: x)),
    "over a grid": lambda: Net(Cross(cross), grid=True),
    "over a grid, gated": lambda: Net(GatedCross(cross), grid=True),
}


@pytest.mark.parametrize("case", CASES)
def test_mixers_at_doors_are_split_too(case):
    torch.manual_seed(0)
    model, x = CASES[case]().double().eval(), at_doors()
    mixer = model.mixers[0]
    if case != "no activation":
        of_one_tap_at_doors(mixer)
    else:
        for conv in mixer.convs:
            nn.init.zeros_(conv.bias)
    outputs, streams = [], []
    handles = [
        mixer.register_forward_hook(lambda _, args, y: outputs.append(y)),
        model.norms[0].register_forward_pre_hook(lambda _, args: streams.append(args[0])),
    ]
    ((_, parts),) = interactions(model, x)
    for handle in handles:
        handle.remove()
    last = getattr(mixer, "last", None) or mixer.leave
    y = outputs[0].detach().flatten(1, -2).mT
    close(vectors(parts, 2).sum(-1), y - last.bias.detach()[:, None], 1e-10)
    close(parts.output, y, 1e-10)
    close(parts.stream, streams[0].detach().flatten(1, -2).mT)
    maps = LaTIM(model).attribute(x, 1, grid=True)
    assert maps.shape == (2, 1, *GRID)
    close(maps.sum((1, 2, 3)), torch.ones(2).double())


def of_one_tap_at_doors(mixer):
    for conv in getattr(mixer, "convs", None) or [mixer.conv]:
        chosen = torch.randint(conv.weight[0].numel(), (len(conv.weight), 1))
        taps = torch.zeros(len(conv.weight), conv.weight[0].numel()).scatter(1, chosen, 2.0)
        conv.weight.data = taps.view(conv.weight.shape).to(conv.weight)
        nn.init.zeros_(conv.bias)


class Normed(Words):
    """With a norm before every mixer."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(FEATURES) for _ in self.layers).double()

    def forward(self, input_ids, attention_mask=None):
        keep = 1.0 if attention_mask is None else attention_mask.unsqueeze(-1).double()
        x = self.embedding(input_ids) * keep
        for norm, mixer in zip(self.norms, self.layers, strict=True):
            x = (x + mixer(norm(x))) * keep
        return self.head(self.norm(x))


def test_texts_are_read_up_to_a_position_and_without_their_padding():
    model, (texts, mask) = Normed(), padded()
    maps = LaTIM(model).attribute(texts, 5, additional_forward_args={"attention_mask": mask})
    assert (maps[1, :4] == 0).all()
    close(maps[1:, 4:], LaTIM(model).attribute(texts[1:, 4:], 5))
    inner = LaTIM(model).attribute(texts, (4, 3))
    assert (inner[:, 5:] == 0).all()
    close(inner[:, :5], LaTIM(model).attribute(texts[:, :5], 3))


class Unnormed(Net):
    """Blocks without norms."""

    def __init__(self, *mixers):
        super().__init__(*mixers)
        self.norms = nn.ModuleList(nn.Identity() for _ in range(len(mixers) + 1))


class Activated(Directions):
    """Something between scan and projection that is not linear."""

    def __init__(self):
        super().__init__(1)
        self.leave = nn.Sequential(nn.Tanh(), self.leave)


def test_what_is_not_of_this_make_is_refused():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"LaTIM\(aggregation='lt'\): .*l2"):
        LaTIM(vim(depth=1), aggregation="lt")
    with pytest.raises(UnsupportedModelError, match="LaTIM is defined for selective scans"):
        LaTIM(vit()).attribute(images(1))
    for model, sentence in (
        (Unnormed(Directions()), "LaTIM: the residual stream around mixers.0 was not seen"),
        (Net(Activated()), "LaTIM: no linear layer was seen that receives what the scans of mixers.0 give"),
        (Net(Directions(act=torch.tanh)), "LaTIM: mixers.0 was traced at the scan's door, and no depthwise"),
    ):
        with pytest.raises(UnsupportedModelError, match=sentence):
            LaTIM(model.double().eval()).attribute(at_doors(), 1)
