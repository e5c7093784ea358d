"""What a store holds equals what explicit matrices of every image give."""

import copy
import inspect

import numpy as np
import pytest
import torch

from mamba_attn import images, trace
from mamba_attn.analytics import AttentionStore, collect
from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.ops import reference
from tests.analytics import cases

NAMES = ("vim_micro", "vmamba_micro", "vit_micro")


@pytest.fixture(scope="module", params=NAMES)
def collected(request, tmp_path_factory):
    """A request, its store, and the traces of its images one by one."""
    folder = tmp_path_factory.mktemp(request.param)
    asked = cases.request(cases.folder_of(folder), request.param, keep=3, limit=7)
    found = collect(asked, folder / "store")
    assert (found.new, found.counted, found.unreadable) == (7, 7, {})
    return asked, AttentionStore.open(folder / "store"), explicit(asked)


def test_a_model_goes_to_the_other_collect():
    with pytest.raises(TypeError, match=r"collect\(Identity, .* expected a Request; mamba_attn\.collect"):
        inspect.unwrap(collect)(torch.nn.Identity(), "folder")  # without the tests' own check of types


def explicit(asked, batch=1):
    """(first sample, trace, its class) of every batch."""
    traces, samples = [], [asked.data.load(number, asked.subject.transform) for number in asked.wanted]
    for start in range(0, len(samples), batch):
        pixels = np.stack([sample.pixels for sample in samples[start : start + batch]])
        with torch.no_grad(), trace(asked.subject.model) as found:
            logits = asked.subject.model(images.normalise(pixels))
        traces.append((samples[start], found, int(logits[0].argmax())))
    return traces


def matrices(traces, layer, route):
    with torch.no_grad():
        each = [found[layer.name].attention(**({} if route == "sum" else {"routes": route})) for _, found, _ in traces]
    return torch.cat(each).double().numpy()


def routes(layer):
    return ["sum", *(range(layer.routes) if layer.routes > 1 else ())]


def test_mean_and_variance_are_those_of_explicit_matrices(collected):
    """Of images one by one; float32 itself gives a forward pass of a batch other last digits than one of an image."""
    _, store, traces = collected
    for layer in store.layers:
        for route in routes(layer):
            exact = matrices(traces, layer, route)
            assert exact.shape == (7, layer.tokens, layer.tokens)
            scale = np.abs(exact).max()
            assert np.abs(store.mean(layer, route) - exact.mean(0)).max() <= 1e-6 * scale
            assert np.abs(store.variance(layer, route) - exact.var(0)).max() <= 1e-6 * scale**2
            assert store.mean(layer, route).dtype == np.float64
            assert exact.var(0).max() > 0


def test_of_the_same_batches_the_means_are_exact(collected):
    """What collecting adds: nothing to a route's mean, and to the sum's the rounding of a float32 sum of routes."""
    asked, store, _ = collected
    traces = explicit(asked, asked.batch)
    for layer in store.layers:
        for route in routes(layer):
            exact = matrices(traces, layer, route).mean(0)
            bound = 2.0**-52 * 8 if route != "sum" or layer.routes == 1 else 2.0**-24 * layer.routes
            assert np.abs(store.mean(layer, route) - exact).max() <= bound * np.abs(exact).max()


def test_a_batch_is_as_near_to_float64_as_an_image_alone(collected):
    asked, store, traces = collected
    precise, truth = copy.deepcopy(asked.subject.model).double(), {layer.name: 0 for layer in store.layers}
    for sample, _, _ in traces:
        with torch.no_grad(), trace(precise) as found:
            precise(images.normalise(sample.pixels[None]).double())
            for name in truth:
                truth[name] = truth[name] + found[name].attention()[0].numpy() / len(traces)
    for layer in store.layers:
        alone, exact = matrices(traces, layer, "sum").mean(0), truth[layer.name]
        errors = [np.abs(mean - exact).max() / np.abs(exact).max() for mean in (store.mean(layer), alone)]
        assert errors[0] <= 2 * errors[1] + 2e-7


