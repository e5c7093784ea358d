"""Odd inputs by the thousand, generated from seeds: options, images, tables, weights, stores, and calls of the API.

Each generator returns a ``Case``: a function that makes its files in an empty folder and runs one command or one call
there. ``World`` holds what the cases start from, made once: photos, a table, weights and a store of a tiny model.
"""

import argparse
import io
import json
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mamba_attn import models
from mamba_attn.commands import cli

OTHER_NUMBERS = 98  # exit code of a case whose damaged store was read as if it said something else
NET = """\
from mamba_attn import models

def build(depth=1):
    return models.create("vim_micro", depth=depth, image_size=16, embed_dim=16, num_classes=3)
"""
ODD_WORDS = (
    *("", " ", "-", "--", "-1", "0", "1e400", "nan", "inf", "-inf", "9" * 40, "0x10", "1_0", "٣", "½", "a\0b", "😀"),
    *("\udcff", "a" * 5000, "../../x", "~nobody-of-this-name/x", "s3://bucket/x", "http://localhost/x", "/dev/zero"),
    *("/dev/stdin", "/proc/self/mem", ".", "/", "net.py", "pipe", "photos", "store", "noise.bin", "%s%n{0}", "$(x)"),
    *("1,2", "1,2,3,4,5", ",", "1,,2", "=", "k=v", "nope", "None", "[1]", '{"a": 1}', "true", "*", "[", "a:b:c", ":"),
)


@dataclass(frozen=True)
class Case:
    """One odd input.

    Args:
        name: says what is odd.
        run: gets an empty folder and returns the exit code; a call of the API raises instead.
        command: whether it is a command, whose errors are sentences on stderr.
    """

    name: str
    run: Callable[[Path], int]
    command: bool = True


class World:
    """What the cases start from.

    Args:
        folder: empty; the cases copy from it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "net.py").write_text(NET)
        (folder / "noise.bin").write_bytes(random.Random(0).randbytes(3000))
        photos = folder / "photos"
        photos.mkdir()
        for index in range(4):
            noise = np.random.default_rng(index).integers(0, 256, (20, 17 + index, 3), np.uint8)
            Image.fromarray(noise).save(photos / f"{index}.png")
        (photos / "labels.csv").write_text("file,label\n" + "".join(f"{i}.png,{i % 3}\n" for i in range(4)))
        torch.manual_seed(0)
        self.model = models.create("vim_micro", depth=1, image_size=16, embed_dim=16, num_classes=3)
        torch.save(self.model.state_dict(), folder / "best.pth")
        self.net = ["--model", f"{folder / 'net.py'}:build", "--weights", str(folder / "best.pth")]
        given = ["collect", "--data", str(photos), "--out", str(folder / "store"), *self.net, "--keep", "2"]
        code = cli.main(given)
        if code:
            raise RuntimeError(f"collect ended with {code}: no store for the cases.")
        cli.main(["report", str(folder / "store"), "--out", str(folder / "report.html")])

    def fresh(self, folder: Path) -> None:
        """Put small copies into a case's folder, under short names."""
        import os

        for name in ("net.py", "noise.bin"):
            shutil.copy(self.folder / name, folder / name)
        shutil.copytree(self.folder / "photos", folder / "photos")
        os.mkfifo(folder / "pipe")

    def calls(self) -> dict[str, list[str]]:
        """A quick call of each command, which works."""
        photo, photos, store = (str(self.folder / name) for name in ("photos/0.png", "photos", "store"))
        few = ["--method", "raw_attention", "--beside", "none", "--out", "out"]
        measures = ["--methods", "raw_attention", "--measures", "perturbation", "--limit", "2"]
        measures += ["--sanity-images", "0", "--pictures", "0"]
        return {
            "explain": ["explain", photo, *self.net, *few],
            "collect": ["collect", "--data", photos, "--out", "out", *self.net],
            "compare": ["compare", "--data", photos, "--out", "out", *measures, *self.net],
            "report": ["report", store, "--out", "out.html"],
            "findings": ["findings", store, "--out", "out", "--seeds", "2", "--images", "2", *self.net],
            "erf": ["erf", photo, "--out", "out", "--limit", "1", *self.net],
            "models": ["models"],
        }


