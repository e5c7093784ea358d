import socket

import pytest

from mamba_attn.commands import explore
from mamba_attn.commands.cli import main
from mamba_attn.viewer.app import build
from mamba_attn.viewer.guard import LARGEST
from mamba_attn.viewer.serving import bound
from tests.viewer.double import tiny


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


@pytest.mark.parametrize(
    "body", [b"[]", b"{}", b"null", b"7", b"[" * 200_000, b'{"a":' * 100_000, b"\xff", b"", b'{"output": "x.y"}'],
    ids=["list", "object", "null", "number", "deep", "deep objects", "no text", "nothing", "no callback"],
)  # fmt: skip
def test_what_is_no_call_of_the_page_is_refused(app, body):
    client = app.server.test_client()
    assert client.post("/_dash-update-component", data=body, content_type="application/json").status_code == 400


def test_calls_of_the_page_with_wrong_parts_are_refused(app):
    client = app.server.test_client()
    opening = next(name for name in app.callback_map if "message.children" in name and "page.children" in name)
    part = {"id": "address", "property": "search", "value": ""}
    outputs = [
        {"id": name.partition(".")[0], "property": name.partition(".")[2]} for name in opening[2:-2].split("...")
    ]
    good = {"output": opening, "outputs": outputs, "inputs": [part], "changedPropIds": ["address.search"]}
    assert client.post("/_dash-update-component", json=good).status_code == 200
    wrong = [{"inputs": []}, {"inputs": 3}, {"inputs": [None]}, {"inputs": [[[part]]]}, {"inputs": [{"id": 3}]},
             {"outputs": None}, {"outputs": [1]}, {"state": [part]}, {"changedPropIds": 5}]  # fmt: skip
    for each in wrong:
        assert client.post("/_dash-update-component", json={**good, **each}).status_code == 400, each


@pytest.mark.parametrize(
    "path",
    ["../../etc/passwd", "dash/../../x", "dash/%2e%2e/__init__.py", "os/../x.js", "os/x.js", "dash/none.js"],
)
def test_odd_paths_are_not_found(app, path):
    assert app.server.test_client().get(f"/_dash-component-suites/{path}").status_code == 404


def test_no_debugger_runs(app):
    assert not app.server.debug
    assert app.server.test_client().get("/?__debugger__=yes&cmd=resource&f=debugger.js").mimetype == "text/html"


def test_a_port_in_use_is_a_sentence(app, monkeypatch, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with (
            pytest.raises(OSError, match=rf"port={port}: on 127.0.0.1 this port is in use.*port=0"),
            bound(app, "127.0.0.1", port),
        ):
            pass
        monkeypatch.setattr(explore, "_stores", lambda paths: [tiny(1)])
        assert main(["explore", "x", "--port", str(port)]) == 2
        assert "is in use" in capsys.readouterr().err


def test_a_store_without_images_is_a_sentence():
    store = tiny(1)
    store.images = []
    with pytest.raises(ValueError, match="the store has no images to show"):
        build([store])


def test_a_port_is_a_number(capsys):
    with pytest.raises(SystemExit):
        main(["explore", "--port", "70000"])
    assert "a port is a number in 0..65535" in capsys.readouterr().err