def test_rows_and_columns_are_the_matrix_s(collected):
    _, store, _ = collected
    for layer in store.layers:
        mean = store.mean(layer)
        for token in (0, layer.tokens // 2, layer.tokens - 1):
            assert np.array_equal(store.mean_row(layer, token), mean[token])
            assert np.array_equal(store.mean_column(layer.name, token), mean[:, token])
        last = layer.tokens
        assert np.array_equal(store.lines(layer, 1, last), mean[1:])
        assert np.array_equal(store.lines(layer, 0, 2, columns=True), mean[:, :2].T)
        kept = store.matrix(layer, 0)
        assert np.array_equal(store.lines(layer, last - 1, last, image=0), kept[last - 1 :])
        assert np.array_equal(store.lines(layer, 1, 3, image=0, columns=True), kept[:, 1:3].T)
        for start, stop in ((2, 2), (-1, 2), (0, last + 1)):
            with pytest.raises(IndexError, match=r"expected some of 0\.\."):
                store.lines(layer, start, stop)


def test_features_kept_matrices_and_pixels(collected):
    _, store, traces = collected
    for number, layer in enumerate(store.layers):
        exact = matrices(traces, layer, "sum")
        features = store.features(number)
        assert (features.dtype, layer.exact) == (np.float32, True)
        flat = exact.reshape(7, -1)
        assert np.abs(features - flat).max() <= 2.0**-11 * np.abs(flat).max()
        for route in routes(layer):
            each = matrices(traces, layer, route)
            for image in store.images[:3]:
                close = np.abs(store.matrix(layer, image, route) - each[image.row]).max()
                assert close <= 1e-6 * np.abs(each).max()
    for image, (sample, _, _) in zip(store.images, traces, strict=True):
        assert np.array_equal(store.pixels(image), sample.pixels)
        assert np.array_equal(store.pixels(image.key), sample.pixels)


def test_images_have_their_labels_and_predictions(collected):
    asked, store, traces = collected
    assert [image.kept for image in store.images] == [True] * 3 + [False] * 4
    for image, (sample, _, best) in zip(store.images, traces, strict=True):
        assert image.key == sample.key
        assert image.label == image.key.partition("/")[0]
        assert image.predicted == cases.CLASSES[best]
        assert image.correct == (image.predicted == image.label)
    assert {image.label for image in store.images} == set(cases.CLASSES)
    assert store.transform == asked.subject.transform


def test_layers_are_described(collected):
    _, store, traces = collected
    for layer in store.layers:
        its = traces[0][1][layer.name]
        assert (layer.tokens, layer.layout) == (its.tokens, its.layout)
        if layer.kind == "selective scans":
            assert np.array_equal(layer.orders, its.scan.read_order.numpy())
            assert layer.routes == its.scan.routes
    expected = {"vmamba_micro": [(0, 0), (1, 0), (1, 1)]}.get(store.model_name, [(0, 0), (0, 1)])
    assert [(layer.stage, layer.block) for layer in store.layers] == expected


def test_moments_of_the_states(collected):
    _, store, traces = collected
    for layer in store.layers:
        if layer.moments is None:
            with pytest.raises(KeyError, match="softmax attention has no states"):
                store.state_moments(layer)
            continue
        h = torch.cat([reference.states(found[layer.name].scan) for _, found, _ in traces])  # b r c n l
        mean, square = store.state_moments(layer)
        scale = float(h.abs().max())
        assert np.abs(mean - h.mean((0, 3)).numpy()).max() <= 1e-6 * scale
        assert np.abs(square - h.square().mean((0, 3)).numpy()).max() <= 1e-6 * scale**2
        assert mean.shape == layer.moments


def test_the_batch_does_not_matter(tmp_path):
    selector = cases.folder_of(tmp_path, 2)
    stores = []
    for batch in (1, 4):
        collect(cases.request(selector, "vmamba_micro", batch=batch), tmp_path / str(batch))
        stores.append(AttentionStore.open(tmp_path / str(batch)))
    for layer in stores[0].layers:
        one, four = (store.variance(layer, 1) for store in stores)
        assert np.abs(one - four).max() <= 2e-6 * np.abs(one).max()
        # features of random weights are small differences of larger numbers, which a batch may round in another order
        few, many = (store.features(layer) for store in stores)
        assert np.abs(few - many).max() <= 1e-3 * np.abs(few).max()


def test_the_sum_alone(tmp_path):
    selector = cases.folder_of(tmp_path, 1)
    collect(cases.request(selector, routes="sum", keep=1), tmp_path / "sum")
    collect(cases.request(selector), tmp_path / "each")
    alone, each = (AttentionStore.open(tmp_path / name) for name in ("sum", "each"))
    layer = alone.layers[0]
    assert np.abs(alone.mean(layer) - each.mean(layer)).max() <= 1e-6 * np.abs(each.mean(layer)).max()
    assert np.allclose(each.mean(layer), each.mean(layer, 0) + each.mean(layer, 1), rtol=0, atol=1e-7)
    with pytest.raises(KeyError, match="no route 0; expected 'sum': it was collected with routes='sum'"):
        alone.mean(layer, 0)


def test_some_layers(tmp_path):
    collect(cases.request(cases.folder_of(tmp_path, 1), layers=["*.1.*"]), tmp_path / "store")
    assert [layer.name for layer in AttentionStore.open(tmp_path / "store").layers] == ["layers.1.mixer"]


def test_large_matrices_become_projections_that_keep_distances(tmp_path):
    """13 x 41 patches: more than 2^18 entries."""
    large = {"image_size": (104, 328), "depth": 1}
    collect(cases.request(cases.folder_of(tmp_path, 3), model_options=large, keep=9), tmp_path / "store")
    store = AttentionStore.open(tmp_path / "store")
    (layer,) = store.layers
    assert (layer.tokens, layer.exact) == (13 * 41 + 1, False)
    features = store.features(layer)
    assert features.shape == (9, 4096)
    exact = np.stack([store.matrix(layer, image).reshape(-1) for image in store.images]).astype(np.float64)
    ratios = [
        np.linalg.norm(features[i] - features[j]) / np.linalg.norm(exact[i] - exact[j])
        for i in range(9) for j in range(i)
    ]  # fmt: skip
    assert 0.95 < min(ratios) < max(ratios) < 1.05
    assert np.array_equal(store.mean_row(layer, 300), store.mean(layer)[300])  # over several tiles


def test_an_image_that_makes_nan_is_left_out(tmp_path, monkeypatch):
    asked = cases.request(cases.folder_of(tmp_path, 1), batch=3)
    normalise = images.normalise

    def broken(pixels, *numbers):
        result = normalise(pixels, *numbers)
        for number, each in enumerate(pixels):
            if each.mean() == darkest:
                result[number] = torch.nan
        return result

    darkest = min(asked.data.load(number, asked.subject.transform).pixels.mean() for number in asked.wanted)
    monkeypatch.setattr(images, "normalise", broken)
    found = collect(asked, tmp_path / "store")
    assert (found.counted, len(found.unreadable)) == (2, 1)
    assert "contain NaN or Inf" in next(iter(found.unreadable.values()))
    assert np.isfinite(AttentionStore.open(tmp_path / "store").mean(0)).all()


def test_the_model_comes_back(tmp_path):
    from mamba_attn.datasets import loading
    from tests.explanations.cases import VIM, save

    loaded = loading.load("vim_micro", save(tmp_path / "weights", "vim_micro", VIM, cases.CLASSES))
    asked = cases.request(cases.folder_of(tmp_path, 1))
    object.__setattr__(asked, "subject", loaded)
    collect(asked, tmp_path / "store")
    store = AttentionStore.open(tmp_path / "store")
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(store.model()(x), loaded.model(x))
    assert isinstance(store.subject, LoadedModel)
    assert not store.model().training
