"""torch.func, copies and exports of a model, and what a trace says of them."""

import copy
import io
import pickle

import pytest
import torch

import mamba_attn
from mamba_attn import models, ops
from mamba_attn.errors import BackendUnavailableError, TraceError


@pytest.fixture
def model():
    return models.create("vim_micro", depth=2, image_size=32, embed_dim=32, num_classes=3).eval()


@pytest.fixture(params=["vim_micro", "vmamba_micro"])
def small(request):
    options = {"depth": 2, "embed_dim": 32} if request.param == "vim_micro" else {"depths": (1, 1), "dims": 16}
    return models.create(request.param, image_size=32, num_classes=3, **options).eval()


def test_torch_func_differentiates_as_autograd_does(small):
    images = torch.rand(2, 3, 32, 32)
    parameters = dict(small.named_parameters())
    found = torch.func.grad(lambda its: torch.func.functional_call(small, its, (images,)).square().sum())(parameters)
    small(images).square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)


# torch.func.jvp scripts something of its own
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_vmap_and_jvp(small):
    images, direction = torch.rand(3, 3, 32, 32), torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        plain = small(images)
        one_by_one = torch.func.vmap(lambda image: small(image[None])[0])(images)
        torch.testing.assert_close(one_by_one, plain, rtol=1e-4, atol=1e-5)
    _, along = torch.func.jvp(small, (images,), (direction,))
    images.requires_grad_()
    _, expected = torch.autograd.functional.jvp(small, images, direction)
    torch.testing.assert_close(along, expected, rtol=1e-3, atol=1e-4)


def test_a_backend_that_torch_func_cannot_transform_is_refused():
    u, delta, A = torch.rand(2, 6, 5), torch.rand(2, 6, 5), -torch.rand(6, 3)
    B, C = torch.rand(2, 3, 5), torch.rand(2, 3, 5)
    with pytest.raises(BackendUnavailableError, match=r"torch\.func cannot transform it"):
        torch.func.grad(lambda u: ops.selective_scan(u, delta, A, B, C, backend="native").sum())(u)


def test_a_trace_of_a_transformed_call_is_refused(model):
    images = torch.rand(2, 3, 32, 32)
    with pytest.raises(TraceError, match=r"torch\.func .* transforms this call"), mamba_attn.trace(model):
        torch.func.vmap(lambda image: model(image[None]))(images)
    # before torch 2.7 a strict export is not told from a compilation: it fails in torch's words
    exporting = {} if hasattr(torch.compiler, "is_exporting") else {"strict": False}
    with pytest.raises(TraceError, match=r"Export it outside the trace"), mamba_attn.trace(model):
        torch.export.export(model, (images,), **exporting)


def test_a_copy_made_inside_a_trace_is_plain(model):
    images = torch.rand(2, 3, 32, 32)
    model.register_forward_hook(print_nothing)  # the user's own stay
    with mamba_attn.trace(model), mamba_attn.trace(model, layers=["layers.0.mixer"]) as record:
        model(images)
        made = copy.deepcopy(model)
        again = copy.deepcopy(model)
    assert record.layers
    assert torch.equal(made(images), model(images))
    for each in (made, again):
        assert type(each) is type(model)
        hooks = [
            hook for its in each.modules() for hook in (*its._forward_hooks.values(), *its._forward_pre_hooks.values())
        ]
        assert hooks == [print_nothing]
        assert not any("forward" in vars(its) for its in each.modules())
        assert not {"__deepcopy__", "__reduce_ex__"} & set(vars(each))
    assert pickle.loads(pickle.dumps(made)).head.weight.shape == model.head.weight.shape
    with mamba_attn.trace(made) as record:
        made(images)
    assert len(record.layers) == 2


def print_nothing(*_):
    return None


def test_a_traced_model_is_not_saved_with_its_hooks(model):
    before = dict(vars(model))
    with mamba_attn.trace(model):
        for save in (pickle.dumps, lambda its: torch.save(its, io.BytesIO())):
            with pytest.raises(TraceError, match=r"save it before the with-block or after it"):
                save(model)
        torch.save(model.state_dict(), io.BytesIO())
        model(torch.rand(1, 3, 32, 32))
    assert set(vars(model)) == set(before)
    torch.save(model, io.BytesIO())
