"""Heartbeats, learned limits, and which rank counts as hung."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from mmscale.cluster.watch import Hang, all_beats, find_hang, is_halted, worst_of
from mmscale.config.env import AgentLink
from mmscale.config.schema import WatchConfig
from mmscale.train.heartbeat import (
    PHASES,
    RECORD_BYTES,
    Beat,
    Heartbeat,
    Limits,
    beat_path,
    clear_beats,
    parse_beat,
    read_beat,
)

WATCH = WatchConfig(hang_floor_s=3.0, hang_factor=10.0, setup_limit_s=60.0)


@pytest.fixture
def beat(tmp_path):
    with Heartbeat(tmp_path, 3, WATCH) as heartbeat:
        yield heartbeat


def test_nothing_is_written_before_the_directory_is_ours(tmp_path, beat) -> None:
    beat.phase("data", 1)
    assert list(tmp_path.iterdir()) == []
    beat.publish()
    found = read_beat(beat_path(tmp_path, 3))
    assert found is not None
    assert (found.rank, found.pid, found.step, found.phase) == (3, os.getpid(), 1, "data")
    assert abs(found.at - time.time()) < 5


def test_the_agent_sees_a_rank_whose_run_directory_cannot_be_written(disk) -> None:
    memory = os.memfd_create("beats")
    with Heartbeat(disk.path, 3, WATCH, AgentLink(1, 0, memory)) as heartbeat:
        disk.remount("ro")
        heartbeat.publish()
        heartbeat.phase("save", 7)
        heartbeat.phase("data", 8)
        found = parse_beat(os.pread(memory, RECORD_BYTES, 0))
        assert found is not None and (found.rank, found.step, found.phase) == (3, 8, "data")
        disk.remount("rw")
        heartbeat.publish()
    assert read_beat(beat_path(disk.path, 3)) == found
    os.close(memory)


def test_the_record_is_rewritten_in_place_and_of_one_length(tmp_path, beat) -> None:
    beat.publish()
    path = beat_path(tmp_path, 3)
    inode = path.stat().st_ino
    for step, phase in ((1, "data"), (123456789, "step"), (2, "save")):
        beat.phase(phase, step)
        content = path.read_bytes()
        assert len(content) == RECORD_BYTES and content.endswith(b"\n")
        assert json.loads(content)["step"] == step
    assert path.stat().st_ino == inode


def test_a_record_that_is_half_there_or_of_another_kind_is_none(tmp_path) -> None:
    path = tmp_path / "rank_00000.json"
    assert read_beat(path) is None
    whole = '{"rank": 0, "pid": 1, "host": "n", "step": 1, "phase": "data", "at": 1.0, "limit_s": 1.0}'
    for text in ("", whole[:30], "[]", '{"rank": 0}', whole.replace("data", "dance")):
        path.write_text(text)
        assert read_beat(path) is None, text
    path.write_text(whole.ljust(RECORD_BYTES))
    assert read_beat(path) == Beat(0, 1, "n", 1, "data", 1.0, 1.0)


def test_a_new_attempt_takes_the_heartbeats_of_the_old_one_away(tmp_path, beat) -> None:
    beat.publish()
    clear_beats(tmp_path)
    beat.phase("step", 5)  # the old attempt writes on, where no one reads it
    assert all_beats(tmp_path, 4) == []
    with Heartbeat(tmp_path, 3, WATCH) as new:
        new.publish()
        beat.phase("step", 6)
        assert [found.step for found in all_beats(tmp_path, 4)] == [0]


def test_limits_are_learned_and_start_anew_after_a_start_up() -> None:
    limits = Limits(WATCH)
    assert {limits.limit_s(phase) for phase in PHASES} == {60.0}
    limits.learn("step", 0.1)
    assert limits.limit_s("step") == 3.0
    limits.learn("step", 2.0)
    limits.learn("step", 0.5)
    assert limits.limit_s("step") == 20.0
    assert limits.limit_s("eval") == 60.0, "the first validation has the time of a start-up"
    limits.learn("save", 0.1)
    assert limits.limit_s("save") == 9.0, "a save waits for a disk that others use too"
    limits.learn("save", 5.0)
    assert limits.limit_s("save") == 50.0
    limits.learn("setup", 1.0)
    assert {limits.limit_s(phase) for phase in PHASES} == {60.0}, "after a rollback nothing is known"


def test_a_slow_first_step_and_a_rollback_raise_no_alarm(tmp_path, beat, monkeypatch) -> None:
    """The limits that the file shows along a run: the clock is the test's."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    shown = []

    def go(phase: str, step: int, seconds: float) -> None:
        beat.phase(phase, step)
        found = read_beat(beat_path(tmp_path, 3))
        assert found is not None
        shown.append((phase, found.limit_s))
        assert seconds < found.limit_s
        now[0] += seconds

    beat.publish()
    for phase, step, seconds in (
        ("setup", 0, 50.0), ("data", 1, 40.0), ("step", 1, 55.0), ("save", 1, 0.1), ("data", 2, 0.1), ("step", 2, 2.0), ("save", 2, 8.0),
        ("setup", 0, 50.0), ("data", 2, 40.0), ("step", 2, 55.0),
    ):  # fmt: skip
        go(phase, step, seconds)
    assert ("step", 550.0) in shown and shown[-1] == ("step", 60.0)