def cases(world: World, seed: int = 0) -> Iterator[Case]:
    """Every kind by turns, without end; the same for the same seed."""
    chance = random.Random(seed)
    kinds = (odd_option, odd_image, odd_table, odd_weights, odd_store, odd_call)
    weights = (4, 2, 1, 2, 2, 3)
    while True:
        (kind,) = chance.choices(kinds, weights)
        yield kind(world, chance)


def _options(command: str) -> list[argparse.Action]:
    """The options of a command, and its positional arguments."""
    reader = cli.parser()
    (commands,) = (action for action in reader._actions if isinstance(action, argparse._SubParsersAction))
    hidden = {"help", "trust_remote_code"}
    return [action for action in commands.choices[command]._actions if action.dest not in hidden]


def odd_option(world: World, chance: random.Random) -> Case:
    """A working call in which one option gets an odd word."""
    command, call = chance.choice(list(world.calls().items()))
    action, word = chance.choice(_options(command)), chance.choice(ODD_WORDS)
    words = [] if action.nargs == 0 else [word] if chance.randrange(4) else [word, chance.choice(ODD_WORDS)]
    given = call + ([action.option_strings[0], *words] if action.option_strings else words)
    if action.option_strings and words and words[0].startswith("-"):
        given = [*call, f"{action.option_strings[0]}={words[0]}"]

    def run(folder: Path) -> int:
        world.fresh(folder)
        return cli.main(given)

    return Case(f"{command} {action.dest}={words!r:.60}", run)


def _bent(content: bytes, chance: random.Random) -> bytes:
    """Bytes of a file, damaged in one of the ways in which files are damaged."""
    changed = bytearray(content)
    kind = chance.choice(("flip", "cut", "zeros", "twice", "head", "empty", "insert"))
    at = chance.randrange(max(len(changed), 1))
    if kind == "flip":
        for _ in range(chance.choice((1, 4, 32))):
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del changed[at:]
    elif kind == "zeros":
        changed[at : at + 64] = bytes(len(changed[at : at + 64]))
    elif kind == "twice":
        changed += content
    elif kind == "head":
        changed[:8] = chance.randbytes(8)
    elif kind == "insert":
        changed[at:at] = chance.randbytes(17)
    else:
        changed.clear()
    return bytes(changed)


