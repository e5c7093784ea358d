"""Rows and ceilings that nobody measured, for the tests."""

from benchmarks.kernel.ceilings import Ceilings
from benchmarks.kernel.counting import on_paper, scans_of
from benchmarks.kernel.rows import Row, ShapeTime, cheapest
from benchmarks.kernel.subjects import Configuration
from benchmarks.kernel.timing import Spread

CEILINGS = Ceilings(copy=4e12, exponentials=4e12, float32=6e13, matrix={"bfloat16": 8e14, "TF32": 4e14})


def row(what, how, seconds, model="vim_small", batch=8, pixels=224, dtype="float32", **more):
    its = Configuration(model, pixels, batch, dtype)
    spread = None if seconds is None else Spread(seconds, 0.9 * seconds, 1.1 * seconds, 5)
    return Row(its=its, what=what, how=how, seconds=spread, **more)


def attention(how, seconds, model="vim_small", batch=8, **more):
    """A row of the operator whose layers' times are proportional to their floors."""
    scans = scans_of(on_paper(model, 224), 224)
    floor = cheapest(scans, batch, 4, CEILINGS)
    shapes = []
    for each in scans:
        part = cheapest([each], batch, 4, CEILINGS)
        shapes.append(ShapeTime(each, seconds * part.seconds / floor.seconds, part))
    return row("attention", how, seconds, model, batch, floor=floor, shapes=tuple(shapes), **more)
