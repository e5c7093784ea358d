"""The server as a client meets it: what it answers, and whom it refuses."""

import asyncio
import base64
import io
import json
import random
import socket
import time

import numpy as np
import pytest
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.testclient import TestClient

from mamba_attn.commands import explore
from mamba_attn.commands.cli import main
from mamba_attn.core.transform import Transform
from mamba_attn.viewer import guard, server
from mamba_attn.viewer.guard import LARGEST
from mamba_attn.viewer.server import Explorer
from mamba_attn.viewer.serving import bound
from tests.viewer.double import tiny
from tests.viewer.report.cases import stored

HERE = "http://127.0.0.1:8050"


@pytest.fixture(scope="module")
def store():
    return tiny()


@pytest.fixture
def client(store):
    app = Explorer([store])
    with TestClient(app, base_url=HERE) as found:
        yield found
    app.close()


def numbers(text):
    return np.frombuffer(base64.b64decode(text), "<f4")


def maps(client, *queries):
    reply = client.post("/api/maps", json={"queries": list(queries)})
    assert reply.status_code == 200
    return reply.json()


def test_maps_are_lines_of_the_matrices_on_their_grids(client, store):
    row, column, image, every = maps(
        client,
        {"layer": 0, "cells": "7"},
        {"layer": 0, "cells": "3:5", "direction": "column", "route": 2},
        {"layer": 3, "cells": "1", "what": "image", "image": 0},
        {"layer": 1},
    )
    mean = store.mean(store.layers[0])
    np.testing.assert_allclose(numbers(row["map"]), mean[7], rtol=1e-5)
    third = store.mean(store.layers[0], 2)
    np.testing.assert_allclose(numbers(column["map"]), third[:, 3:6].mean(1), rtol=1e-5, atol=1e-9)
    kept = store.matrix(store.layers[3], store.images[0])
    np.testing.assert_allclose(numbers(image["map"]), kept[1], rtol=1e-5)
    np.testing.assert_allclose(numbers(every["map"]), store.mean(store.layers[1]).mean(0), rtol=1e-4, atol=1e-9)


def test_an_image_that_is_not_stored_is_computed_with_its_gate_refused_in_words(client):
    live, gate = maps(client, {"what": "image", "image": 2, "cells": "7"}, {"what": "image", "image": 2, "gate": True})
    assert numbers(live["map"]).shape == (96,)
    assert "have no gate" in gate["error"]
    assert not any(its["gate"] for its in client.post("/api/has", json={}).json()["layers"].values())


def ended(client, job):
    """A job's end; importing scikit-learn takes long on a busy machine."""
    for _ in range(1200):
        now = client.get(f"/api/jobs/{job}").json()
        if now["state"] != "running":
            break
        time.sleep(0.2)
    return now


def test_points_and_a_job_that_computes_them_ahead_or_when_they_are_asked_for(store, monkeypatch):
    monkeypatch.setattr("mamba_attn.viewer.reductions.SLOW", ("tsne",))
    app = Explorer([store])
    with TestClient(app, base_url=HERE) as client:
        found = client.post("/api/points", json={"layer": 2, "mode": "blocks"}).json()
        assert numbers(found["xy"]).shape == (16,)
        app.prepare()
        jobs = {client.post("/api/points", json={"layer": layer, "method": "tsne"}).json()["job"] for layer in (0, 1)}
        assert len(jobs) == 1  # one process computes them all
        now = ended(client, *jobs)
        assert (now["state"], now["what"], now["left"]) == ("done", "t-SNE of 96 patches", 0)
        for layer, count in ((0, 96), (1, 24)):
            reply = client.post("/api/points", json={"layer": layer, "method": "tsne"}).json()
            assert numbers(reply["xy"]).shape == (2 * count,)
        assert "xy" in client.post("/api/points", json={"layer": 2, "mode": "blocks", "method": "tsne"}).json()
        assert app._jobs.ahead(app._scatters[0]) is None  # nothing is left to do
        other = client.post("/api/points", json={"layer": 1, "method": "umap"}).json()["job"]
        assert client.delete(f"/api/jobs/{other}").json()["state"] == "cancelled"
        assert client.get("/api/jobs/9999").status_code == 404
    app.close()