def test_a_beat_is_cheap(tmp_path, beat) -> None:
    """20 us each; the best of many rounds, as the machine has other work."""
    beat.publish()
    beat.phase("data", 1)
    beat.phase("step", 1)
    rounds = []
    for step in range(200):
        started = time.perf_counter()
        for _ in range(10):
            beat.phase("data", step)
            beat.phase("step", step)
        rounds.append((time.perf_counter() - started) / 20)
    print(f"a beat takes {min(rounds) * 1e6:.1f} us")
    assert min(rounds) < 20e-6


def test_a_rank_without_agent_ends_itself_with_its_stacks(tmp_path) -> None:
    code = f"""
import mmscale.train.heartbeat as heartbeat, time
from pathlib import Path
from mmscale.config.env import AgentLink
from mmscale.config.schema import WatchConfig
heartbeat.SELF_ABORT_DELAY_S = 0.2
def stuck_here():
    time.sleep(60)
with heartbeat.Heartbeat(Path({str(tmp_path)!r}), 0, WatchConfig(hang_floor_s=0.1, setup_limit_s=0.3)) as beat:
    beat.phase("data", 1)
    stuck_here()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 1
    assert "in stuck_here" in done.stderr


def at(rank: int, step: int, phase: str, ago_s: float, limit_s: float = 10.0, halted: bool = False) -> Hang:
    return Hang(Beat(rank, 1, "n", step, phase, time.time() - ago_s, limit_s), halted)


def test_the_slowest_rank_is_the_one_that_the_others_wait_for() -> None:
    cases = {
        "fewest steps": [at(0, 8, "data", 50), at(1, 7, "save", 1)],
        "first phase": [at(0, 7, "step", 50), at(1, 7, "data", 1)],
        "last to arrive": [at(0, 7, "step", 50), at(1, 7, "step", 49)],
        "stopped, wherever it is": [at(0, 7, "data", 50), at(1, 7, "step", 1, halted=True)],
    }
    assert {name: worst_of(ranks).beat.rank for name, ranks in cases.items()} == dict.fromkeys(cases, 1)


def test_a_rank_that_waits_for_one_within_its_limit_is_not_hung(tmp_path) -> None:
    """Rank 0 of this node is overdue; it waits for rank 1 of another node, whose first save may take longer."""
    own = [at(0, 7, "step", ago_s=20)]
    assert find_hang([replace(own[0], beat=replace(own[0].beat, limit_s=30.0))], tmp_path, 2) is None
    alone = find_hang(own, tmp_path, 2)
    assert alone is not None and alone.beat.rank == 0

    def write(beat: Beat) -> None:
        beat_path(tmp_path, 1).parent.mkdir(exist_ok=True)
        text = {name: getattr(beat, name) for name in Beat.__slots__}
        beat_path(tmp_path, 1).write_text(json.dumps(text))

    write(at(1, 6, "save", ago_s=22, limit_s=60).beat)
    assert find_hang(own, tmp_path, 2) is None
    write(at(1, 6, "save", ago_s=22, limit_s=21).beat)
    hung = find_hang(own, tmp_path, 2)
    assert hung is not None and (hung.beat.rank, hung.beat.phase) == (1, "save")


def test_a_hang_survives_its_file() -> None:
    hang, now = at(4, 7, "eval", 12.5, halted=True), time.time()
    record = hang.to_dict(now)
    assert set(record) == {"at", "limit_s", "phase", "step", "slowest"}
    back = Hang.from_dict(json.loads(json.dumps(record)))
    assert back.is_halted and abs(back.beat.at - hang.beat.at) < 0.1
    assert replace(back.beat, at=0.0, pid=1) == replace(hang.beat, at=0.0)


def test_a_stopped_process_is_seen() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"])
    try:
        assert os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT) is not None
        assert is_halted(process.pid)
        assert not is_halted(os.getpid())
    finally:
        process.kill()
        process.wait()
    assert not is_halted(process.pid)
