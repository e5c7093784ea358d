"""``mamba-attn doctor``: versions, backends, and what is missing and how to get it; for bug reports."""

import argparse
import importlib.metadata as metadata
import os
import platform
import re
from collections.abc import Iterator

from mamba_attn.commands.options import Commands, command
from mamba_attn.commands.terminal import show
from mamba_attn.errors import nearest

_EXAMPLES = """\

backends
versions extras"""
_NOTES = """\
Paste all of it into a bug report. Nothing is sent anywhere or changed; the CPU
kernel is compiled if it has not been yet.
"""
_BEYOND = ("mamba-ssm", "causal-conv1d", "triton", "torchvision")  # not ours to require, and worth knowing
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)[^;]*;.*extra == ['\"]([a-z0-9]+)['\"]")
_NOT_FOR_USERS = ("all", "dev", "docs")


def add_parser(commands: Commands) -> None:
    """Add the command and its arguments."""
    parser = command(
        commands, "doctor", "print versions, backends and what is missing", examples=_EXAMPLES, notes=_NOTES, run=run
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="versions, backends or extras; default: all")


def run(args: argparse.Namespace) -> int:
    """Print the tables; the exit code is 0 also where something is missing, since most of it is optional."""
    parts = {"versions": ("what", _versions), "backends": ("backend", _backends), "extras": ("extra", _extras)}
    for part in args.parts:
        if part not in parts:
            raise ValueError(f"{part!r}: {nearest(part, parts)}")
    for part in args.parts or parts:
        first, rows = parts[part]
        show(part, (first, "here"), list(rows()))
    return 0


def _versions() -> Iterator[tuple[str, str]]:
    import torch

    import mamba_attn

    yield "mamba_attn", mamba_attn.__version__
    yield "python", platform.python_version()
    yield "system", platform.platform()
    yield "torch", torch.__version__
    yield "threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    for name in _BEYOND:
        yield name, _version(name) or "-"


def _backends() -> Iterator[tuple[str, str]]:
    """Yield every backend and whether it runs here."""
    import torch

    from mamba_attn.ops.cpu.build import library_origin, library_problem
    from mamba_attn.ops.cuda.launcher import LAUNCHER

    yield "reference", "runs (float64, for tests)"
    yield "blocked", "runs"
    problem = library_problem()
    yield "native", f"runs ({library_origin()})" if problem is None else f"does not run: {problem}"
    if not torch.cuda.is_available():
        yield "fused", "does not run: torch sees no CUDA device"
    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        problem = LAUNCHER.problem(device)
        name = torch.cuda.get_device_name(device)
        yield "fused", f"{name}: {'runs' if problem is None else problem}"


def _extras() -> Iterator[tuple[str, str]]:
    """Yield every extra, with versions or what to type."""
    wanted: dict[str, list[str]] = {}
    for text in metadata.requires("mamba_attn") or []:
        found = _REQUIREMENT.match(text)
        if found and found[2] not in _NOT_FOR_USERS and not found[1].startswith("mamba"):
            wanted.setdefault(found[2], []).append(found[1])
    for extra, packages in sorted(wanted.items()):
        versions = {package: _version(package) for package in packages}
        missing = [package for package, version in versions.items() if version is None]
        here = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
        remedy = f"missing {', '.join(missing)}: pip install 'mamba_attn[{extra}]'" if missing else ""
        yield extra, "; ".join(filter(None, (here, remedy)))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
