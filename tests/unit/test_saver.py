"""Checkpoints of a running trainer: in the background, fenced, and in spite of a disk that refuses."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmscale.config.env import JobLimits, Launch
from mmscale.config.schema import Config, ParallelConfig
from mmscale.errors import CheckpointError, FencedError, SaveError
from mmscale.parallel.layout import Chunk
from mmscale.parallel.mesh import init_mesh
from mmscale.train import loop
from mmscale.train import saver as saver_module
from mmscale.train.attempt import Attempt
from mmscale.train.checkpoint import find_checkpoint, newest_checkpoint, verify_checkpoint
from mmscale.train.checkpoint_writer import Snapshot
from mmscale.train.deadline import Deadline
from mmscale.train.metrics import Reporter
from mmscale.train.saver import Saver

MESH = init_mesh(ParallelConfig(), "cpu", Launch())
MB = 1 << 20


class Weights:
    """An engine as far as a save looks at it: some tensors that `step` changes in place."""

    def __init__(self, num_bytes: int = 4000, num_tensors: int = 5) -> None:
        self.tensors = {f"model.{i}": torch.zeros(num_bytes // 4 // num_tensors) for i in range(num_tensors)}

    @property
    def state_names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def state_views(self) -> Iterator[tuple[str, Chunk]]:
        for name, value in self.tensors.items():
            yield name, Chunk(value, (0,), value.shape)

    def step(self, number: int) -> None:
        for value in self.tensors.values():
            value.fill_(number)


class Trainer:
    """What the training loop does with a saver, on a run directory of its own attempt."""

    def __init__(self, run: Path, build, weights: Weights | None = None, token: str = "7.0", **train) -> None:
        config: Config = build(train={"steps": 100, "save_every": 4, "keep_last": 2, **train})
        config = config.model_copy(
            update={"run": config.run.model_copy(update={"dir": str(run), "tensorboard": False})}
        )
        self.run, self.attempt, self.weights = run, Attempt(run, token), weights or Weights()
        self.attempt.claim()
        reader = find_checkpoint(run / "checkpoints", MESH, self.attempt)
        self.base = 0 if reader is None else reader.step
        self.attempt.started(self.base, 1)
        self.reporter = Reporter(config, True, self.base + 1, token)
        self.deadline = Deadline(JobLimits(lead_s=300.0, kill_wait_s=30.0))
        self.saver = Saver(
            run / "checkpoints", self.weights, MESH, config.train, self.attempt, self.reporter, self.deadline, self.base
        )  # type: ignore[arg-type]

    def train(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            if self.attempt.is_fenced():
                raise self.attempt.fence_error()
            if self.saver.is_written:
                self.saver.settle()
            self.weights.step(step)
            if self.saver.is_due(step):
                self.saver.start(step, {"at": step})

    def hold_thread(self) -> threading.Event:
        """What the background thread is given from now on waits until the event is set."""
        go = threading.Event()
        self.saver._writer._thread.submit(go.wait, 60)
        return go

    def written(self) -> None:
        limit = time.monotonic() + 60
        while not self.saver.is_written:
            assert time.monotonic() < limit, "nothing was written"
            os.sched_yield()

    def events(self, name: str) -> list[dict]:
        rows = [json.loads(line) for line in (self.run / "events.jsonl").read_text().splitlines()]
        return [row for row in rows if row["event"] == name]

    def close(self) -> None:
        self.saver.abandon()
        self.reporter.__exit__(None, None, None)


def folders(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())


def values(run: Path, step: int) -> set[float]:
    reader = newest_checkpoint(run / "checkpoints")
    assert reader.step == step and reader.trainer == {"at": step}
    return {float(number) for name in reader.names for number in reader.read(name).unique()}


@pytest.mark.parametrize("async_save", [True, False])
def test_training_goes_on_while_the_copy_is_written(tmp_path, tiny_config, async_save) -> None:
    trainer = Trainer(tmp_path / "run", tiny_config, async_save=async_save)
    trainer.train(1, 11)
    trainer.saver.finish()
    assert trainer.saver.saved == 8 and values(trainer.run, 8) == {8.0}
    assert folders(trainer.run) == ["step_00000004", "step_00000008"]
    events = trainer.events("save")
    assert [event["step"] for event in events] == [4, 8]
    on_disk = sum(path.stat().st_size for path in (trainer.run / "checkpoints/step_00000008").iterdir())
    manifest = (trainer.run / "checkpoints/step_00000008/manifest.json").stat().st_size
    assert events[1]["bytes"] == on_disk - manifest
    assert all(event["blocked_s"] > 0 and event["write_s"] > 0 for event in events)
    assert trainer.deadline.needed_s > 0
    trainer.close()


def held_save(run: Path, build) -> set[float]:
    """What a checkpoint of step 4 holds when the writing begins only after step 7."""
    trainer = Trainer(run, build)
    go = trainer.hold_thread()
    trainer.train(1, 7)
    assert not trainer.saver.is_written and trainer.saver.saved == 0
    go.set()
    trainer.saver.finish()
    trainer.close()
    return values(run, 4)


def test_a_background_save_does_not_see_later_steps(tmp_path, tiny_config, monkeypatch) -> None:
    assert held_save(tmp_path / "run", tiny_config) == {4.0}
    # the negative control: without the copy it would
    monkeypatch.setattr("mmscale.train.checkpoint_writer._copy", lambda value, buffer: value)
    assert held_save(tmp_path / "other", tiny_config) == {7.0}


def test_background_and_foreground_saves_are_equal_to_the_byte(tmp_path, tiny_config) -> None:
    files = []
    for async_save in (True, False):
        run = tmp_path / str(async_save)
        trainer = Trainer(run, tiny_config, async_save=async_save)
        trainer.train(1, 6)
        trainer.saver.finish()
        trainer.close()
        files.append({p.name: p.read_bytes() for p in (run / "checkpoints/step_00000004").iterdir()})
    assert files[0].keys() == files[1].keys() and "__0_0.distcp" in files[0]
    for name in files[0].keys() - {".metadata", "manifest.json"}:  # .metadata has a random id
        assert files[0][name] == files[1][name], name


def test_host_memory_is_reused(tmp_path) -> None:
    weights, snapshot = Weights(), Snapshot()
    snapshot.take(weights.state_views())
    places = {index: value.data_ptr() for index, value in snapshot._values.items()}
    weights.step(3)
    snapshot.take(weights.state_views())
    assert places == {index: value.data_ptr() for index, value in snapshot._values.items()} and len(places) == 5
    assert all((value == 3).all() for value in snapshot._values.values())


def test_a_save_that_is_still_written_is_finished_before_the_next(tmp_path, tiny_config) -> None:
    trainer = Trainer(tmp_path / "run", tiny_config)
    go = trainer.hold_thread()
    trainer.train(1, 7)
    threading.Timer(0.2, go.set).start()
    trainer.train(8, 8)  # waits for the one of step 4
    assert trainer.saver.saved == 4 and trainer.events("save")[0]["blocked_s"] > 0.05
    trainer.saver.finish()
    assert values(trainer.run, 8) == {8.0}
    trainer.close()


def test_all_the_time_that_training_is_held_is_on_record(tmp_path, tiny_config) -> None:
    class Slow(Weights):
        def state_views(self) -> Iterator[tuple[str, Chunk]]:
            limit = time.monotonic() + 0.2
            while time.monotonic() < limit:
                os.sched_yield()
            yield from super().state_views()

    trainer = Trainer(tmp_path / "run", tiny_config, Slow())
    trainer.train(1, 4)
    trainer.written()
    limit = time.monotonic() + 0.4  # of training, not held
    while time.monotonic() < limit:
        os.sched_yield()
    trainer.saver.finish()
    trainer.close()
    (event,) = trainer.events("save")
    assert event["blocked_s"] >= 0.2 and trainer.deadline.needed_s >= 2 * (event["blocked_s"] + 0.4)


def test_multiples_of_keep_every_stay(tmp_path, tiny_config) -> None:
    trainer = Trainer(tmp_path / "run", tiny_config, save_every=2, keep_every=6, keep_last=2)
    trainer.train(1, 17)
    trainer.saver.finish()
    trainer.close()
    assert folders(trainer.run) == [f"step_{step:08d}" for step in (6, 12, 14, 16)]


def test_giving_up_leaves_nothing_half_written(tmp_path, tiny_config) -> None:
    trainer = Trainer(tmp_path / "run", tiny_config)
    trainer.train(1, 5)
    trainer.saver.finish()
    go = trainer.hold_thread()
    trainer.train(6, 9)
    assert folders(trainer.run) == ["step_00000004", "step_00000008.7.0.tmp"]
    trainer.saver._writer._snapshot.cancel()
    go.set()
    trainer.close()
    assert folders(trainer.run) == ["step_00000004"] and find_checkpoint(tmp_path / "run/checkpoints", MESH).step == 4


# --- two attempts ---------------------------------------------------------------------------------------------------------------


def test_a_fenced_attempt_commits_nothing(tmp_path, tiny_config) -> None:
    run = tmp_path / "run"
    old = Trainer(run, tiny_config, token="7.0")
    old.train(1, 5)
    old.saver.finish()
    go = old.hold_thread()
    old.train(6, 9)  # step 8 is under way
    new = Trainer(run, tiny_config, token="8.0")
    assert new.base == 4
    go.set()
    with pytest.raises(FencedError, match=r"8\.0"):
        old.saver.finish()
    for _ in range(2):
        with pytest.raises(FencedError):
            old.saver.start(10, {"at": 10})
    old.close()
    assert folders(run) == ["step_00000004"] and len(old.events("save")) == 1
    new.train(5, 9)
    new.saver.finish()
    new.close()
    assert values(run, 8) == {8.0} and json.loads(manifest(run, 8).read_text())["attempt"] == "8.0"


def manifest(run: Path, step: int) -> Path:
    return run / f"checkpoints/step_{step:08d}/manifest.json"


def stopped_between_check_and_rename(old: Trainer, monkeypatch) -> None:
    """The attempt has looked at OWNER for the last time and does not look again."""
    monkeypatch.setattr(old.attempt, "is_fenced", lambda: False)


def test_what_a_zombie_commits_after_the_take_over_does_not_count(tmp_path, tiny_config, monkeypatch) -> None:
    run = tmp_path / "run"
    old = Trainer(run, tiny_config, token="7.0")
    old.train(1, 5)
    old.saver.finish()
    new = Trainer(run, tiny_config, token="8.0", keep_last=1)
    stopped_between_check_and_rename(old, monkeypatch)
    old.train(6, 13)
    old.saver.finish()
    old.close()
    assert old.saver.saved == 12 and verify_checkpoint(run / "checkpoints/step_00000012") == []
    new.weights.step(100)
    new.train(5, 5)
    new.saver.start(6, {"at": 6})
    new.saver.finish()
    new.close()
    # the zombie's are newer and whole, and neither replace nor prune those of the run
    assert "step_00000006" in folders(run)
    last = Trainer(run, tiny_config, token="9.0")
    assert last.base == 6
    last.close()
    assert {".bad-step_00000008-0", ".bad-step_00000012-0", "step_00000006"} <= set(folders(run))


def test_a_strangers_folder_of_the_same_step_makes_room(tmp_path, tiny_config, monkeypatch) -> None:
    run = tmp_path / "run"
    old = Trainer(run, tiny_config, token="7.0")
    new = Trainer(run, tiny_config, token="8.0")
    stopped_between_check_and_rename(old, monkeypatch)
    old.train(1, 5)
    old.saver.finish()
    new.train(1, 5)
    new.saver.finish()
    new.close()
    assert json.loads(manifest(run, 4).read_text())["attempt"] == "8.0"
    assert folders(run) == [".bad-step_00000004-0", "step_00000004"]
    # and the other way round: the rename does not replace the owner's
    go = old.hold_thread()
    old.train(6, 9)
    again = Trainer(run, tiny_config, token="9.0")
    assert not (run / "checkpoints/step_00000008.7.0.tmp").exists(), "a start removes what others were writing"
    again.train(5, 9)
    again.saver.finish()
    go.set()
    monkeypatch.setattr(saver_module, "FINISH_TRIES", 0)
    with pytest.raises(SaveError):
        old.saver.finish()
    old.close()
    again.close()
    assert json.loads(manifest(run, 8).read_text())["attempt"] == "9.0"


def test_a_rename_never_replaces_the_owners_checkpoint(tmp_path, tiny_config, monkeypatch) -> None:
    run = tmp_path / "run"
    zombie = Trainer(run, tiny_config, token="7.0")
    zombie.train(1, 4)
    zombie.written()
    Attempt(run, "8.0").claim()
    (run / "checkpoints/step_00000004").mkdir()
    manifest(run, 4).write_text("the owner's")
    stopped_between_check_and_rename(zombie, monkeypatch)
    zombie.saver.settle()
    zombie.close()
    assert zombie.saver.saved == 0 and "ot empty" in zombie.events("save_failed")[0]["reason"]
    assert manifest(run, 4).read_text() == "the owner's" and folders(run) == ["step_00000004"]


def test_a_start_does_not_mind_a_zombie_that_still_writes(tmp_path, tiny_config) -> None:
    run = tmp_path / "run"
    old = Trainer(run, tiny_config, token="7.0")
    old.train(1, 5)
    old.saver.finish()
    old.close()
    is_over = threading.Event()
    half = run / "checkpoints/step_00000008.7.0.tmp"

    def write() -> None:
        number = 0
        while not is_over.is_set():
            number += 1
            with contextlib.suppress(OSError):
                half.mkdir(exist_ok=True)
                (half / str(number)).write_text("")

    zombie = threading.Thread(target=write)
    zombie.start()
    found = [find_checkpoint(run / "checkpoints", MESH).step for _ in range(100)]
    is_over.set()
    zombie.join()
    assert found == [4] * 100


# --- disks that refuse ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_disk(disk, tmp_path):
    """A run whose checkpoints alone lie on the small file system."""
    run = tmp_path / "run"
    run.mkdir()
    (disk.path / "checkpoints").mkdir()
    (run / "checkpoints").symlink_to(disk.path / "checkpoints")
    return run


def go_on_and_recover(trainer: Trainer, disk, reason: str) -> None:
    """Step 8 is refused already; the run goes on, is refused again, and saves once there is room."""
    assert trainer.saver.saved == 4 and trainer.saver.is_due(9), "tried again a quarter of the interval later"
    assert folders(trainer.run) == ["step_00000004"], "nothing half-written stays"
    assert newest_checkpoint(trainer.run / "checkpoints").step == 4
    failed = trainer.events("save_failed")
    assert [event["step"] for event in failed] == [8] and reason in failed[0]["reason"]
    trainer.train(9, 9)
    trainer.saver.settle()
    assert trainer.saver.saved == 4 and [event["step"] for event in trainer.events("save_failed")] == [8, 9]
    disk.empty()
    trainer.train(10, 10)
    trainer.saver.finish()
    assert values(trainer.run, 10) == {10.0} and not trainer.saver.is_due(11)
    trainer.close()


def test_too_little_room_is_seen_before_anything_is_written(on_disk, disk, tiny_config, caplog) -> None:
    trainer = Trainer(on_disk, tiny_config, Weights(4 * MB))
    trainer.train(1, 5)
    trainer.saver.finish()
    disk.fill(leave=2 * MB)
    trainer.train(6, 8)
    assert "NOT SAVED" in caplog.text and "of step 4" in caplog.text and "after step 9" in caplog.text
    go_on_and_recover(trainer, disk, "2.1 MB free for a checkpoint of 4.2 MB")


@pytest.mark.parametrize("leave", [0, 100_000, 3 * MB])
def test_a_disk_that_fills_up_while_it_is_written(on_disk, disk, tiny_config, leave) -> None:
    trainer = Trainer(on_disk, tiny_config, Weights(4 * MB))
    trainer.train(1, 5)
    trainer.saver.finish()
    go = trainer.hold_thread()
    trainer.train(6, 8)
    disk.fill(leave)
    go.set()
    trainer.written()
    trainer.saver.settle()
    go_on_and_recover(trainer, disk, "No space left")


def test_a_disk_that_fills_up_before_the_manifest(on_disk, disk, tiny_config) -> None:
    trainer = Trainer(on_disk, tiny_config, Weights(4 * MB))
    trainer.train(1, 5)
    trainer.saver.finish()
    trainer.train(6, 8)
    trainer.written()
    disk.fill()
    trainer.saver.settle()
    go_on_and_recover(trainer, disk, "No space left")


def test_a_read_only_folder(on_disk, disk, tiny_config) -> None:
    trainer = Trainer(on_disk, tiny_config)
    trainer.train(1, 5)
    trainer.saver.finish()
    disk.remount("ro")
    trainer.train(6, 9)
    assert [event["step"] for event in trainer.events("save_failed")] == [8, 9] and trainer.saver.saved == 4
    assert "Read-only" in trainer.events("save_failed")[0]["reason"]
    disk.remount("rw")
    trainer.train(10, 10)
    trainer.saver.finish()
    assert values(trainer.run, 10) == {10.0}
    trainer.close()


def test_the_last_save_is_tried_until_there_is_room(on_disk, disk, tiny_config, monkeypatch) -> None:
    pauses = []

    def make_room(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            disk.empty()

    monkeypatch.setattr(saver_module.time, "sleep", make_room)
    trainer = Trainer(on_disk, tiny_config, Weights(4 * MB))
    disk.fill()
    trainer.train(1, 4)
    trainer.saver.finish()
    assert values(trainer.run, 4) == {4.0} and len(pauses) == 2
    trainer.close()


def test_a_last_save_that_is_refused_to_the_end_is_an_error(on_disk, disk, tiny_config, monkeypatch) -> None:
    monkeypatch.setattr(saver_module, "FINISH_PAUSE_S", 0.01)
    trainer = Trainer(on_disk, tiny_config, Weights(4 * MB))
    trainer.train(1, 5)
    trainer.saver.finish()
    disk.fill()
    trainer.train(6, 8)
    with pytest.raises(
        SaveError, match=r"refused it 4 times; the newest checkpoint is of step 4: make room"
    ) as refusal:
        trainer.saver.finish()
    assert refusal.value.exit_code == 1 and isinstance(refusal.value, CheckpointError)
    assert len(trainer.events("save_failed")) == 4
    trainer.close()


def test_a_stop_saves_the_newest_state_and_not_first_what_was_refused(on_disk, disk, tiny_config) -> None:
    """A job that is taken away has time for one save."""
    trainer = Trainer(on_disk, tiny_config, Weights(4 * MB))
    disk.fill()
    trainer.train(1, 4)
    disk.empty()
    trainer.weights.step(5)
    run = SimpleNamespace(config=tiny_config(), external={})
    state = SimpleNamespace(to_dict=lambda: {"at": 5})
    tools = SimpleNamespace(saver=trainer.saver, reporter=trainer.reporter, beat=SimpleNamespace(phase=lambda *_: None))
    job = SimpleNamespace(stop=SimpleNamespace(signal_name="SIGTERM"))
    assert loop._stop(run, job, tools, state, 5) is loop.Ended.STOPPED
    assert [event["step"] for event in trainer.events("save")] == [5] and folders(on_disk) == ["step_00000005"]
    trainer.close()


def test_lines_that_a_full_disk_refuses_come_later(disk, tiny_config) -> None:
    trainer = Trainer(disk.path / "run", tiny_config)
    big = "x" * 300
    for number in range(20):
        trainer.reporter.event("note", number, text=big)
    disk.fill()
    for number in range(20, 60):
        trainer.reporter.event("note", number, text=big)
    lines = (trainer.run / "events.jsonl").read_text()
    assert lines.count("\n") < 60, "the disk was full"
    disk.empty()
    trainer.reporter.event("note", 60, text=big)
    trainer.close()
    assert [row["step"] for row in trainer.events("note")] == list(range(61))


# --- kill -9 --------------------------------------------------------------------------------------------------------------------


def test_kill_9_in_the_middle_of_the_background_write(tmp_path, tiny_config) -> None:
    run = tmp_path / "run"
    child = os.fork()
    if child == 0:
        trainer = Trainer(run, tiny_config, Weights(300 * MB), token="7.0")
        trainer.train(1, 5)
        trainer.saver.finish()
        trainer.train(6, 1000)
        os._exit(0)
    file = run / "checkpoints/step_00000008.7.0.tmp/__0_0.distcp"
    limit = time.monotonic() + 60
    while not (file.exists() and 0 < file.stat().st_size < 300 * MB):
        assert time.monotonic() < limit and os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert file.stat().st_size < 300 * MB and folders(run) == ["step_00000004", "step_00000008.7.0.tmp"]
    trainer = Trainer(run, tiny_config, Weights(300 * MB), token="7.1")
    assert trainer.base == 4 and folders(run) == ["step_00000004"]
    trainer.train(5, 8)
    trainer.saver.finish()
    trainer.close()
    assert values(run, 8) == {8.0}