def test_a_job_that_fails_says_why(client, monkeypatch):
    monkeypatch.setattr("mamba_attn.viewer.reductions.FIRST", -5)
    job = client.post("/api/points", json={"direction": "column", "method": "tsne"}).json()["job"]
    now = ended(client, job)
    assert now["state"] == "failed"
    assert "ValueError" in now["error"]


def test_the_points_most_alike_are_those_of_the_nearest_rows(client, store):
    found = client.post("/api/neighbours", json={"layer": 0, "point": 9}).json()["numbers"]
    rows = store.mean(store.layers[0])
    away = np.linalg.norm(rows - rows[9], axis=1)
    assert found == np.argsort(away)[1:7].tolist()
    pairs = client.post("/api/neighbours", json={"layer": 2, "mode": "blocks", "point": 0}).json()["numbers"]
    assert len(pairs) == 6
    assert client.post("/api/neighbours", json={"point": 96}).status_code == 400
    assert client.post("/api/neighbours", json={"point": "0"}).status_code == 400


def test_pictures_and_thumbnails(client, store):
    whole = Image.open(io.BytesIO(client.get("/api/picture?image=1").content))
    assert whole.size == (48, 32)
    np.testing.assert_array_equal(np.asarray(whole), store.pixels(store.images[1]))
    assert client.get("/api/picture?image=1&small=1").headers["content-type"] == "image/jpeg"
    assert client.get("/api/picture?image=4").status_code == 404
    for wrong in ("-1", "x", "1.0", "", "99999999", "\N{SUPERSCRIPT TWO}"):
        assert client.get("/api/picture", params={"image": wrong}).status_code in (400, 404)


def test_a_photo_joins_the_images(store, monkeypatch):
    monkeypatch.setattr(store, "transform", Transform((32, 48)), raising=False)
    monkeypatch.setattr(store, "classes", ["a", "b", "c"], raising=False)
    with TestClient(Explorer([store]), base_url=HERE) as client:
        file = io.BytesIO()
        Image.new("RGB", (90, 70), (200, 30, 30)).save(file, "PNG")
        reply = client.post("/api/photo?name=<b>red.png", content=file.getvalue()).json()
        assert reply["image"] == 4
        assert reply["entry"][0].startswith("<b>red.png")
        assert reply["entry"][2] in "abc"
        (found,) = maps(client, {"what": "image", "image": 4, "cells": "3"})
        assert numbers(found["map"]).shape == (96,)
        shown = Image.open(io.BytesIO(client.get("/api/picture?image=4").content))
        assert shown.size == (90, 60)  # the part that the model sees, in the file's own pixels
        for body in (b"", b"no photo", file.getvalue()[:60]):
            assert "no photo that can be read" in client.post("/api/photo", content=body).json()["error"]
        monkeypatch.setattr(server, "_PIXELS", 100)
        assert "at most 100 pixels, and" in client.post("/api/photo", content=file.getvalue()).json()["error"]
        monkeypatch.setattr(server, "ADDED", 1)
        assert "1 photos have been added" in client.post("/api/photo", content=file.getvalue()).json()["error"]
    assert len(store.images) == 4  # the store itself is as it was


def test_only_names_of_this_machine_are_answered(client):
    for host in ("127.0.0.1:8050", "localhost", "[::1]:8050", "LOCALHOST"[:0] or "127.0.0.2"):
        assert client.get("/", headers={"Host": host}).status_code == 200
    for host in ("evil.example", "evil.example:8050", "127.0.0.1.evil.example", ""):
        assert client.get("/", headers={"Host": host}).status_code == 403
    opened = TestClient(Explorer([tiny(1)], host="0.0.0.0"))
    assert opened.get("/", headers={"Host": "lab.example"}).status_code == 200


def test_other_pages_may_not_ask(client):
    for origin, status in ((HERE, 200), ("http://evil.example", 403), ("null", 403), ("http://127.0.0.1:9", 403)):
        reply = client.post("/api/maps", json={"queries": []}, headers={"Origin": origin})
        assert reply.status_code == status, origin


def test_the_page_may_load_nothing_from_elsewhere_and_stand_in_no_frame(client):
    reply = client.get("/")
    assert "default-src 'none'; script-src 'sha256-" in reply.text
    assert "https://" not in reply.text
    assert "http://" not in reply.text
    assert reply.headers["x-frame-options"] == "DENY"
    assert reply.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path", ["../app.py", "assets/page.css", "store.json", "%2e%2e/etc/passwd", "api/../x", "api", "api/jobs/x"]
)
def test_there_are_no_files(client, path):
    assert client.get(f"/{path}").status_code == 404


