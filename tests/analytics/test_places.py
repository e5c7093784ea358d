"""A store in object storage is the same store; addresses that nothing writes to are refused."""

import contextlib
import os
import pickle
import socket
import subprocess
import sys
import time
import urllib.request
import uuid

import pytest

from mamba_attn.analytics import AttentionStore, collect, merge_stores
from mamba_attn.analytics.places import LocalPlace, place
from mamba_attn.commands import cli
from mamba_attn.errors import StoreError
from tests.analytics import cases
from tests.analytics.cases import content, same
from tests.analytics.test_parts import PARTS
from tests.explanations.cases import VIM, save


@pytest.fixture(params=["folder", "memory"])
def where(request, tmp_path):
    pytest.importorskip("fsspec")
    name = str(tmp_path / "store") if request.param == "folder" else f"memory://{uuid.uuid4().hex}/store"
    return place("out", name)


def test_objects_are_created_once_and_replaced_whole(where):
    assert where.names() == []
    assert not where.exists("parts/1.json")
    assert where.create("parts/1.json", b"first")
    assert not where.create("parts/1.json", b"second")
    assert where.read("parts/1.json") == b"first"
    where.replace("parts/1.json", b"third, longer")
    assert (where.read("parts/1.json"), where.size("parts/1.json")) == (b"third, longer", 13)
    assert where.names("parts") == ["1.json"]  # and nothing temporary
    assert where.exists("parts")
    assert where.name == "store"
    with pytest.raises(FileNotFoundError):
        where.read("parts/2.json")
    where.remove("parts/2.json")
    where.remove("parts")
    assert where.names() == []


def test_what_is_being_written_has_no_name_yet(tmp_path, monkeypatch):
    where, seen, real = LocalPlace(tmp_path), [], os.link

    def watched(source, target):
        seen.append((os.listdir(tmp_path / "parts"), where.names("parts")))
        real(source, target)

    monkeypatch.setattr(os, "link", watched)
    where.create("parts/1.json", b"first")
    (((half,), names),) = seen
    assert half.startswith("1.json.")
    assert names == []
    assert where.names("parts") == ["1.json"]


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refused)
    where = LocalPlace(tmp_path)
    assert [where.create("one", b"first"), where.create("one", b"second")] == [True, False]
    assert (where.read("one"), where.names()) == (b"first", ["one"])


def test_nothing_needs_locks(tmp_path, monkeypatch):
    """A file system without flock, as Lustre can be."""
    fcntl = pytest.importorskip("fcntl")

    def refused(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refused)
    monkeypatch.setattr(fcntl, "lockf", refused)
    assert collect(cases.request(cases.folder_of(tmp_path, 1), **PARTS), tmp_path / "store").counted == 3


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("s4://bucket/store", r"out='s4://bucket/store': nothing here writes to s4:// addresses\. Did you mean"),
        ("http://host/store", "nothing here writes to http:// addresses"),
        ("memory://", "expected a name behind memory://"),
        ("", "expected a path, and this is empty"),
    ],
)
def test_addresses_that_are_refused(tmp_path, monkeypatch, capsys, address, sentence):
    pytest.importorskip("fsspec")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        place("out", address)
    assert cli.main(["collect", "--data", "absent", "--out", address]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_missing_is_named(monkeypatch):
    fsspec = pytest.importorskip("fsspec")

    def missing(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ImportError, match=r"out='s3://bucket/store' needs s3fs: pip install s3fs"):
        place("out", "s3://bucket/store")


def test_a_store_in_memory_is_that_of_a_folder(tmp_path):
    pytest.importorskip("fsspec")
    selector = cases.folder_of(tmp_path, 3)
    address = f"memory://{uuid.uuid4().hex}/store"
    collect(cases.request(selector, **PARTS), tmp_path / "store")
    assert collect(cases.request(selector, **PARTS), address).counted == 9
    assert same(content(address), content(tmp_path / "store"))
    assert str(AttentionStore.open(address).folder) == address
    assert collect(cases.request(selector, **PARTS), address).new == 0
    assert str(pickle.loads(pickle.dumps(place("out", address)))) == address
    assert merge_stores([address], tmp_path / "copied") == 9
    assert same(content(tmp_path / "copied"), content(address))


@pytest.fixture(scope="module")
def bucket():
    """A bucket of a server of S3 on this machine."""
    pytest.importorskip("moto.server", reason="moto is not installed: pip install 'moto[server]'")
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install s3fs")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stderr=subprocess.DEVNULL)
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}  # fmt: skip
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in keys.items():
                patch.setenv(name, value)
            deadline = time.monotonic() + 200
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(keys["AWS_ENDPOINT_URL"]).close()
                    break
                assert time.monotonic() < deadline, "moto's server did not start"
                time.sleep(0.1)
            import s3fs

            s3fs.S3FileSystem().mkdir("bucket")
            yield "s3://bucket"
    finally:
        server.kill()
        server.wait()


@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # of the server's and the client's libraries
def test_s3(bucket, tmp_path, capsys):
    """The command, the same bits as in a folder, and what reads stores."""
    selector = cases.folder_of(tmp_path, 3)
    weights = save(tmp_path / "weights", "vim_micro", VIM, cases.CLASSES)
    common = ["collect", "--model", "vim_micro", "--weights", weights, "--data", selector, "--batch", "2", "--part",
              "4", "--keep", "1"]  # fmt: skip
    assert cli.main([*common, "--out", str(tmp_path / "store")]) == 0
    assert cli.main([*common, "--out", f"{bucket}/store"]) == 0
    assert f"9 images added, 9 in {bucket}/store; next: mamba-attn explore {bucket}/store" in capsys.readouterr().out
    assert same(content(f"{bucket}/store"), content(tmp_path / "store"))
    assert not (tmp_path / "s3:").exists()
    assert cli.main([*common, "--out", f"{bucket}/store"]) == 0
    assert "0 images added, 9 in" in capsys.readouterr().out
    where = place("out", f"{bucket}/store")
    assert not where.create("parts/000000.json", b"second")
    assert cli.main(["report", f"{bucket}/store", "--out", str(tmp_path / "report.html")]) == 0
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert cli.main(["findings", f"{bucket}/store", "--out", str(tmp_path / "findings"), "--seeds", "0"]) == 0
    with pytest.raises(StoreError, match="is not a store of mamba-attn collect"):
        AttentionStore.open(f"{bucket}/nothing")
