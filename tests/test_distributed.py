"""Which process of a launch this is: as the environment of each launcher says."""

import os
import types

import pytest
import torch
from torch.distributed import PrefixStore, TCPStore

from mamba_attn.distributed import Ranks

LAUNCHERS = ("TORCHELASTIC_", "SLURM_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in list(os.environ):
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)


def at(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    found = Ranks.here()
    return found.rank, found.world, found.local_rank, found.local_world, found.launcher


def test_a_process_alone():
    ranks = Ranks.here()
    assert (ranks.rank, ranks.world, ranks.launcher, ranks.first, ranks.together) == (0, 1, "", True, False)
    assert list(ranks.shares("parts", 4)) == [0, 1, 2, 3]
    assert [ranks.count("done", 2), ranks.count("done", 3), ranks.count("done")] == [2, 5, 5]
    assert Ranks().count("done") == 0


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLURM_PROCID": 5, "SLURM_STEP_NUM_TASKS": 8, "SLURM_LOCALID": 1, "SLURM_NODEID": 1,
          "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, (5, 8, 1, 4, "srun")),
        ({"SLURM_PROCID": 4, "SLURM_STEP_NUM_TASKS": 6, "SLURM_LOCALID": 0, "SLURM_NODEID": 1,
          "SLURM_STEP_TASKS_PER_NODE": "4,2"}, (4, 6, 0, 2, "srun")),
        ({"SLURM_PROCID": 0, "SLURM_NTASKS": 8}, (0, 1, 0, 1, "")),  # a batch script, which runs once
        ({"SLURM_PROCID": 0, "SLURM_STEP_NUM_TASKS": 1}, (0, 1, 0, 1, "")),
        ({"SLURM_ARRAY_TASK_ID": 7, "SLURM_ARRAY_TASK_MIN": 3, "SLURM_ARRAY_TASK_COUNT": 5,
          "SLURM_ARRAY_TASK_STEP": 2}, (2, 5, 0, 1, "a job array")),
        ({"SLURM_ARRAY_TASK_ID": 1, "SLURM_ARRAY_TASK_MIN": 0, "SLURM_ARRAY_TASK_COUNT": 2, "SLURM_PROCID": 1,
          "SLURM_STEP_NUM_TASKS": 2, "SLURM_LOCALID": 1, "SLURM_STEP_TASKS_PER_NODE": "2"},
         (3, 4, 1, 2, "a job array")),
    ],
)  # fmt: skip
def test_slurm(monkeypatch, environment, expected):
    assert at(monkeypatch, **environment) == expected


def test_work_is_shared_and_what_is_missing_is_said():
    for world in (1, 3):
        made: set[int] = set()
        left = [
            Ranks(rank, world).work("images", 7, made.add, lambda made=made: 7 - len(made)) for rank in range(world)
        ]
        assert made == set(range(7))
        assert left == ([0] if world == 1 else [4, 2, 0])


def test_work_under_torchrun_ends_where_the_reporting_rank_finds_all(monkeypatch):
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    first, second = (
        Ranks(rank, 2, rank, 2, "torchrun", PrefixStore("run", TCPStore("localhost", server.port, is_master=False)))
        for rank in range(2)
    )
    made, waits = [], []

    def wait():
        waits.append(len(made))
        if len(waits) == 1:
            assert second.work("images", 3, made.append, lambda: 1) == 0  # which reports nothing, and waits for nobody

    monkeypatch.setattr("mamba_attn.distributed.wait", wait)
    monkeypatch.setattr(Ranks, "shares", lambda self, name, count: iter([1, 2] if self is second else [0]))
    looks = iter([1, 0])  # a network's disk shows the last file later
    assert first.work("images", 3, made.append, lambda: next(looks)) == 0
    assert made == [0, 1, 2]
    assert len(waits) == 2


def test_files_that_never_come_end_the_wait(monkeypatch):
    monkeypatch.setattr("mamba_attn.distributed._LATE", 0.0)
    monkeypatch.setattr("mamba_attn.distributed.wait", lambda: None)
    ranks = Ranks(0, 2)
    counters = types.SimpleNamespace(add=lambda name, more: 3)
    object.__setattr__(ranks, "counters", counters)
    monkeypatch.setattr(Ranks, "shares", lambda self, name, count: iter([0]))
    with pytest.raises(OSError, match=r"2 of 3 shares were made by other processes.*a folder that all machines reach"):
        ranks.work("images", 3, lambda number: None, lambda: 2)


def test_shares_without_an_agent_are_every_so_manieth():
    shares = [list(Ranks(rank, 3).shares("parts", 8)) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]


def test_torchrun_draws_from_the_agent_s_counters_and_anew_after_a_restart(monkeypatch):
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {"TORCHELASTIC_RUN_ID": "run", "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": agent.port}  # fmt: skip
    ranks = []
    for rank in range(2):
        named = {**environment, "RANK": rank, "LOCAL_RANK": rank}
        assert at(monkeypatch, **named) == (rank, 2, rank, 2, "torchrun")
        ranks.append(Ranks.here())
    first, second = (each.shares("parts", 5) for each in ranks)
    assert [next(first), next(second), next(second), next(first), next(second)] == [0, 1, 2, 3, 4]
    assert list(first) == list(second) == []
    assert [ranks[0].count("done", 3), ranks[1].count("done", 4), ranks[0].count("done")] == [3, 7, 7]
    assert ranks[1].together
    assert not ranks[1].first
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = Ranks.here()
    assert list(again.shares("parts", 2)) == [0, 1]
    assert again.count("done") == 0


def test_an_agent_that_is_gone_is_a_sentence():
    class Gone:
        def add(self, *_):
            raise torch.distributed.DistNetworkError("Broken pipe")

    ranks = Ranks(1, 2)
    object.__setattr__(ranks, "counters", Gone())
    with pytest.raises(ConnectionError, match="rank 1: the agent of torchrun does not answer; what is counted stays"):
        ranks.count("done", 1)


def test_the_device_and_the_cores_of_a_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [Ranks(rank, 8, rank, 8).device("cuda") for rank in (0, 3, 5)] == ["cuda:0", "cuda:3", "cuda:1"]
    assert Ranks(1, 2, 1, 2).device("cpu") == "cpu"
    assert Ranks().device("cuda") == "cuda"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert Ranks(1, 2, 1, 2).device("cuda") == "cuda"  # which loading refuses
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    assert [Ranks(0, 8, 0, each).cores for each in (1, 3, 8)] == [16, 5, 2]
    assert Ranks(0, 32, 0, 32).cores == 1


def test_variables_that_are_no_ranks(monkeypatch):
    with pytest.raises(ValueError, match=r"SLURM_ARRAY_TASK_ID='x': the launcher's variable should be a number"):
        at(monkeypatch, SLURM_ARRAY_TASK_ID="x")
    with pytest.raises(ValueError, match=r"Ranks\(rank=2, world=2, .*expected ranks from 0 on"):
        Ranks(2, 2)
