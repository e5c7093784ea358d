import hashlib
import http.server
import threading

import pytest
import torch

import mamba_attn.models
from mamba_attn.errors import WeightsError
from mamba_attn.models import official
from mamba_attn.models.official import Published
from mamba_attn.models.vim import VisionMamba

CONTENT = bytes(range(256)) * 40
LENGTH = len(CONTENT)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        name = self.path.rsplit("/", 1)[-1]
        if name not in self.server.files:
            return self.send_error(404)
        content, announced = self.server.files[name]
        self.send_response(200)
        if announced:
            self.send_header("Content-Length", str(announced))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("MAMBA_ATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.asked = {}, []
        server.url = f"http://127.0.0.1:{server.server_port}/folder"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def publish(server, monkeypatch, content=CONTENT, announced=LENGTH, **known):
    server.files["tiny.pth"] = content, announced
    monkeypatch.setitem(official.PUBLISHED, "vim_tiny", Published(server.url, "tiny.pth", **known))


def kept(tmp_path):
    return [path.name for path in (tmp_path / "cache").iterdir()]


@pytest.mark.parametrize("known", [{}, {"size": LENGTH}, {"size": LENGTH, "sha256": SHA256}])
def test_download_once(server, monkeypatch, tmp_path, known):
    publish(server, monkeypatch, **known)
    path = official.fetch("vim_tiny")
    assert path == tmp_path / "cache" / "tiny.pth"
    assert path.read_bytes() == CONTENT
    assert official.fetch("vim_tiny") == path
    assert server.asked == ["/folder/tiny.pth"]
    assert kept(tmp_path) == ["tiny.pth"]


def test_a_server_that_announces_no_size(server, monkeypatch):
    publish(server, monkeypatch, announced=None)
    assert official.fetch("vim_tiny").read_bytes() == CONTENT


def test_a_mirror(server, monkeypatch):
    server.files["vim_s_midclstok_80p5acc.pth"] = CONTENT, LENGTH
    assert official.fetch("vim_small", base_url=f"{server.url}/mirror/").read_bytes() == CONTENT
    assert server.asked == ["/folder/mirror/vim_s_midclstok_80p5acc.pth"]


def test_a_kept_file_of_the_wrong_size_is_fetched_again(server, monkeypatch, tmp_path):
    publish(server, monkeypatch, size=LENGTH)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "tiny.pth").write_bytes(b"short")
    assert official.fetch("vim_tiny").read_bytes() == CONTENT


@pytest.mark.parametrize("announced", [LENGTH, None])
def test_truncated(server, monkeypatch, tmp_path, announced):
    publish(server, monkeypatch, content=CONTENT[:100], announced=announced, size=LENGTH)
    with pytest.raises(
        WeightsError, match=r"tiny\.pth (sent 100 of 10,240 bytes; nothing was kept|could not be fetched)"
    ):
        official.fetch("vim_tiny")
    assert kept(tmp_path) == []


def test_wrong_hash(server, monkeypatch, tmp_path):
    publish(server, monkeypatch, sha256="0" * 64)
    with pytest.raises(WeightsError, match=rf"has the SHA-256 {SHA256}, expected 0{{64}}; nothing was kept"):
        official.fetch("vim_tiny")
    assert kept(tmp_path) == []


def test_not_found(server, monkeypatch, tmp_path):
    publish(server, monkeypatch)
    server.files.clear()
    with pytest.raises(
        WeightsError, match=r"tiny\.pth answered 404 Not Found. Where there is a network, download tiny"
    ):
        official.fetch("vim_tiny")
    assert kept(tmp_path) == []


def test_no_connection(server, monkeypatch, tmp_path):
    publish(server, monkeypatch)
    closed = "http://127.0.0.1:9"  # the discard port: nobody listens
    with pytest.raises(WeightsError, match=r"tiny\.pth could not be fetched \(.*\). .* give its path as weights="):
        official.fetch("vim_tiny", base_url=closed)
    assert kept(tmp_path) == []


def test_unknown_name():
    with pytest.raises(
        WeightsError, match=r"fetch\('vim_tinny'\): there are no published weights .* Did you mean 'vim_tiny"
    ):
        official.fetch("vim_tinny")


def test_create_with_official_weights(server, monkeypatch, tmp_path):
    options = {"embed_dim": 16, "depth": 1, "num_classes": 3}
    model = VisionMamba(**options)
    torch.save({"model": model.state_dict()}, tmp_path / "tiny.pth")
    content = (tmp_path / "tiny.pth").read_bytes()
    publish(server, monkeypatch, content=content, announced=len(content))
    loaded = mamba_attn.models.create("vim_tiny", weights="official", **options)
    assert torch.equal(loaded.head.weight, model.head.weight)


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("MAMBA_ATTN_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert official.cache_folder() == tmp_path / ".cache" / "mamba_attn"


def test_published_names_are_models():
    ours = {name for name in mamba_attn.models.names() if name.endswith(("_micro", "_digits"))}
    assert set(official.PUBLISHED) == set(mamba_attn.models.names()) - ours
    files = [published.file for published in official.PUBLISHED.values()]
    assert len(set(files)) == len(files)
    assert official.PUBLISHED["vmamba_tiny_s1l8"].folder.endswith("/VMamba/releases/download/%23v2cls")
    assert official.PUBLISHED["vim_tiny"].folder.endswith("/hustvl/Vim-tiny-midclstok/resolve/main")
