"""A row of the table: a measured time compared with its floor, or the reason why it is missing."""

from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.kernel.ceilings import Ceilings
from benchmarks.kernel.counting import FORMULATIONS, Scans, Work, attention_work
from benchmarks.kernel.subjects import Configuration, Model
from benchmarks.kernel.timing import Spread


@dataclass(frozen=True)
class Floor:
    """The cheapest known formulation on this machine.

    Args:
        formulation: its name.
        seconds: below which it cannot come.
        work: what it has to do.
    """

    formulation: str
    seconds: float
    work: Work


@dataclass(frozen=True)
class ShapeTime:
    """A backend's time for the layers of one shape.

    Args:
        scans: the layers.
        seconds: of all of them, median.
        floor: theirs.
    """

    scans: Scans
    seconds: float
    floor: Floor


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row.

    Args:
        its: model and size.
        what: see ``subjects.Subject``; "attention added" is forward + attention less forward.
        how: backend or library.
        seconds: per call; None where nothing was measured.
        reason: why nothing was measured; None where something was.
        extrapolated: what was measured instead of all of it; empty where all was.
        floor: of the cheapest known formulation of the attention, where the row is that.
        shapes: the times behind the sum.
        note: what else is to be known.

    Raises:
        ValueError: both a time and a reason, or neither.
    """

    its: Configuration
    what: str
    how: str
    seconds: Spread | None = None
    reason: str | None = None
    extrapolated: str = ""
    floor: Floor | None = None
    shapes: tuple[ShapeTime, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.reason is None):
            raise ValueError(f"Row({self.its}, {self.what}, {self.how}): expected either a time or a reason.")

    @property
    def fraction(self) -> float | None:
        """Floor / time: 1 is as fast as this machine allows."""
        if self.seconds is None or self.floor is None or self.seconds.median <= 0:
            return None
        return self.floor.seconds / self.seconds.median

    def as_dict(self) -> dict[str, Any]:
        """As it stands in the JSON file; what was not measured is null, with a reason."""
        shapes = [
            {
                **asdict(each.scans),
                "seconds": each.seconds,
                "floor": each.floor.seconds,
                "formulation": each.floor.formulation,
                "flops": each.floor.work.flops,
                "bytes": each.floor.work.bytes,
            }
            for each in self.shapes
        ]
        return {
            **asdict(self.its),
            "what": self.what,
            "how": self.how,
            "seconds": None if self.seconds is None else asdict(self.seconds),
            "reason": None if self.reason is None else f"not measured: {self.reason}",
            "extrapolated": self.extrapolated or None,
            "floor": None if self.floor is None else asdict(self.floor),
            "fraction of floor": self.fraction,
            "shapes": shapes,
            "note": self.note or None,
        }


def cheapest(scans: list[Scans], batch: int, itemsize: int, ceilings: Ceilings) -> Floor:
    """Return the floor of the attention of some layers: the cheaper formulation for each shape, one after the other.

    Args:
        scans: the layers.
        batch: number of images.
        itemsize: bytes of an entry of B and C.
        ceilings: of the machine.
    """
    found = []
    for each in scans:
        works = {name: attention_work(each, batch, name, itemsize) for name in FORMULATIONS}
        floors = [Floor(name, ceilings.floor(work, name), work) for name, work in works.items()]
        found.append(min(floors, key=lambda floor: floor.seconds))
    names = dict.fromkeys(floor.formulation for floor in found)
    work = sum((floor.work for floor in found[1:]), found[0].work)
    return Floor(" and ".join(names), sum(floor.seconds for floor in found), work)


def floor_of(model: Model, batch: int, ceilings: Ceilings) -> Floor | None:
    """Return the floor of a model's attention; None for a transformer."""
    return cheapest(model.scans, batch, model.its.itemsize, ceilings) if model.scans else None
