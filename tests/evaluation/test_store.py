"""Lines on the disk: what survives a kill, and that nothing is counted twice."""

import json

import pytest

from mamba_attn.evaluation.store import Key, Store


def key(image="a", measure="perturbation"):
    return Key("data", image, "model:hash", "method", measure, "{}")


def test_what_is_written_is_found_again(tmp_path):
    store = Store(tmp_path / "s.jsonl")
    assert key() not in store
    store.add([(key(), {"value": 1.5}), (key("b"), {"value": None})])
    again = Store(tmp_path / "s.jsonl")
    assert again.get(key()) == {"value": 1.5}
    assert key("b") in again
    assert key(measure="cost") not in again
    assert (len(again), again.damaged) == (2, 0)


def test_a_line_cut_by_a_kill_is_left_out_and_measured_again(tmp_path):
    path = tmp_path / "s.jsonl"
    Store(path).add([(key("a"), {"value": 1}), (key("b"), {"value": 2})])
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines()[1])):
        path.write_bytes(whole[:-cut])
        store = Store(path)
        assert key("a") in store
        store.add([(key("b"), {"value": 2}), (key("c"), {"value": 3})])
        again = Store(path)
        assert [again.get(key(name)) for name in "abc"] == [{"value": 1}, {"value": 2}, {"value": 3}]
        assert again.damaged == 0
        assert len(path.read_text().splitlines()) == 3


def test_nothing_is_counted_twice_and_errors_are_tried_again(tmp_path):
    path = tmp_path / "s.jsonl"
    store = Store(path)
    store.add([(key(), {"error": "no memory"})])
    assert key() not in store
    assert Store(path).get(key()) == {"error": "no memory"}
    store.add([(key(), {"value": 1})])
    store.add([(key(), {"value": 2})])
    again = Store(path)
    assert again.get(key()) == {"value": 1}
    assert len(again) == 1


@pytest.mark.parametrize("line", [b"garbage", b"[1, 2]", b'{"key": ["a"]}', b"\xff\xfe", b"{}", b'{"key": 3}'])
def test_damaged_lines_are_counted(tmp_path, line):
    path = tmp_path / "s.jsonl"
    Store(path).add([(key(), {"value": 1})])
    path.write_bytes(line + b"\n" + path.read_bytes())
    store = Store(path)
    assert key() in store
    assert (store.damaged, len(store)) == (1, 1)


def test_lines_of_another_protocol_do_not_count(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps({"protocol": 0, "key": key(), "value": 1}) + "\n")
    store = Store(path)
    assert key() not in store
    assert store.damaged == 0
