"""Records of odd sizes that every operator test runs over."""

from dataclasses import dataclass

import torch

from mamba_attn import orders
from mamba_attn.core.scan_record import ScanRecord


@dataclass(frozen=True)
class Case:
    """Sizes of one record; ``frame`` is where its tensors live."""

    batch: int = 2
    routes: int = 2
    channels: int = 5
    states: int = 3
    grid: tuple[int, int] = (3, 5)
    order: str = "raster"
    frame: str = "scan"
    heads: int | None = None
    groups: int = 1
    shared_states: bool = False
    class_token: bool = False
    skip: bool = True
    delta_scale: float = 1.0

    @property
    def id(self) -> str:
        shown = [f"{key}={value}" for key, value in vars(self).items() if value != getattr(Case(), key)]
        return "-".join(shown) or "default"


CASES = [
    Case(),
    Case(routes=1, channels=1, states=1, grid=(1, 1)),
    Case(routes=4, channels=32, states=1, grid=(5, 9), frame="tokens"),
    Case(routes=4, channels=17, states=16, grid=(6, 7), order="spiral", frame="tokens"),
    Case(routes=1, batch=3, channels=16, states=8, grid=(1, 33)),
    Case(channels=20, states=5, grid=(7, 7), order="hilbert", class_token=True),
    Case(channels=12, heads=3, groups=2, states=4, grid=(4, 6), shared_states=True),
    Case(channels=6, heads=2, groups=3, states=2, grid=(5, 3), skip=False),
    Case(routes=1, channels=3, states=2, grid=(13, 11), delta_scale=10.0),
]


def make(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> ScanRecord:
    """A random record; numbers depend on the seed alone, so dtypes agree up to rounding."""
    torch.manual_seed(seed)
    routes, channels, states = case.routes, case.channels, case.states
    heads = case.heads or channels
    name = {1: "raster"}.get(routes, case.order)
    order = orders.cross(name, *case.grid)[:routes]
    if case.class_token:
        order = torch.stack([orders.insert_tokens(route, [case.grid[0] * case.grid[1] // 2]) for route in order])
    length = order.shape[1]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    delta = (torch.rand(case.batch, routes, heads, length, dtype=torch.float64) * case.delta_scale).to(dtype)
    A = -(torch.rand(routes, heads, 1 if case.shared_states else states, dtype=torch.float64) * 2 + 0.1).to(dtype)
    B, C = (normal(case.batch, routes, case.groups, states, length) for _ in range(2))
    D = normal(routes, channels) if case.skip else None
    shared = 1 if case.frame == "tokens" else routes
    u = normal(case.batch, shared, channels, length)
    make_record = ScanRecord.from_tokens if case.frame == "tokens" else ScanRecord.from_scan
    return make_record(u, delta, A, B, C, D, order=order, scale=0.5)


def double(record: ScanRecord) -> ScanRecord:
    """The same record in float64."""
    return record.map_tensors(torch.Tensor.double)
