"""Runs an odd input in a process of its own and says what a user would complain about."""

import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from mamba_attn.errors import MambaAttnError
from tests.robustness.odd_inputs import OTHER_NUMBERS, Case

CPU_SECONDS = 40  # of a command on four tiny images
WALL_SECONDS = 240  # on a busy machine; only what waits for ever reaches it
MEMORY = 1.5e9  # bytes more than before
_RAW = re.compile(r"0x[0-9a-f]{6,}|<built-in|Traceback|object has no attribute|'NoneType' object|to unpack|Assert")


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Args:
        name: of the case.
        code: exit code; 0, 1 or 2, or 3 for a call that was refused.
        text: what was printed on stderr.
        complaint: what is wrong with that; empty: nothing.
    """

    name: str
    code: int
    text: str
    complaint: str


def judge(case: Case) -> Outcome:
    """Run a case in a forked process, in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said"
        child = os.fork()
        if child == 0:  # never returns
            _run(case, Path(folder), said)
        started, status, usage = time.monotonic(), 0, None
        while usage is None:
            done, status, found = os.wait4(child, os.WNOHANG)
            usage = found if done else None
            if usage is None and time.monotonic() - started > WALL_SECONDS:
                os.kill(child, signal.SIGKILL)
                os.wait4(child, 0)
                return Outcome(case.name, -9, "", f"hangs: nothing came in {WALL_SECONDS} s")
            time.sleep(0.01)
        text = said.read_text(errors="replace") if said.exists() else ""
    code = os.waitstatus_to_exitcode(status)
    return Outcome(case.name, code, text, _complaint(case, code, text, usage.ru_maxrss * 1024))


def _run(case: Case, folder: Path, said: Path) -> None:
    """Run the case, in the child."""
    code = 99
    try:
        work = folder / "work"
        work.mkdir()
        os.chdir(work)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
        out = os.open(said, os.O_WRONLY | os.O_CREAT)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(out, 2)
        sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115
        code = case.run(work)
    except SystemExit as error:  # argparse
        code = error.code if isinstance(error.code, int) else 1
    except (ValueError, TypeError, OSError, ImportError, MambaAttnError) as error:
        if case.command:
            traceback.print_exc()
        else:
            code = 3
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
    except BaseException:  # noqa: BLE001 - whatever it is, it is the complaint
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _complaint(case: Case, code: int, text: str, peak: float) -> str:
    """What a user would say of it; empty if nothing."""
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if code == -signal.SIGXCPU or code == -signal.SIGKILL:
        return f"took more than {CPU_SECONDS} s of one core"
    if code == OTHER_NUMBERS:
        return "accepted what is damaged, and shows other numbers"
    if code not in ((0, 1, 2) if case.command else (0, 3)):
        return f"ended with {code}"
    if peak - base > MEMORY:
        return f"took {(peak - base) / 1e9:.1f} GB"
    last = text.strip().splitlines()[-1] if text.strip() else ""
    if code and len(last.split()) < 4:
        return "refused without a sentence"
    if code and _RAW.search(text):
        return "the refusal speaks of Python's insides"
    return ""