def odd_image(world: World, chance: random.Random) -> Case:
    """A folder in which one image is damaged, or of an unusual kind; a command explains or collects the folder."""
    kind = chance.choice(("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP"))
    mode = chance.choice(("RGB", "L", "P", "1", "RGBA", "CMYK", "I;16", "F"))
    size = chance.choice(((1, 1), (1, 900), (33, 2), (16, 16), (40, 25)))
    damaged, command = chance.random() < 0.6, chance.choice(("explain", "collect", "erf"))
    pixels = np.random.default_rng(chance.randrange(2**32)).integers(0, 255, (size[1], size[0]), np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(pixels).convert("RGB") if mode == "CMYK" else Image.fromarray(pixels)
    try:
        image.convert("I" if mode == "I;16" else mode).save(buffer, kind)
    except OSError:  # this format has no such pictures
        image.convert("RGB").save(buffer, kind)
    content = _bent(buffer.getvalue(), chance) if damaged else buffer.getvalue()
    suffix = chance.choice((".png", ".jpg", ".JPEG", ".webp"))

    def run(folder: Path) -> int:
        world.fresh(folder)
        (folder / "photos" / "labels.csv").unlink()
        (folder / "photos" / f"odd{suffix}").write_bytes(content)
        given = {
            "explain": ["explain", "photos", "--method", "raw_attention", "--beside", "none"],
            "collect": ["collect", "--data", "photos"],
            "erf": ["erf", "photos", "--limit", "5"],
        }
        return cli.main([*given[command], "--out", "out", *world.net])

    return Case(f"{command} of a {'damaged ' if damaged else ''}{kind} {mode} {size} called {suffix}", run)


def odd_table(world: World, chance: random.Random) -> Case:
    """A zip whose table of labels or boxes is not what it should be."""
    cell = chance.choice(
        ("", "-1", "1e9", "9" * 30, "nan", "x", "[", "[" * 3000, "[[0,0,1]]", "[[0,0,nan,1]]", "😀", '"')
    )
    name = chance.choice(("labels.csv", "boxes.csv"))
    header = "file,label" if name == "labels.csv" else "file,label,boxes_xyxy"
    rows = [header] + [f"{i}.png,{i % 3}" + (',"[[0,0,9,9]]"' if name == "boxes.csv" else "") for i in range(4)]
    where = chance.choice(("cell", "header", "bytes", "rows", "file"))
    if where == "cell":
        fields = rows[2].split(",", 2)
        fields[chance.randrange(len(fields))] = cell
        rows[2] = ",".join(fields)
    elif where == "header":
        rows[0] = chance.choice(("", "file", "label,file", "file;label", "a,b,c", "file,file", "file,label,label"))
    elif where == "rows":
        rows = rows[:1] if chance.random() < 0.5 else rows + rows[1:]
    elif where == "file":
        rows[1] = chance.choice(("missing.png,0", "../0.png,0", "/etc/passwd,0", ".,0", "labels.csv,0"))
    text = "\n".join(rows).encode()
    content = _bent(text, chance) if where == "bytes" else text

    def run(folder: Path) -> int:
        world.fresh(folder)
        with zipfile.ZipFile(folder / "a.zip", "w") as archive:
            for path in sorted((folder / "photos").glob("*.png")):
                archive.write(path, path.name)
            archive.writestr(name, content)
        return cli.main(["collect", "--data", "a.zip", "--out", "out", *world.net])

    return Case(f"a {name} with an odd {where}, {cell!r:.20}", run)


def odd_weights(world: World, chance: random.Random) -> Case:
    """A checkpoint with odd keys, types, shapes or bytes."""
    state: dict[Any, Any] = {key: value.clone() for key, value in world.model.state_dict().items()}
    key = chance.choice(list(state))
    kinds: dict[str, Callable[[], Any]] = {
        "number": lambda: 3,
        "text": lambda: "x",
        "none": lambda: None,
        "nan": lambda: torch.full_like(state[key], float("nan")),
        "infinite": lambda: torch.full_like(state[key], float("inf")),
        "int": lambda: state[key].int(),
        "bool": lambda: state[key].bool(),
        "complex": lambda: state[key].to(torch.complex64),
        "half": lambda: state[key].half(),
        "double": lambda: state[key].double(),
        "fp8": lambda: state[key].to(torch.float8_e4m3fn),
        "sparse": lambda: state[key].to_sparse(),
        "meta": lambda: state[key].to("meta"),
        "transposed": lambda: state[key].t() if state[key].dim() == 2 else state[key][None],
        "short": lambda: state[key].flatten()[:1],
        "empty": lambda: state[key].flatten()[:0],
        "expanded": lambda: state[key].flatten()[:1].expand(state[key].numel()).reshape(state[key].shape),
        "list": lambda: state[key].tolist(),
    }
    kind = chance.choice([*kinds, "missing", "extra", "number as key", "pair as key", "nested", "prefix", "bytes"])
    if kind in kinds:
        state[key] = kinds[kind]()
    elif kind == "missing":
        del state[key]
    elif kind == "extra":
        state["more.weight"] = torch.zeros(2)
    elif kind == "number as key":
        state[1] = state.pop(key)
    elif kind == "pair as key":
        state["a", "b"] = state.pop(key)
    elif kind == "nested":
        state = chance.choice(({"model": state}, {"x": {"y": state}}, {"model": [state]}, {"epoch": 3}, {}))
    elif kind == "prefix":
        state = {f"{chance.choice(('module', 'model', 'x.y'))}.{name}": value for name, value in state.items()}
    damage = random.Random(chance.randrange(2**32)) if kind == "bytes" else None

    def run(folder: Path) -> int:
        world.fresh(folder)
        torch.save(state, folder / "odd.pth")
        if damage is not None:
            (folder / "odd.pth").write_bytes(_bent((folder / "odd.pth").read_bytes(), damage))
        given = ["explain", "photos/0.png", "--method", "raw_attention", "--beside", "none", "--out", "out"]
        return cli.main([*given, *world.net[:3], "odd.pth"])

    return Case(f"weights: {kind} of {key!r}", run)


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all fields in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield (*path, key)
        yield from _leaves(each, (*path, key))


def odd_store(world: World, chance: random.Random) -> Case:
    """A store of which one file is damaged, gone, or says something else; a report is made of it."""
    names = sorted(p.relative_to(world.folder / "store") for p in (world.folder / "store").rglob("*") if p.is_file())
    name = chance.choice(names)
    content = (world.folder / "store" / name).read_bytes()
    kind = chance.choice(("bytes", "gone", "field"))
    if name.suffix == ".json" and kind == "field":
        value = json.loads(content)
        path = chance.choice(list(_leaves(value)))
        place = value
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = chance.choice((None, -1, 10**9, 10**30, "x", [], {}, [[]], True, 1.5, "9" * 50))
        content, what = json.dumps(value).encode(), f"{'.'.join(map(str, path))}={place[path[-1]]!r:.20}"
    else:
        content, what = (b"", "gone") if kind == "gone" else (_bent(content, chance), "bytes")

    def run(folder: Path) -> int:
        shutil.copytree(world.folder / "store", folder / "store")
        if what == "gone":
            (folder / "store" / name).unlink()
        else:
            (folder / "store" / name).write_bytes(content)
        code = cli.main(["report", "store", "--out", "out.html"])
        if code == 0 and what in ("bytes", "gone"):  # a field may say something else that is as good
            same = (folder / "out.html").read_bytes() == (world.folder / "report.html").read_bytes()
            return 0 if same else OTHER_NUMBERS
        return code

    return Case(f"store: {name} {what}", run)


def odd_call(world: World, chance: random.Random) -> Case:
    """A call of the API with one odd argument."""
    import mamba_attn
    from mamba_attn import attribution, ops

    odd = chance.choice(
        (
            *(None, "", "x", -1, 10**9, 10**30, 1.5, float("nan"), True, [], {}, (), (1, 2, 3), "9" * 400),
            *(torch.zeros(0), torch.zeros(2, 3), torch.tensor(float("nan")), np.zeros(3), [[1]], {"a": 1}, b"x", 1j),
        )
    )
    model, images = world.model, torch.rand(2, 3, 16, 16)
    u, delta = torch.rand(2, 6, 5), torch.rand(2, 6, 5)
    scan: dict[str, Any] = {"A": -torch.rand(6, 3), "B": torch.rand(2, 3, 5), "C": torch.rand(2, 3, 5)}
    scan["D"] = torch.rand(6)
    which = chance.choice(
        ("images", "target", "pixel", "layers", "method", "trace", "scan", "create", "knockout", "row")
    )
    argument = chance.choice(list(scan)) if which == "scan" else chance.choice(("image_size", "depth", "embed_dim"))
    explained = attribution.RawAttention(model)

    def call() -> object:
        if which == "images":
            return explained.attribute(odd)
        if which == "target":
            return attribution.MambaAttribution(model).attribute(images, target=odd)
        if which == "pixel":
            return explained.attribute(images, pixel=odd)
        if which == "layers":
            return attribution.RawAttention(model, layers=odd).attribute(images)
        if which == "method":
            return attribution.AttentionRollout(odd).attribute(images)
        if which == "scan":
            return ops.selective_scan(u, delta, **(scan | {argument: odd}))
        if which == "create":
            return models.create("vim_micro", **{argument: odd})
        if which == "knockout":
            with mamba_attn.knockout(model, layers=odd, columns=odd):
                return model(images)
        with mamba_attn.trace(model, layers=odd if which == "trace" else None) as trace:
            model(images)
        return trace[0].row(odd) if which == "row" else trace.layers

    def run(folder: Path) -> int:
        call()
        return 0

    return Case(f"{which}{f' {argument}' if which in ('scan', 'create') else ''}: {odd!r:.40}", run, command=False)
