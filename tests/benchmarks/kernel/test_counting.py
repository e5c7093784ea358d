import pytest
import torch

from benchmarks.kernel import counting
from benchmarks.kernel.counting import Scans, Work, attention_work, halving, on_paper, scans_of
from mamba_attn import models, trace


def scans(name, pixels=224):
    return scans_of(on_paper(name, pixels), pixels)


@pytest.mark.parametrize(
    ("name", "stage", "direct", "factored", "gflop", "written"),
    [
        ("vim_tiny", 0, 5.75, 0.5, 11.5, 24 * 155e3),
        ("vim_small", 0, 11.5, 1.0, 23, 24 * 155e3),
        ("vmamba_tiny_s1l8", 0, 3.78, 0.03, 7.6, 2 * 39.3e6),
        ("vmamba_tiny_s1l8", 1, 0.47, None, 0.94, 2 * 2.46e6),
        ("vmamba_tiny_s1l8", 2, 0.24, None, 0.47, 8 * 154e3),
    ],
)
def test_what_was_counted_on_paper(name, stage, direct, factored, gflop, written):
    its = scans(name)[stage]
    work = attention_work(its, 1, "direct")
    assert work.exponentials / 1e9 == pytest.approx(direct, rel=0.015)
    assert work.flops / 1e9 == pytest.approx(gflop, rel=0.015)
    assert work.bytes_written == pytest.approx(written, rel=0.005)
    other = attention_work(its, 1, "factored")
    assert (other.flops, other.bytes) == (work.flops, work.bytes)
    if factored is not None:
        assert other.exponentials / 1e9 == pytest.approx(factored, rel=0.02)


def test_the_shapes_of_the_published_models():
    assert scans("vim_tiny") == [Scans("layers.0.mixer", 24, 2, 197, 384, 16)]
    assert [(each.length, each.channels, each.layers) for each in scans("vmamba_tiny_s1l8")] == [
        (3136, 96, 2), (784, 192, 2), (196, 384, 8), (49, 768, 2),
    ]  # fmt: skip
    assert scans("vim_base", 1024)[0].length == 64**2 + 1
    assert scans("vmamba_base_s1l20", 512)[2] == Scans("layers.2.blocks.0.op", 20, 4, 32**2, 512, 1)


@pytest.mark.parametrize("name", ["vim_micro", "vmamba_micro"])
def test_the_shapes_are_those_of_a_forward_pass(name):
    model = models.create(name, image_size=64)
    with torch.no_grad(), trace(model) as found:
        model(torch.zeros(3, 3, 64, 64))
    by_shape = {}
    for layer in found.layers:
        record = layer.scan
        by_shape.setdefault((record.routes, record.length, record.channels, record.states), []).append(layer.name)
    expected = [Scans(names[0], len(names), *shape) for shape, names in by_shape.items()]
    assert scans_of(model, 64) == scans(name, 64) == expected


def brute_force(length, leaf):
    """Factors and leaf pairs of the halving, and how often every pair of tokens was met, by doing it."""
    met, factors, pairs, todo = torch.zeros(length, length, dtype=torch.int64), 0, 0, [(0, length)]
    while todo:
        start, stop = todo.pop()
        if stop - start <= leaf:
            for i in range(start, stop):
                for j in range(start, i + 1):
                    met[i, j] += 1
                    pairs += 1
            continue
        middle = start + (stop - start) // 2
        factors += sum(1 for _ in range(middle, stop)) + sum(1 for _ in range(start, middle))
        met[middle:stop, start:middle] += 1
        todo += [(start, middle), (middle, stop)]
    return factors, pairs, met


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 13, 16, 33, 50])
@pytest.mark.parametrize("leaf", [1, 4, 8])
def test_the_halving_by_brute_force(length, leaf):
    factors, pairs, met = brute_force(length, leaf)
    assert torch.equal(met, torch.ones_like(met).tril())
    assert halving(length, leaf) == (factors, pairs)


@pytest.mark.parametrize("batch", [1, 3])
def test_bytes_and_operations_by_brute_force(batch):
    its = Scans("x", layers=2, routes=3, length=11, channels=5, states=4)
    tensors = {
        "delta": torch.zeros(batch, 3, 5, 11), "A": torch.zeros(3, 5, 4),
        **{name: torch.zeros(batch, 3, 4, 11, dtype=torch.bfloat16) for name in "BC"},
    }  # fmt: skip
    work = attention_work(its, batch, "direct", itemsize=2)
    assert work.bytes_read == 2 * sum(tensor.nbytes for tensor in tensors.values())
    assert work.bytes_written == 2 * torch.zeros(batch, 11, 11).nbytes
    entries = sum(1 for i in range(11) for j in range(i + 1))
    assert work.exponentials == entries * 5 * 4 * 3 * 2 * batch
    assert work.flops == 2 * work.exponentials
    assert work.intensity == work.flops / (work.bytes_read + work.bytes_written)
    assert counting.total([work, work]) == Work(*(2 * value for value in vars(work).values()))


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"formulation='fast'\): expected one of \('direct', 'factored'\)"):
        attention_work(scans("vim_micro", 64)[0], 1, "fast")
    with pytest.raises(TypeError, match=r"scans_of\(Linear\): expected a VisionMamba or a VSSM"):
        scans_of(torch.nn.Linear(2, 2), 64)
