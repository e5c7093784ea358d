"""`mamba-attn collect` by several processes: speed of two ranks, equal bits, kills, the cost of a list of images.

Beside them, what ``benchmarks.many_images`` measures of `compare` and `findings`.

    python benchmarks/run.py scale --data FOLDER
    python -m benchmarks.many_ranks FOLDER      equal bits and the error of parts, again, into results/scale.json
"""

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.many_images import run_images
from benchmarks.measure import ROOT, peak_memory
from benchmarks.report import Figure, figure, written
from mamba_attn.analytics import AttentionStore, Request, collect
from mamba_attn.analytics.folding import Merged, unit, units
from mamba_attn.analytics.index import INDEX, Index
from mamba_attn.analytics.parts import Part
from mamba_attn.analytics.places import LocalPlace
from mamba_attn.datasets import open_data
from mamba_attn.datasets.loading import load
from mamba_attn.distributed import Ranks

FILE = ROOT / "benchmarks" / "results" / "scale.json"
MODEL = "vmamba_micro"
IMAGENET = 1_281_167  # images
KILLS = 20


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the option for images."""
    parser.add_argument("--data", required=True, metavar="DIR|ZIP[:PART]", help="at least 1,280 images")
    parser.add_argument("--images", nargs="+", type=int, default=[640, 1280], metavar="N", help="of each run")
    parser.add_argument("--kills", type=int, default=KILLS, metavar="N", help="of ranks and of the agent")


def partial(args: argparse.Namespace) -> bool:
    """Whether the options leave something out of the full run."""
    return args.images != [640, 1280] or args.kills < KILLS


def command(data: str, images: int, out: Path, ranks: int) -> list[str]:
    """The command that collects with so many ranks."""
    call = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--max-restarts", "3"]
    asked = ["--model", MODEL, "--data", data, "--limit", str(images), "--out", str(out)]
    return [sys.executable, *call, "-m", "mamba_attn", "collect", *asked]


def started(call: Sequence[str]) -> subprocess.Popen[str]:
    """A process of one thread per rank, in a group of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(call, env=environment, **pipes)  # type: ignore[call-overload]


def seconds(call: Sequence[str]) -> float:
    """Wall seconds of a command.

    Raises:
        RuntimeError: it failed.
    """
    began = time.perf_counter()
    process = started(call)
    _, said = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(call)} failed: {said.strip()[-800:]}")
    return time.perf_counter() - began


def content(path: Path) -> dict[str, np.ndarray]:
    """Every number of a store, by name."""
    store = AttentionStore.open(path)
    found = {"keys": np.array([image.key for image in store.images])}
    for layer in store.layers:
        for route in ("sum", *(range(layer.routes) if layer.routes > 1 else ())):
            found[f"{layer.name} mean {route}"] = store.mean(layer, route)
            found[f"{layer.name} variance {route}"] = store.variance(layer, route)
        if layer.moments is not None:
            found[f"{layer.name} moments"] = np.stack(store.state_moments(layer))
        found[f"{layer.name} features"] = store.features(layer)
    found["pixels"] = np.stack([store.pixels(row) for row in range(len(store.images))])
    return found


