"""Modules with SS2D's parameters that compute something else: each refused by name."""

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mamba_attn.errors import UnsupportedModelError
from mamba_attn.models.ss2d import SS2D
from mamba_attn.testing import check_adapter
from tests.integrations.refusing import adapters_refuse
from tests.integrations.ss2d_variants import (
    V0,
    April,
    CrossScan_Ab_1direction,
    Earlier,
    February,
    January,
    LowRank,
    Mixer,
    Model,
    Official,
    images,
    selective_scan_fn,
)  # fmt: skip


def changed(mixer: Any, **values: Any) -> Any:
    for name, value in values.items():
        setattr(mixer, name, value)
    return mixer


def rebound(kind: Any = Official, **given: Any) -> Any:
    mixer = kind()
    mixer.forward_core = functools.partial(mixer.forward_corev2, **given)
    return mixer


class Rolled(January):
    def forward_corev0(self, x: torch.Tensor) -> torch.Tensor:
        return selective_scan_fn(self, x.roll(1, 2), "cross2d")


class Guided(January):
    def forward(self, x: torch.Tensor, prompt: float = 1.0) -> torch.Tensor:
        return super().forward(x) * prompt


class Renamed(Mixer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def bare() -> Any:
    module = nn.Module()
    mixer = Mixer()
    module.A_logs, module.Ds, module.dt_projs_bias = mixer.A_logs, mixer.Ds, mixer.dt_projs_bias
    module.x_proj_weight = mixer.x_proj_weight
    return module


def without(mixer: Any, name: str) -> Any:
    delattr(mixer, name)
    return mixer


def with_buffer() -> Any:
    mixer = V0()
    mixer.register_buffer("mask", torch.ones(1))
    return mixer


REFUSALS: dict[str, tuple[Any, str]] = {
    "v052dc": (lambda: rebound(scan_mode="cascade2d"), r"a norm stands between .* \(cascade2d, v052dc\)"),
    "v052d3": (lambda: rebound(scan_mode=3), "its scan is 3; this adapter knows cross2d, unidi and bidi"),
    "v2": (lambda: rebound(selective_scan_backend="core"), "selective_scan_backend='core', which its own code refuses"),
    "backend": (lambda: rebound(selective_scan_backend="tree"), "backend='tree', which this adapter does not know"),
    "ssoflex": (lambda: rebound(ssoflex=False), r"its scans round their output \(ssoflex=False\)"),
    "argument": (lambda: rebound(window=3), "the code of its forward has window, which"),
    "m0": (lambda: changed(Official(), Ds=nn.Parameter(torch.ones(4, 2, 3))), r"the Mamba-2 variant \(m0\)"),
    "xv": (lambda: without(Official(), "x_proj_weight"), r"it has no x_proj \(VMamba's variants xv"),
    "LocalVMamba": (lambda: changed(January(), multi_scan=nn.Identity()), "LocalVMamba, whose routes walk windows"),
    "EfficientVMamba": (lambda: changed(February(), step_size=2), r"EfficientVMamba, .* \(it has step_size\)"),
    "MSVMamba": (lambda: changed(February(), conv2d_b1=nn.Identity()), "MSVMamba, whose .* two resolutions"),
    "2DMamba": (lambda: changed(Official(), v2d_out_norm=None), "2DMamba, whose scans may run along both axes"),
    "routes": (lambda: changed(V0(), dt_projs_bias=nn.Parameter(torch.ones(8, 6))), "8 routes; the cross-scan has 4"),
    "share_a": (lambda: changed(February(), A_logs=nn.Parameter(torch.ones(6, 3))), "its routes share A_logs or Ds"),
    "child": (lambda: changed(January(), se=nn.Identity()), "it has se, which this adapter does not know"),
    "parameter": (lambda: changed(V0(), gamma=nn.Parameter(torch.ones(1))), "it has gamma, which"),
    "buffer": (with_buffer, "it has mask, which"),
    "setting": (lambda: changed(January(), window=7, names=("a",)), "it has window, names, which"),
    "our order elsewhere": (lambda: changed(January(), order="spiral"), "it has order, which"),
    "low rank": (lambda: changed(April(), in_rank=nn.Identity(), out_rank=nn.Identity()), "it has in_rank, out_rank"),
    "LoRA": (lambda: changed(m := Official(one_file=True), x_proj=LowRank(m.x_proj, nn.Identity())),
             "its x_proj is a tests.integrations.ss2d_variants.LowRank; .* plain linear layers in 4 groups"),
    "one group": (lambda: changed(Official(one_file=True), dt_projs=nn.Linear(2, 24)), "its dt_projs is a torch.nn"),
    "other code": (Rolled, "the code of its forward has roll, which"),
    "other input": (Guided, "the code of its forward has prompt, "),
    "other functions": (Renamed, "its forward is forward, its forward_core None, which"),
    "unread bias": (lambda: January(x_proj_bias=True), "it has an x_proj_bias, which its code does not read"),
    "other gate": (lambda: January(act=nn.GELU), "its gate is SiLU, its act is GELU; this adapter knows them equal"),
    "unpaired": (lambda: rebound(April, CrossScan=CrossScan_Ab_1direction), "scan is 'CrossScan_Ab_1direction and Cro"),
    "another scan": (lambda: rebound(April, CrossScan=SimpleNamespace), "its scan is 'SimpleNamespace and CrossMerge'"),
    "parameters alone": (bare, "it has no in_proj and no act and no out_norm and no out_proj, so it is another mixer"),
    "ours, changed": (lambda: changed(SS2D(8), gamma=2.0), "it has gamma, which"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_not_known_is_refused_by_name(name: str) -> None:
    make, sentence = REFUSALS[name]
    with pytest.raises(UnsupportedModelError, match=rf"^mixer \(.*, family VMamba\): .*{sentence}"):
        adapters_refuse(nn.ModuleDict({"mixer": make()}))


def test_core_is_known_where_its_code_allows_it() -> None:
    check_adapter(Model(rebound(Earlier, selective_scan_backend="core")).eval(), images())
