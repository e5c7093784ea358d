"""X-VMamba's two scores against their sums, step by step."""

import pytest
import torch

import mamba_attn
from mamba_attn.attribution import Controllability
from mamba_attn.attribution.controllability import gramian_scores, jacobian_scores
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import UnsupportedModelError
from tests.attribution.cases import images, vim, vmamba
from tests.attribution.vit.test_attn_lrp import vit


def record(heads, channels, *, gain=False, shared=False):
    torch.manual_seed(heads)
    batch, routes, groups, states, length = 2, 3, 2 if heads < channels else 1, 3, 7
    return ScanRecord.from_scan(
        torch.randn(batch, routes, channels, length).double(),
        torch.rand(batch, routes, heads, length).double(),
        -torch.rand(routes, heads, 1 if shared else states).double() - 0.1,
        torch.randn(batch, routes, groups, states, length).double(),
        torch.randn(batch, routes, groups, states, length).double(),
        torch.randn(routes, channels).double(),
        gain=torch.randn(batch, routes, heads, length).double() if gain else None,
        order=torch.stack([torch.randperm(8)[:length] for _ in range(routes)]),
        tokens=8,
        scale=0.5,
    )


def by_the_sums(its):
    """J and G of every image, state by state and step by step."""
    J, G = torch.zeros(2, its.batch, its.tokens).double()
    share = its.heads // its.B.shape[2]
    for image in range(its.batch):
        for route in range(its.routes):
            for head in range(its.heads):
                for n in range(its.states):
                    A = its.A[route, head, min(n, its.A.shape[2] - 1)]
                    a = torch.exp(its.delta[image, route, head] * A)
                    b = its.gain[image, route, head] * its.B[image, route, head // share, n]
                    c = its.C[image, route, head // share, n]
                    for k, token in enumerate(its.read_order[route].tolist()):
                        seen = sum(c[t].abs() * a[k + 1 : t + 1].prod() for t in range(k, its.length))
                        J[image, token] += b[k].abs() * seen
                        G[image, token] += (c[k] * b[k]) ** 2 / (1 - a[k] ** 2 + 1e-8)
    return J / its.heads / its.routes, G / its.heads / its.routes


@pytest.mark.parametrize("options", [{}, {"gain": True}, {"shared": True}])
@pytest.mark.parametrize("heads", [4, 2])
def test_scores_are_the_papers_sums(heads, options):
    its = record(heads, 4, **options)
    J, G = by_the_sums(its)
    torch.testing.assert_close(jacobian_scores(its), J, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gramian_scores(its), G, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [vim, vmamba])
def test_maps_are_means_of_scaled_layers_and_know_no_class(make):
    model, x = make(), images(3)
    for score, measure in (("jacobian", jacobian_scores), ("gramian", gramian_scores)):
        method = Controllability(model, score=score)
        maps = method.attribute(x)
        assert torch.equal(maps, method.attribute(x, 2))
        with torch.no_grad(), mamba_attn.trace(model) as layers:
            model(x)
        last = list(layers)[-1]
        found = measure(layers[last].scan)[:, layers[last].layout.patches]
        low, high = found.amin(1, keepdim=True), found.amax(1, keepdim=True)
        one = Controllability(model, score=score, layers=last).attribute(x, grid=True).flatten(1)
        torch.testing.assert_close(one, (found - low) / (high - low), rtol=0, atol=1e-5)


def test_unknown_scores_and_softmax_are_refused():
    with pytest.raises(ValueError, match=r"Controllability\(score='gram'\): .*gramian"):
        Controllability(vim(depth=1), score="gram")
    with pytest.raises(UnsupportedModelError, match="Controllability is defined for selective scans"):
        Controllability(vit()).attribute(images(1))
