import argparse
import json

import pytest
import torch

from benchmarks import run
from benchmarks.kernel import ceilings, job, machine, timing, verify
from benchmarks.kernel.ceilings import Ceilings, tf32
from mamba_attn import ops

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _threads():
    """run.main sets the number of threads of its process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def refused(capsys, *arguments):
    """What is said on stderr about a call that is refused."""
    with pytest.raises(SystemExit) as stop:
        run.main(["kernel", *arguments])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.mark.full
def test_a_quick_run_from_end_to_end(tmp_path, capsys):
    folder = tmp_path / "new" / "folder"
    options = ["--quick", "--models", "vim_micro", "--pixels", "32", "--device", "cpu", "--out", str(folder)]
    run.main(["kernel", *options])
    captured = capsys.readouterr()
    assert "measuring vim_micro, 32 pixels, batch 1, float32 (1 of 1)" in captured.err
    assert "~ " in captured.out
    assert captured.out.count("not measured: this run was on the CPU") == 6
    assert {path.name for path in folder.iterdir()} == {"kernel.json", "roofline.html", "roofline.png"}
    written = json.loads((folder / "kernel.json").read_text())
    assert written["quick"]
    assert written["machine"]["threads"] == 1
    assert written["details"]["configurations"] == "1 of 1"
    assert written["details"]["ceilings"]["copy"] > 1e8
    assert float(written["details"]["errors"]["blocked, float32"]) < 1e-6
    rows = written["details"]["rows"]
    assert {row["model"] for row in rows} == {"vim_micro"}
    for row in rows:
        assert (row["seconds"] is None) == (row["reason"] is not None)
        assert row["seconds"] is not None or row["reason"].startswith("not measured: ")
    assert "unpkg.com" not in (folder / "roofline.html").read_text()[:10_000]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--models", "vim_tinny"], "--models vim_tinny: no such model. Did you mean 'vim_tiny'"),
        (["--models", "vit_micro"], "--models vit_micro: no such model."),
        (["--pixels", "224", "225"], "--pixels 225: expected a positive multiple of 32."),
        (["--pixels", "0"], "--pixels 0: expected a positive multiple of 32."),
        (["--batch", "-1"], "--batch -1: expected a positive number."),
        (["--budget", "0"], "--budget 0: expected seconds, more than 0."),
        (["--budget", "nan"], "--budget nan: expected seconds, more than 0."),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(capsys, tmp_path, options, sentence):
    assert sentence in refused(capsys, *options, "--device", "cpu", "--out", str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda: PyTorch sees no CUDA device here; use --device cpu." in refused(capsys, "--device", "cuda")


@pytest.mark.parametrize("options", [["--dtype", "float64"], ["--batch", "many"], ["--device", "tpu"]])
def test_only_what_exists_is_offered(options):
    with pytest.raises(SystemExit) as stop:
        run.main(["kernel", *options])
    assert stop.value.code == 2


def parsed(*options):
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    job.add_options(parser)
    return parser.parse_args(options)


def test_a_gpu_gets_the_whole_grid_and_a_cpu_a_small_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    whole = job.job(parsed())
    assert whole.device == torch.device("cuda", 0)
    assert len(whole.grid) == 8 * 3 * 3 * 2
    assert {each.batch for each in whole.grid} == {1, 8, 64}
    assert {str(each) for each in job.job(parsed("--device", "cpu")).grid} == {
        f"{name}, 224 pixels, batch 1, float32" for name in ("vim_tiny", "vmamba_tiny_s1l8", "deit_tiny_patch16_224")
    }
    assert {each.pixels for each in job.job(parsed("--quick")).grid} == {64}


def test_the_benchmark_writes_the_default_run_only(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(job, "measure", lambda _, path, folder: asked.append((path, folder)))
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    run.main(["kernel", "--device", "cpu"])
    run.main(["kernel", "--device", "cpu", "--models", "vim_tiny"])
    run.main(["kernel", "--quick"])
    run.main(["kernel", "--quick", "--out", str(tmp_path / "x")])
    assert asked == [
        (tmp_path / "results" / "kernel.json", None), (None, None), (None, None),
        (tmp_path / "x" / "kernel.json", tmp_path / "x"),
    ]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        run.main(["kernel", "--pixels", "33"])
    assert stop.value.code == 2
    assert "--pixels 33: expected a positive multiple of 32." in capsys.readouterr().err


@pytest.mark.full
def test_the_ceilings_of_a_cpu_are_those_of_its_work():
    found = ceilings.measure(CPU, rounds=2, quick=True)
    x = torch.rand(2**17)
    out = torch.empty_like(x)
    rate = x.numel() / min(timing.cpu_seconds(lambda: torch.exp(x, out=out), 20) for _ in range(3))
    assert 0.7 < found.exponentials / rate < 5  # it is the best of several
    assert 1e8 < found.copy < 1e13
    assert 1e8 < found.float32 < 1e14
    assert set(found.matrix) == {"bfloat16"}
    assert "torch.exp" in found.notes["exponentials"]


def test_torch_can_read_the_chain_of_exponentials():
    if not hasattr(torch.cuda, "jiterator"):
        pytest.skip("this torch has no jiterator")
    read = torch.cuda.jiterator._CodeParser(ceilings._EXPONENTIALS)
    assert (read.function_name, read.function_params) == ("chain", "(T x)")
    assert read.function_body.count("exp2f") == 1
    assert f"i < {ceilings._CHAIN}" in read.function_body


def test_tf32_is_put_back():
    owner = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(owner, "fp32_precision") else "allow_tf32"
    before = getattr(owner, name)
    with tf32(True), tf32(False):
        assert getattr(owner, name) in ("ieee", False)
    assert getattr(owner, name) == before
    with pytest.raises(KeyError), tf32(True):
        raise KeyError
    assert getattr(owner, name) == before


def test_wrong_backends_are_found(monkeypatch):
    errors = verify.backend_errors(CPU, ["float32", "bfloat16"])
    assert {name for name, _ in errors} >= {"blocked"}
    assert {dtype for _, dtype in errors} == {"float32", "bfloat16"}
    assert verify.refusals(errors) == {}
    right = ops.BACKENDS["blocked"].hidden_attention

    def wrong(*arguments):
        return right(*arguments) * 1.001

    monkeypatch.setattr(ops.BACKENDS["blocked"], "hidden_attention", wrong, raising=True)
    said = verify.refusals(verify.backend_errors(CPU, ["float32"]))
    assert list(said) == [("blocked", "float32")]
    assert "of the absolute terms is more than 1e-05: no speed is reported" in said["blocked", "float32"]


def test_the_machine_says_nothing_where_nvidia_smi_is_absent(monkeypatch):
    class Properties:
        name, major, minor, multi_processor_count, total_memory, uuid = "G", 9, 0, 132, 10**9, "abc"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    found = machine.gpu(torch.device("cuda", 0))
    assert (found["name"], found["architecture"], found["driver"]) == ("G", "sm_90", None)
    monkeypatch.setattr(machine, "_said", lambda command: "580.1, 1980, 1985, 3201, 700.0\n")
    found = machine.gpu(torch.device("cuda", 0))
    assert (found["driver"], found["clock at most, MHz"]) == ("580.1", "1985")


def test_calls_that_ran_before_get_no_untimed_call_and_their_own_rounds():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}

    def clock(call, repeats):
        call()
        return float(repeats)

    times = timing.interleave(calls, {"a": 3, "b": 1}, known={"a": 0.011, "b": 1.0}, clock=clock)
    assert "".join(order) == "abaa"
    assert times == {"a": [2.0] * 3, "b": [1.0]}  # two calls of 11 ms fill a turn of 20
    assert Ceilings(1.0, 1.0, 1.0).as_dict()["exact"] == 1.0
