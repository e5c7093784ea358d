"""Type-check the Python blocks of README.md and docs/ as a user's files: snippets WHEEL, with mypy and with pyright.

The wheel goes into a virtual environment of its own, which borrows torch and the rest from this one: what is checked is
the package that is shipped, not the checkout. A page is one file, because its blocks build upon each other.
"""

import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# code that readers have and we have not
FOREIGN = {"models_mamba.pyi": "from typing import Any\n\ndef __getattr__(name: str) -> Any: ...\n"}
# what README promises of types, in a user's words: assert_type is an error where a type is another, or Any
PROMISES = """
from typing import assert_type

import torch
from torch import Tensor

import mamba_attn
from mamba_attn.tracing.layers import Layer, ScanLayer
from mamba_attn.tracing.softmax_layers import AttentionLayer

model = mamba_attn.models.create("vim_tiny")
with mamba_attn.trace(model) as trace:
    model(torch.randn(2, 3, 224, 224))
assert_type(trace["layers.6.mixer"], Layer)
assert_type(trace["layers.6.mixer"].attention("mean", routes="each"), Tensor)
assert_type(trace["layers.6.mixer"].left_product(torch.rand(2, 197)), Tensor)
assert_type(trace.scans["layers.6.mixer"], ScanLayer)
assert_type(trace.scans["layers.6.mixer"].scan, mamba_attn.ScanRecord)
assert_type(trace.softmax["blocks.3.attn"], AttentionLayer)
x = torch.rand(2, 8, 5)
assert_type(mamba_attn.left_product(x, x, x, x, vector=x), Tensor)
assert_type(mamba_attn.selective_scan(x, x, x, x, x), Tensor)
assert_type(mamba_attn.selective_scan(x, x, x, x, x, attention="mean"), tuple[Tensor, Tensor])
assert_type(mamba_attn.attribution.RawAttention(model).attribute(x), Tensor)
"""


def pages() -> dict[str, str]:
    """File name and code of every page with Python blocks; a line keeps its number."""
    found = {}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        code, inside = [], False
        for line in page.read_text().splitlines():
            if line.startswith("```"):
                inside = line == "```python"
                line = ""
            code.append(line if inside else "")
        if any(code):
            found[f"{page.stem}.py"] = "\n".join(code).rstrip() + "\n"
    return found


def environment(folder: Path, wheel: str) -> Path:
    """The interpreter of a virtual environment with the wheel in it, and the packages of this one behind it."""
    venv.create(folder)
    python = folder / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", wheel], check=True
    )
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def mypy(python: Path, folder: Path) -> list[str]:
    """What mypy says."""
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--python-executable",
        str(python),
        "--config-file",
        "",
        *map(str, folder.glob("*.py")),
    ]
    done = subprocess.run(
        [*command, "--check-untyped-defs", "--disable-error-code=import-untyped", "--cache-dir", str(folder / "cache")],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    return [] if done.returncode == 0 else [f"mypy: {line}" for line in (done.stdout + done.stderr).splitlines()]


def pyright(python: Path, folder: Path) -> list[str]:
    """What pyright says; where it cannot run, one sentence is printed and nothing is said."""
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", str(python), str(folder)]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        report = json.loads(done.stdout[done.stdout.index("{") :])
    except (subprocess.TimeoutExpired, ValueError) as error:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1] if isinstance(error, ValueError) else error
        print(f"pyright could not run here, so mypy alone checked the pages (it needs node or network): {reason}")
        return []
    return [
        f"pyright: {Path(one['file']).name}:{one['range']['start']['line'] + 1}: {one['message']}"
        for one in report["generalDiagnostics"]
        if one["severity"] == "error"
    ]


def main() -> int:
    """Exit code 1 where a checker complains."""
    (wheel,) = sys.argv[1:]
    with tempfile.TemporaryDirectory() as work:
        python, folder = environment(Path(work, "venv"), wheel), Path(work, "pages")
        folder.mkdir()
        files = {**pages(), "promises.py": PROMISES}
        for name, text in {**files, **FOREIGN}.items():
            (folder / name).write_text(text)
        complaints = mypy(python, folder) + pyright(python, folder)
    print("\n".join(complaints) or f"{', '.join(files)}: no complaints")
    return bool(complaints)


if __name__ == "__main__":
    sys.exit(main())
