"""How commands end, and the library's sentences as a command says them."""

import ast
import os
import re
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from mamba_attn.commands import cli
from mamba_attn.commands.exit_codes import as_flags, exit_code
from mamba_attn.commands.terminal import _parts, plain, show

ROOT = Path(__file__).parents[2]
FLAG = re.compile(r"(?<![\w-])--[a-z]")
# what begins with two dashes and is no option of ours
OTHERS = {
    "mamba_attn/__init__.py": "``mamba-attn --help``",
    "mamba_attn/evaluation/page.py": "--photo",  # a variable of CSS
    "mamba_attn/figures/document.py": "--opacity",
    "mamba_attn/figures/text.py": "--for",
    "mamba_attn/ops/cpu/build.py": "--version",  # of compilers
    "mamba_attn/ops/cuda/nvrtc.py": "--gpu-architecture",
    "mamba_attn/ops/cuda/driver.py": "--gpus all",  # of docker
}


def flags(source):
    """The strings of a source that name a flag."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and FLAG.search(node.value):
            yield node.value


def test_flags_stand_in_commands_alone():
    assert list(flags("raise ValueError(f'--limit {limit}: too few.')")) == ["--limit "]
    found = []
    for path in (*ROOT.glob("mamba_attn/**/*.py"), *ROOT.glob("integrations/**/*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith("mamba_attn/commands/"):
            found += [f"{name}: {text}" for text in flags(path.read_text()) if OTHERS.get(name, "\0") not in text]
    assert found == []


@pytest.mark.parametrize(
    ("sentence", "options", "typed"),
    [
        ("limit=0: expected a number from 1 on.", ["limit"], "--limit 0: expected a number from 1 on."),
        ("limit=0: expected a number.", ["out"], "limit=0: expected a number."),  # not this command's
        ("layers='7': no such layer.", ["layer"], "--layer 7: no such layer."),
        ("routes='x': use routes='sum'.", ["routes"], "--routes x: use --routes sum."),
        ("fits: batch=1 layers=['a', 'b c']. Rows", ["batch", "layer"], "fits: --batch 1 --layer a 'b c'. Rows"),
        ("of keep=['a', 'b'], not keep=1;", ["keep"], "of --keep a,b, not --keep 1;"),
        ("size=0.5: too small; size=12 fits.", ["size"], "--size 0.5: too small; --size 12 fits."),
        ("seed=nan: no", ["seed"], "--seed nan: no"),
        ("sanity_images=-1: no", ["sanity_images"], "--sanity-images -1: no"),
        ("out='it\\'s': no", ["out"], """--out 'it'"'"'s': no"""),
        ("open_data('a b'): it holds no images.", ["data"], "--data 'a b': it holds no images."),
        ("create('x'): no such model.", ["models"], "--models x: no such model."),
        ("create('x', weights='demo'): none.", ["model", "weights"], "--model x --weights demo: none."),
        ("create('x', depth=2): none.", ["model"], "create('x', depth=2): none."),
        ("attribute(query=(9.0, 3)): outside.", ["query"], "--query 9.0,3: outside."),
        ("no maps; see load(weights='x')", ["weights"], "no maps; see load(weights='x')"),
        ("/a/limit=3/b: occlusion:seed=3", ["limit", "seed"], "/a/limit=3/b: occlusion:seed=3"),
        ("broken(: limit=3", ["limit"], "broken(: --limit 3"),
    ],
)
def test_arguments_become_flags(sentence, options, typed):
    assert as_flags(sentence, options) == typed


def test_arguments_of_a_builder_are_typed_behind_option():
    sentence = "model='net.py:build': build() needs width; give each as an option, width=VALUE, or name another."
    typed = "--model net.py:build: build() needs width; give each as --option width=VALUE, or name another."
    assert as_flags(sentence, {"model", "option"}) == typed


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("no such thing"), 2, "no such thing"),
        (ValueError("port=0: none"), 2, "--port 0: none"),
        (KeyboardInterrupt(), 130, "stopped; it resumes."),
    ],
)
def test_all_commands_end_alike(error, code, said, capsys):
    def call():
        raise error

    assert exit_code("explore", call, ["port"], "stopped; it resumes.") == code
    assert capsys.readouterr().err == f"mamba-attn explore: {said}\n"
    with pytest.raises(ZeroDivisionError):  # a bug stays one
        exit_code("explore", lambda: 1 // 0)


def test_the_library_and_its_command_name_the_same_argument(capsys, tmp_path):
    from mamba_attn.datasets import load, open_data

    for call, arguments in (
        (lambda: open_data("no.zip"), ["collect", "--data", "no.zip", "--out", str(tmp_path / "store")]),
        (lambda: load("vim_micor"), ["explain", "--model", "vim_micor", "--out", str(tmp_path / "out")]),
    ):
        with pytest.raises((ValueError, OSError)) as caught:
            call()
        name, _, rest = str(caught.value).partition(": ")
        assert cli.main(arguments) == 2
        said = capsys.readouterr().err
        assert re.fullmatch(r"\w+\('[\w.]+'\)", name)
        assert said == f"mamba-attn {arguments[0]}: {' '.join(arguments[1:3])}: {rest}\n"


def test_no_word_of_a_table_is_broken_at_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    header = ["", "finding", "trained", "range of untrained models", "paper says"]
    words = "correlation_of_neighbouring_columns over the blocks of a stage, of 28 and 1 pairs"
    rows = [["blocks", words, "-0.30 [-0.91, -0.02]", "outside, above", "> 0.5 holds"]] * 2
    show("title", header, rows)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert max(map(len, shown.splitlines())) <= 80
    for text in (*header, *rows[0]):
        for word in text.split():
            assert word in shown, word


def test_a_table_that_is_too_wide_is_shown_in_parts():
    header, rows = ("method", "one", "another"), [("random", "1234567", "0.5")]
    assert list(_parts(header, rows, 200)) == [[0, 1, 2]]
    assert list(_parts(header, rows, 22)) == [[0, 1], [0, 2]]
    assert list(_parts(header, rows, 1)) == [[0, 1], [0, 2]]  # a column is never cut away
    assert list(_parts(("alone",), [("x",)], 5)) == [[0]]
    assert list(_parts(("", "finding", "a", "b"), [("of", "title", "1", "2")], 1)) == [[0, 1, 2], [0, 1, 3]]
    assert plain("t", header, rows) == "\nt\nmethod  one      another\nrandom  1234567  0.5\n"


def test_sigterm_is_said_and_its_handler_goes(capsys):
    before = signal.getsignal(signal.SIGTERM)

    def call():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        return 0

    assert exit_code("collect", call, stopped="stopped; it resumes.") == 143
    assert capsys.readouterr().err == "mamba-attn collect: stopped; it resumes.\n"
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_counts_though_what_tidies_up_fails(capsys, number, code, request):
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # as a shell starts what it puts behind
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, ignored))

    def interrupted():
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        finally:
            {}["what the step that was cut off would have made"]

    def translated():
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except KeyboardInterrupt:
            pass
        raise RuntimeError("as C++ throws it again, without what it was")

    assert exit_code("collect", interrupted) == code
    assert capsys.readouterr().err == "mamba-attn collect: stopped.\n"
    if number == signal.SIGTERM:
        assert exit_code("collect", translated) == code
    with pytest.raises(KeyError):
        exit_code("collect", lambda: {}["a fault of ours"])


@pytest.mark.parametrize(("left", "code"), [(1, 143), (0, 0)])
def test_a_step_that_a_signal_broke_off_is_no_failure_of_its_own(left, code):
    def named():
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        return left

    assert exit_code("findings", named) == code
