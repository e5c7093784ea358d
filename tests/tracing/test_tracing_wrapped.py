"""Models inside something else: wrappers of several devices, torch.compile, gradient checkpointing, LoRA, autocast."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed
from torch import nn
from torch.utils.checkpoint import checkpoint

import mamba_attn
from mamba_attn.attribution import MambaAttribution, RawAttention
from mamba_attn.errors import TraceError, UnsupportedModelError
from mamba_attn.models.vim_mixer import VimMixer
from mamba_attn.testing import check_adapter

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vim": ("vim_micro", {"image_size": (24, 40), "depth": 2, "embed_dim": 16, "num_classes": 5}),
    "vmamba": ("vmamba_micro", {"depths": (1, 1), "dims": 8, "num_classes": 5}),
}


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    kind, options = MODELS[name]
    return mamba_attn.models.create(kind, **options).eval(), torch.randn(2, 3, 24, 40)


@contextmanager
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def gradients_of(model: nn.Module, x: torch.Tensor, mode: str = "route") -> tuple[torch.Tensor, list[torch.Tensor]]:
    with mamba_attn.trace(model, mode=mode) as trace:
        logits = model(x)
        return logits, list(trace.gradients(logits[:, 3].sum()).values())


@pytest.mark.parametrize("mode", ["route", "observe"])
@pytest.mark.parametrize("name", MODELS)
def test_data_parallel_and_distributed_models_are_traced_under_the_models_own_names(name: str, mode: str) -> None:
    model, x = build(name)
    plain, gradients = gradients_of(model, x, mode)
    with mamba_attn.trace(model) as expected:
        model(x)
    with one_process():
        for wrapped in (nn.DataParallel(model), nn.parallel.DistributedDataParallel(model)):
            with mamba_attn.trace(wrapped, mode=mode) as trace:
                logits = wrapped(x)
                found = list(trace.gradients(logits[:, 3].sum()).values())
            assert list(trace) == list(expected)
            assert torch.equal(logits, plain)
            assert all(torch.equal(a, b) for a, b in zip(found, gradients, strict=True))


def test_data_parallel_on_several_devices_is_refused_with_the_line_to_write() -> None:
    model, _ = build("vim")
    wrapped = nn.DataParallel(model)
    wrapped.device_ids = [0, 1]
    with pytest.raises(UnsupportedModelError, match=r"on 2 devices.*with trace\(model\.module\): model\.module"):
        with mamba_attn.trace(wrapped):
            pass


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own, when it imports its compiler
def test_compiled_models_are_refused_with_the_line_to_write() -> None:
    model, _ = build("vim")
    for compiled, line in (
        (torch.compile(model), r"model is compiled.*model\._orig_mod\)"),
        (nn.Sequential(torch.compile(model)), r"model\.0 is compiled.*model\.0\._orig_mod\)"),
    ):
        with pytest.raises(UnsupportedModelError, match=line):
            with mamba_attn.trace(compiled):
                pass
    model.layers[1].compile()
    with pytest.raises(UnsupportedModelError, match=r"Write model\.layers\.1\._compiled_call_impl = None"):
        with mamba_attn.trace(model):
            pass
    model.layers[1]._compiled_call_impl = None
    with mamba_attn.trace(model):
        pass


class Checkpointed(nn.Module):
    """A block whose activations are not kept."""

    def __init__(self, block: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.block = block
        self.reentrant = reentrant

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(lambda *given: self.block(*given, **kwargs), *args, use_reentrant=self.reentrant)


def checkpointed(name: str, reentrant: bool) -> tuple[nn.Module, torch.Tensor]:
    model, x = build(name)
    if name == "vim":
        model.layers = nn.ModuleList(Checkpointed(block, reentrant) for block in model.layers)
    else:
        for stage in model.layers:
            stage.blocks = nn.ModuleList(Checkpointed(block, reentrant) for block in stage.blocks)
    return model, x


class Foreign(VimMixer):
    """A mixer whose own forward computes, and keeps, other things than its adapter does."""

    def __init__(self, mixer: nn.Module) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(mixer.__dict__)
        self.forward = self.differently

    def differently(self, x: torch.Tensor, *args: Any) -> torch.Tensor:
        output: torch.Tensor = VimMixer.forward(self, (2 * x).exp().log() / 2, *args)
        return output


@pytest.mark.parametrize("mode", ["route", "observe"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_pass_through_checkpoints(name: str, mode: str) -> None:
    torch.manual_seed(1)
    expected = gradients_of(*build(name), mode)
    torch.manual_seed(1)
    model, x = checkpointed(name, reentrant=False)
    logits, gradients = gradients_of(model, x, mode)
    torch.testing.assert_close(logits, expected[0])
    for found, wanted in zip(gradients, expected[1], strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(found, wanted)


@pytest.mark.changes_model("grad")
def test_a_layer_that_a_checkpoint_repeats_ran_once() -> None:
    model, x = checkpointed("vim", reentrant=False)
    with mamba_attn.trace(model) as trace:
        model(x).sum().backward()
        assert len(trace.layers) == 2


@pytest.mark.parametrize("method", [RawAttention, MambaAttribution])
def test_attributions_of_checkpointed_models_whose_own_forward_differs(method: Callable[..., Any]) -> None:
    torch.manual_seed(1)
    plain, x = build("vim")
    model, _ = build("vim")
    model.load_state_dict(plain.state_dict())
    for block in model.layers:
        block.mixer = Foreign(block.mixer)
    model.layers = nn.ModuleList(Checkpointed(block, False) for block in model.layers)
    torch.testing.assert_close(method(model).attribute(x, 3), method(plain).attribute(x, 3))
    with mamba_attn.trace(model) as trace:
        logits = model(x)
    with pytest.raises(TraceError, match=r"checkpoints activations.*gradients\(\) inside the with-block"):
        trace.gradients(logits[:, 3].sum())


def test_reentrant_checkpoints_give_matrices_and_refuse_gradients_by_name() -> None:
    model, x = checkpointed("vim", reentrant=True)
    x.requires_grad_()
    with mamba_attn.trace(model) as trace:
        logits = model(x)
        assert trace.layers[0].attention().shape == (2, 16, 16)
        with pytest.raises(TraceError, match="use_reentrant=False"):
            trace.gradients(logits[:, 3].sum())


class LoRA(nn.Module):
    """A projection plus a low-rank one, as adapters for fine-tuning wrap it."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.base_layer(x) + self.lora_B(self.lora_A(x))
        return output


@pytest.mark.parametrize(("name", "mixer"), [("vim", "layers.0.mixer"), ("vmamba", "layers.0.blocks.0.op")])
@pytest.mark.parametrize("projection", ["in_proj", "out_proj"])
def test_wrapped_projections_of_our_own_models_act(name: str, mixer: str, projection: str) -> None:
    model, x = build(name)
    plain = model(x)
    module = model.get_submodule(mixer)
    setattr(module, projection, LoRA(getattr(module, projection)))
    assert (model(x) - plain).abs().max() > 1e-3
    assert check_adapter(model, x).matrix_error <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_autocast_is_obeyed(name: str, dtype: torch.dtype) -> None:
    model, x = build(name)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        plain = model(x)
        with mamba_attn.trace(model) as trace:
            traced = model(x)
    assert torch.equal(traced, plain)
    assert trace.layers[0].scan.source_u.dtype == dtype or trace.layers[0].scan.source_B.dtype == dtype
    with torch.no_grad(), mamba_attn.trace(model) as exact:
        model(x)
    for half, full in zip(trace.layers, exact.layers, strict=True):
        difference = (half.attention() - full.attention()).abs().max() / full.attention().abs().max()
        assert 0 < difference < 0.1