def test_floods_and_slow_clients_are_refused(client, monkeypatch):
    assert client.post("/api/maps", content=b"{" + b" " * LARGEST + b"}").status_code == 413
    monkeypatch.setattr(guard, "_PATIENCE", 0.05)

    async def slow():
        await asyncio.sleep(60)

    with pytest.raises(HTTPException, match="too slowly") as refused:
        asyncio.run(guard.body_of(Request({"type": "http"}, slow)))
    assert refused.value.status_code == 408


@pytest.mark.parametrize(
    "body", [b"[]", b"{}", b"null", b"7", b"[" * 200_000, b'{"a":' * 100_000, b"\xff", b"", b'{"queries": 3}', b"NaN"],
    ids=["list", "object", "null", "number", "deep", "deep objects", "no text", "nothing", "no list", "nan"],
)  # fmt: skip
def test_what_is_no_request_of_the_page_is_refused(client, body):
    assert client.post("/api/maps", content=body).status_code == 400
    assert client.post("/api/points", content=body).status_code in (200, 400)


@pytest.mark.parametrize("count", [400, pytest.param(2500, marks=pytest.mark.full)])
def test_mutated_requests_are_never_answered_with_500(client, monkeypatch, count):
    monkeypatch.setattr("mamba_attn.viewer.reductions.Jobs.start", lambda *_: 1)
    chance = random.Random(0)
    good = {
        "store": 0, "layer": 1, "route": 2, "direction": "row", "what": "image", "image": 1, "gate": False,
        "skip": False, "method": "pca", "first": True, "mode": "patches", "cells": "0:2,5", "point": 3,
    }  # fmt: skip
    odd = [None, True, -1, 0, 1, 3, 99, 1e308, -0.5, 10**30, "", "x", "row", "5:1", "0:99999", "-3", "\u0663", [], [1],
           {}, {"a": 1}, "1,,2", "\ud800", "mean", "spread", "blocks", "tsne", "\0"]  # fmt: skip
    seen = set()
    for _ in range(count):
        query = dict(good)
        for name in chance.sample(list(query), chance.randint(1, 4)):
            query[name] = chance.choice(odd)
        path = chance.choice(["maps", "points", "has", "neighbours"])
        text = json.dumps({"queries": [query]} if path == "maps" else query)
        if chance.random() < 0.2:  # and damaged text
            at = chance.randrange(len(text))
            text = (
                text[:at] + chance.choice(["", "\\", '"', "}", "\u2028", "9" * 40]) + text[at + chance.randint(0, 5) :]
            )
        reply = client.post(f"/api/{path}", content=text.encode("utf-8", "surrogatepass"))
        seen.add(reply.status_code)
        assert reply.status_code in (200, 400), (path, text)
    assert seen == {200, 400}


def test_a_port_in_use_is_a_sentence(store, monkeypatch, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with (
            pytest.raises(OSError, match=rf"port={port}: on 127.0.0.1 this port is in use.*port=0"),
            bound(Explorer([store]), "127.0.0.1", port),
        ):
            pass
        monkeypatch.setattr(explore, "_stores", lambda paths: [tiny(1)])
        assert main(["explore", "x", "--port", str(port)]) == 2
        assert "is in use" in capsys.readouterr().err


def test_a_store_without_images_is_a_sentence():
    store = tiny(1)
    store.images = []
    with pytest.raises(ValueError, match="the store has no images to show"):
        Explorer([store])


def test_a_port_is_a_number(capsys):
    with pytest.raises(SystemExit):
        main(["explore", "--port", "70000"])
    assert "a port is a number in 0..65535" in capsys.readouterr().err


def test_the_page_as_a_file(tmp_path, monkeypatch):
    found = stored(tmp_path)
    with TestClient(Explorer([found]), base_url=HERE) as client:
        reply = client.get("/api/file", params={"image": 1, "state": "image=1&x=</script>"})
        assert reply.text.startswith("<!doctype html>")
        assert '"start":"image=1\\u0026x=\\u003c/script\\u003e"' in reply.text
        assert client.get("/api/file?image=99").status_code == 404
        monkeypatch.setattr("mamba_attn.viewer.report.stored.CELLS", 1)
        refused = client.get("/api/file?image=1")
        assert refused.status_code == 409
        assert "grids of more than 1 patches" in refused.text
