"""What a result was measured on: processor, GPU, driver, clocks, versions, commit."""

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
_QUERY = {  # nvidia-smi's names, and ours
    "driver_version": "driver",
    "clocks.sm": "clock now, MHz",
    "clocks.max.sm": "clock at most, MHz",
    "clocks.mem": "memory clock now, MHz",
    "power.limit": "power limit, W",
}


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Return the header of every result.

    Args:
        device: a CUDA device adds its "gpu". Default: the CPU.
    """
    import numpy

    header: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted changes": bool(_git("status", "--porcelain", "--", "mamba_attn", "cuda", "benchmarks/*.py")),
    }
    if device is not None and device.type == "cuda":
        header["gpu"] = gpu(device)
    return header


def gpu(device: torch.device) -> dict[str, Any]:
    """Return name, memory, versions and, where nvidia-smi says them, driver and clocks of a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    found: dict[str, Any] = {
        "name": properties.name,
        "architecture": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    }
    query = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    said = _said([*query, *_which(properties)]) or _said(query)
    values = [value.strip() for value in (said or "").split("\n")[0].split(",")]
    known = dict(zip(_QUERY.values(), values, strict=True)) if len(values) == len(_QUERY) else {}
    return found | {name: known.get(name) for name in _QUERY.values()}


def _which(properties: Any) -> list[str]:
    """Which of several GPUs nvidia-smi is asked about."""
    uuid = getattr(properties, "uuid", None)
    return [] if uuid is None else [f"--id=GPU-{uuid}"]


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _git(*words: str) -> str | None:
    """Return git's output for this checkout; None if installed, without git, or without commits."""
    return _said(["git", *words], ROOT) if (ROOT / ".git").exists() else None


def _said(command: Sequence[str], folder: Path | None = None) -> str | None:
    """Return what a command prints; None if it is absent or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