def difference(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> float:
    """Largest difference of two stores' statistics, relative to the largest entry of each array."""
    names = [name for name, values in first.items() if values.dtype == np.float64]
    return max(float(np.abs(first[name] - second[name]).max() / np.abs(first[name]).max()) for name in names)


def unequal(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> int:
    """Number of arrays that differ in any bit."""
    return len(first.keys() ^ second.keys()) + sum(
        not np.array_equal(values, second[name]) for name, values in first.items() if name in second
    )


def equality(data: str, images: int, folder: Path) -> tuple[int, float]:
    """Arrays that differ between one process and 2, 3, 4 in other orders; the error against one part of all images.

    Two images at once, which every part is a multiple of: on the batch a model's own answers depend, at 1e-7.
    """
    request = Request(load(MODEL, "demo"), open_data(data), images, part=images // 7, batch=2)
    collect(request, folder / "one")
    whole, differ = content(folder / "one"), 0
    for world in (2, 3, 4):
        order = random.Random(world).sample(range(world), world)
        for rank in order:
            collect(request, folder / str(world), ranks=Ranks(rank, world))
        differ += unequal(whole, content(folder / str(world)))
    collect(replace(request, part=images), folder / "single")
    return differ, difference(content(folder / "single"), whole)


def equal_figures(data: str, images: int, folder: Path) -> list[Figure]:
    """The two rows of ``equality``."""
    differ, error = equality(data, images, folder)
    print(f"2, 3 and 4 ranks: {differ} arrays differ; error of parts: {error:.1e}", flush=True)
    return [figure("scale equal", "2, 3 and 4 ranks", differ), figure("scale error", "", error)]


def killed(data: str, images: int, kills: int, folder: Path) -> dict[str, int]:
    """Kill ranks and the agent at random moments, and run the same command again until it ends."""
    chance, done, redone, differ, runs = random.Random(0), 0, 0, 0, 0
    seconds(command(data, images, folder / "alone", 1))
    whole, out = content(folder / "alone"), folder / "killed"
    while done < kills:
        process = started(command(data, images, out, 2))
        began = time.monotonic()
        moment = chance.uniform(5, 5 + images / 20)
        while process.poll() is None and time.monotonic() - began < moment:
            time.sleep(0.01)
        if process.poll() is None:
            ranks = [int(each) for each in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
            before = begun(out)
            victims = [chance.choice(ranks)] if ranks and chance.random() < 0.5 else [process.pid, *ranks]
            for victim in victims:
                os.kill(victim, signal.SIGKILL)
            redone = max(redone, before)
            done += 1
            print(f"kill {done} of {kills}: {before} parts begun", flush=True)
        process.communicate()
        if process.returncode == 0:
            runs += 1
            differ += unequal(whole, content(out))
            subprocess.run(["rm", "-r", str(out)], check=True)
    seconds(command(data, images, out, 2))
    differ += unequal(whole, content(out))
    return {"kills": done, "parts begun at a kill": redone, "unequal": differ, "runs": runs}


def begun(store: Path) -> int:
    """Parts that are begun and not counted, apart from those of processes that died before."""
    if not (store / "parts").exists():
        return 0
    names = [path.name for path in (store / "parts").iterdir()]
    counted = {name[:6] for name in names if name.endswith(".json")}
    return len({name[:6] for name in names} - counted)


def simulated(folder: Path, images: int) -> tuple[float, int]:
    """Write a store of so many images whose arrays are of 100; return seconds and bytes of a commit.

    All its parts name the arrays of the first one.
    """
    request = Request(load(MODEL, "demo"), open_data(str(folder / "data")), 100, layers=[0], part=1024)
    collect(request, folder / "store")
    where, took, size = LocalPlace(folder / "store"), [], 0
    index = Index.read(where)
    first, merged = Part.read(where, 0), Merged.latest(where)
    if merged is None:
        raise RuntimeError("the store of 100 images was not merged")
    where.remove(f"merged/{merged.parts:06d}.json")
    index.wanted, index.part = [images], 1024
    where.replace(INDEX, index.content())
    for number, (start, stop) in enumerate(index.spans):
        listed = [[f"n{at // 1300:08d}/n{at // 1300:08d}_{at}.JPEG", "tench", "tench", True, False]
                  for at in range(start, stop)]  # fmt: skip
        part = Part(number, start, stop, first.rows, first.statistics, listed, {}, Ranks().named())
        where.remove(part.object_name)
        began = time.perf_counter()
        where.create(part.object_name, part.content())
        took.append(time.perf_counter() - began)
        size = max(size, where.size(part.object_name))
    counts = [(stop - start, 0) for start, stop in index.spans]
    folders = {unit(*each): merged.folders[unit(*each)] for each in units(index)}
    Merged(len(counts), counts, folders).write(where)
    return float(np.median(took)), size


def opening(store: str) -> Any:
    """A call that opens a store, reads a row of a mean, and looks at an image."""

    def call() -> None:
        found = AttentionStore.open(store)
        found.mean_row(0, 3)
        last = found.images[len(found.images) - 1]
        if last.row != len(found.images) - 1:
            raise RuntimeError("another image")

    return call


def run_scale(args: argparse.Namespace) -> tuple[list[Figure], dict[str, Any]]:
    """All rows about many images and processes."""
    figures: list[Figure] = []
    details: dict[str, Any] = {}
    data = str(Path(args.data).expanduser().resolve()) if Path(args.data).exists() else args.data
    counts = [16] if args.quick else args.images
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for images in counts:
            runs: dict[int, list[float]] = {1: [], 2: []}
            for at in range(1 if args.quick else 3):  # alternating, because machines drift
                for ranks in (1, 2):
                    runs[ranks].append(seconds(command(data, images, folder / f"{images}-{ranks}-{at}", ranks)))
                    print(f"{images} images, {ranks} ranks: {runs[ranks][-1]:.1f} s", flush=True)
            ratio = float(np.median(runs[1]) / np.median(runs[2]))
            figures.append(figure("scale ranks", f"{images} images", ratio))
            details[f"{images} images"] = {"one rank": runs[1], "two ranks": runs[2]}
        figures += equal_figures(data, 14 if args.quick else 140, folder)
        found = killed(data, 16 if args.quick else 320, 1 if args.quick else args.kills, folder)
        figures += [
            figure("scale kills", f"{found['kills']} kills", found["unequal"]),
            figure("scale redone", "2 ranks", found["parts begun at a kill"] / 2),
        ]
        few = folder / "data"
        few.mkdir()
        _photos(few)
        images = 5000 if args.quick else IMAGENET
        commit, size = simulated(folder, images)
        began = time.perf_counter()
        opening(str(folder / "store"))()
        took = time.perf_counter() - began
        memory = peak_memory("benchmarks.many_ranks:opening", store=str(folder / "store"))
        figures += [
            figure("scale commit", f"{images:,} images", 1e3 * commit),
            figure("scale commit bytes", f"{images:,} images", size / 1e3),
            figure("scale opening", f"{images:,} images", took),
            figure("scale opening memory", f"{images:,} images", memory / 1e6),
        ]
        figures += run_images(data, args.quick, seconds)
        details |= {"kills": found, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    return figures, json.loads(json.dumps(details))


def _photos(folder: Path) -> None:
    from PIL import Image

    for number in range(100):
        pixels = np.random.default_rng(number).integers(0, 255, (128, 128, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def main() -> None:
    """Measure ``equality`` again."""
    with tempfile.TemporaryDirectory() as scratch:
        again = {row["what"]: row for row in (each.row() for each in equal_figures(sys.argv[1], 140, Path(scratch)))}
    results = json.loads(FILE.read_text())
    results["figures"] = [again.get(row["what"], row) for row in results["figures"]]
    FILE.write_text(written(results))


if __name__ == "__main__":
    main()
