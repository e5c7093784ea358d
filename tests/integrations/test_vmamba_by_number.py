"""Modules with SS2D's parameters: used where they compute SS2D's equations, whatever else they hold; else refused."""

import functools
import re
from typing import Any

import pytest
import torch
from torch import nn

from mamba_attn.models.ss2d import SS2D
from mamba_attn.testing import check_adapter
from mamba_attn.tracing.agreement import latest
from tests.integrations.by_number import differs, refusal
from tests.integrations.ss2d_variants import (
    V0,
    April,
    CrossScan_Ab_1direction,
    Earlier,
    February,
    Grouped,
    January,
    LowRank,
    Model,
    Official,
    images,
    selective_scan_fn,
)


def changed(mixer: Any, **values: Any) -> Any:
    for name, value in values.items():
        setattr(mixer, name, value)
    return mixer


def rebound(kind: Any = Official, **given: Any) -> Any:
    mixer = kind()
    mixer.forward_core = functools.partial(mixer.forward_corev2, **given)
    return mixer


def with_buffer() -> Any:
    mixer = V0()
    mixer.register_buffer("mask", torch.ones(1))
    return mixer


class Sigma(January):
    """Another name, an import under another name, and an input that changes nothing."""

    def forward(self, x: torch.Tensor, prompt: float = 1.0, **kwargs: Any) -> torch.Tensor:
        u, z = self.split(x)
        gate = z * torch.sigmoid(z)
        return self.out_proj(self.out_norm(self.forward_core(u).permute(0, 2, 3, 1)) * gate) * prompt


ACCEPTED: dict[str, Any] = {
    "other words": Sigma,
    "a mark of LocalVMamba": lambda: changed(January(), multi_scan=nn.Identity()),
    "a mark of EfficientVMamba": lambda: changed(February(), step_size=2),
    "a child": lambda: changed(January(), se=nn.Identity()),
    "a parameter": lambda: changed(V0(), gamma=nn.Parameter(torch.ones(1))),
    "a buffer": with_buffer,
    "settings": lambda: changed(January(), window=7, names=("a",), order="spiral", debug=object()),
    "a backend": lambda: rebound(Earlier, selective_scan_backend="core"),
    "scans named by class": lambda: rebound(April, CrossScan=CrossScan_Ab_1direction),
    "a low-rank update": lambda: changed(
        m := Official(one_file=True), x_proj=LowRank(m.x_proj, Grouped(m.d_inner, 8))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_computes_the_equations_is_used(name: str) -> None:
    report = check_adapter(Model(ACCEPTED[name]()).eval(), images(), tolerance=2e-6)
    assert [layer.name for layer in report.layers] == ["mixers.0"]


class Rolled(January):
    def forward_corev0(self, x: torch.Tensor) -> torch.Tensor:
        return selective_scan_fn(self, x.roll(1, 2), "cross2d")


class Half(January):
    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return super().forward(x) / 2


class Swapped(January):
    """The gate takes the other half."""

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z, x = self.in_proj(x).chunk(2, -1)
        return self.act(self.conv2d(x.permute(0, 3, 1, 2))), z


class Blurred(January):
    def forward_corev0(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(super().forward_corev0(x), 3, 1, 1)


REFUSED: dict[str, Any] = {
    "tokens moved": Rolled,
    "output scaled": Half,
    "gate swapped": Swapped,
    "a convolution added": Blurred,
    "unread bias": lambda: January(x_proj_bias=True),
    "another gate": lambda: January(act=nn.GELU),
    "our own, with a layer behind": lambda: Behind(8),
}


class Behind(SS2D):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).tanh()


@pytest.mark.changes_model("attributes")  # as the code of January does itself
@pytest.mark.parametrize("name", REFUSED)
def test_what_computes_something_else_is_refused_with_the_number(name: str) -> None:
    mixer = REFUSED[name]()
    model = nn.Sequential(mixer) if isinstance(mixer, SS2D) else Model(mixer).eval()
    x = torch.randn(2, 3, 5, 8) if isinstance(mixer, SS2D) else images()
    found = refusal(model, x)
    assert found is not None
    assert re.match(differs(r"(mixers\.)?0", type(mixer).__name__, "VMamba"), found), found
    verdict = latest(mixer)
    assert verdict is not None
    assert verdict.number > 0.01


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"dt_projs_bias": torch.ones(8, 6)}, "it has 8 routes; the cross-scan has 4"),
        ({"Ds": torch.ones(24, 1)}, r"its Ds has more than one axis, as that of the Mamba-2 variant \(m0\)"),
        ({"A_logs": torch.zeros(24, 3, 1)}, "its routes share A_logs or Ds"),
    ],
)
def test_parameters_of_another_mixer_are_said(parameters: dict[str, torch.Tensor], sentence: str) -> None:
    class Plain(January):
        def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return x

    mixer = changed(Plain(), **{name: nn.Parameter(value) for name, value in parameters.items()})
    assert re.search(sentence, str(refusal(Model(mixer).eval(), images())))


def test_what_the_module_cannot_compute_either_raises_its_own_error() -> None:
    model = Model(rebound(scan_mode="cascade2d")).eval()
    with pytest.raises(KeyError, match="cascade2d"):
        refusal(model, images())
