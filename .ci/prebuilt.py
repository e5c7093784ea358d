"""Run the kernels of a prebuilt wheel where there is no compiler: prebuilt WHEEL. Says how long the first call takes.

Every kind of CPU in the wheel that this machine can run is compared with the reference, in a virtual environment of its
own, which borrows torch and the rest from this one.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from snippets import environment

CODE = """
import sys, time
import torch
from mamba_attn import ops
from mamba_attn.ops.cpu import build, compiling

assert "venv" in build.__file__, build.__file__
torch.manual_seed(0)
shapes = [(1, 20, 16, 197), (2, 33, 1, 530), (2, 5, 3, 49)]
calls = [
    (torch.rand(b, c, length), -torch.rand(c, n) - 0.1, torch.randn(b, n, length), torch.randn(b, n, length))
    for b, c, n, length in shapes
]
started = time.perf_counter()
ops.hidden_attention(*calls[0], backend="native")
first = time.perf_counter() - started
kinds = compiling.usable_kinds()
assert build.library_origin() == f"prebuilt for {kinds[0]}", build.library_origin()
for kind in kinds:
    build.usable_kinds = lambda kind=kind: [kind]
    build._load.cache_clear()
    assert build.library_origin() == f"prebuilt for {kind}", build.library_origin()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for call in calls:
            for fold in ("mean", "positive"):
                torch.testing.assert_close(
                    ops.hidden_attention(*call, fold=fold, backend="native").double(),
                    ops.hidden_attention(*call, fold=fold, backend="reference").double(), rtol=1e-4, atol=1e-5,
                )
print(f"prebuilt for {', '.join(kinds)}: as the reference; the first call took {first:.3f} s")
"""


def main() -> int:
    """Exit code 1 where a kernel is not used or is wrong."""
    (wheel,) = sys.argv[1:]
    with tempfile.TemporaryDirectory() as work:
        python, cache = environment(Path(work, "venv"), wheel), Path(work, "cache")
        variables = {key: value for key, value in os.environ.items() if key not in ("CXX", "PYTHONPATH")}
        variables |= {"PATH": work, "MAMBA_ATTN_CACHE": str(cache)}
        code = subprocess.run([str(python), "-W", "error", "-c", CODE], env=variables, cwd=work).returncode
        if code == 0 and cache.exists() and list(cache.iterdir()):
            print(f"something was compiled: {list(cache.iterdir())}")
            return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
