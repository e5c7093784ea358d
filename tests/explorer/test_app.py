import socket

import pytest

from mamba_attn.cli import main
from mamba_attn.explorer import command
from mamba_attn.explorer.app import LARGEST, build
from mamba_attn.explorer.serving import bound
from tests.explorer.double import tiny


@pytest.fixture(scope="module")
def app():
    return build([tiny(1)])


def test_only_names_of_this_machine_are_answered(app):
    client = app.server.test_client()
    for host in ("127.0.0.1:8050", "localhost", "[::1]:8050"):
        assert client.get("/", headers={"Host": host}).status_code == 200
    for host in ("evil.example", "evil.example:8050", "127.0.0.1.evil.example"):
        assert client.get("/", headers={"Host": host}).status_code == 403
    opened = build([tiny(1)], host="0.0.0.0")
    assert opened.server.test_client().get("/", headers={"Host": "lab.example"}).status_code == 200


def test_pages_may_load_nothing_from_elsewhere(app):
    reply = app.server.test_client().get("/")
    policy = reply.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    assert "https://" not in reply.get_data(as_text=True)


def test_files_beside_the_assets_are_not_served_and_floods_are_refused(app):
    client = app.server.test_client()
    for path in ("/assets/../app.py", "/assets/%2e%2e/app.py", "/../../etc/passwd", "/store.json"):
        assert b"import" not in client.get(path).data
    flood = client.post("/_dash-update-component", data=b"{" + b" " * LARGEST + b"}", content_type="application/json")
    assert flood.status_code == 413


def test_no_debugger_runs(app):
    assert not app.server.debug
    assert app.server.test_client().get("/?__debugger__=yes&cmd=resource&f=debugger.js").mimetype == "text/html"


def test_a_port_in_use_is_a_sentence(app, monkeypatch, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with (
            pytest.raises(OSError, match=rf"port {port} of 127.0.0.1 is in use.*--port 0"),
            bound(app, "127.0.0.1", port),
        ):
            pass
        monkeypatch.setattr(command, "_stores", lambda paths: [tiny(1)])
        assert main(["explore", "x", "--port", str(port)]) == 2
        assert "is in use" in capsys.readouterr().err


def test_a_store_without_images_is_a_sentence():
    store = tiny(1)
    store.images = []
    with pytest.raises(ValueError, match="a store without images has nothing to show"):
        build([store])


def test_a_port_is_a_number(capsys):
    with pytest.raises(SystemExit):
        main(["explore", "--port", "70000"])
    assert "a port is a number in 0..65535" in capsys.readouterr().err
