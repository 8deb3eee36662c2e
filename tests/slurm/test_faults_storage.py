"""Checkpoints and data that go bad, with real training on the real cluster. docs/what-happens-when.md has a row for each."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from cluster import Cluster, Job, poll
from judge import History, check_losses, check_samples
from runs import SAVE_EVERY, STEPS, Run, kill, replace_sample


@pytest.fixture
def run(cluster: Cluster, demo_data: Path, tmp_path: Path) -> Run:
    return Run(cluster, tmp_path, demo_data)


@pytest.fixture
def own_data(demo_data: Path, tmp_path: Path) -> Path:
    """A copy of the data that a test may damage."""
    return shutil.copytree(demo_data, tmp_path / "data")


def kill_in_a_save(run: Run, job: Job, token: str) -> Path:
    """The unfinished folder of the checkpoint in which rank 0 was killed."""
    root, rank = run.folder / "checkpoints", run.ranks(job, token)[0]

    def is_caught() -> bool:
        for folder in root.glob(f"step_*.{token}.tmp"):
            os.kill(rank, signal.SIGSTOP)
            if any(folder.glob("__*")):
                return True
            os.kill(rank, signal.SIGCONT)
        return False

    run.wait_checkpoint(job, token)
    run.wait(job, is_caught, "rank 0 is in a save", step_s=0.001)
    (folder,) = root.glob(f"step_*.{token}.tmp")
    kill(rank)
    return folder


def largest_file(checkpoint: Path) -> Path:
    return max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)


def flip_a_bit(checkpoint: Path) -> None:
    path = largest_file(checkpoint)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def truncate(checkpoint: Path) -> None:
    path = largest_file(checkpoint)
    os.truncate(path, path.stat().st_size - 1)


def remove_a_file(checkpoint: Path) -> None:
    largest_file(checkpoint).unlink()


def test_a_save_cut_short_and_damaged_checkpoints(run: Run, reference: History) -> None:
    """Killed in the middle of a save; then three times killed and the newest checkpoint damaged before the restart."""
    job = run.sbatch()
    half = kill_in_a_save(run, job, f"{job.id}.0")
    assert run.wait_over(job, f"{job.id}.0")["decision"] == "requeue"
    assert not (half / "manifest.json").exists()
    damages: list[Callable[[Path], None]] = [flip_a_bit, truncate, remove_a_file]
    for number, damage in enumerate(damages, start=1):
        token = f"{job.id}.{number}"
        ranks = run.ranks(job, token)
        newest = run.wait_checkpoint(job, token, num=2)
        kill(ranks[number % 2])
        assert run.wait_over(job, token)["decision"] == "requeue"
        assert run.read(f"{job.id}.{number + 1}", "claim") is None, "the damage comes before the restart"
        damage(run.checkpoint(newest))
        run.wait(job, lambda n=number: run.read(f"{job.id}.{n + 1}", "start"), "the next attempt has chosen")
        assert run.base(f"{job.id}.{number + 1}") == newest - SAVE_EVERY, damage.__name__
        assert f"step_{newest:08d}" in run.log(f"{job.id}.{number + 1}"), "the log names what was rejected"
    run.wait_done(job)
    found = run.check_equals(reference)
    assert found[0].redone <= SAVE_EVERY + 1, "the save under way and the steps since the one before"
    assert all(SAVE_EVERY <= one.redone <= 2 * SAVE_EVERY for one in found[1:]) and len(found) == 4
    assert job.restarts == 4 and not half.exists()
    assert len(list((run.folder / "checkpoints").glob(".bad-*"))) == len(damages)


class Disk:
    """A file system of 64 MB in memory, mounted on a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.error = self._mount("mount", "-t", "tmpfs", "-o", "size=64m,nr_inodes=1000", "tmpfs")
        self._ballast = folder / "ballast"

    def fill(self) -> None:
        """Leaves 1 MB, which is too little for a checkpoint: that is known before it is begun."""
        with self._ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(self.folder).free - (1 << 20))

    def limit_files(self) -> None:
        """Leaves two entries: a save can make its folder and one file, then the disk is full."""
        found = os.statvfs(self.folder)
        self._remount(f"nr_inodes={found.f_files - found.f_ffree + 2}")

    def write_protect(self) -> None:
        self._remount("ro")

    def mend(self) -> None:
        """Takes back all of the above."""
        self._remount("rw,nr_inodes=1000")
        self._ballast.unlink(missing_ok=True)

    def unmount(self) -> None:
        assert not self._mount("umount", "--lazy")

    def _remount(self, options: str) -> None:
        """Refused while a file is being written."""
        assert poll(lambda: not self._mount("mount", "-o", f"remount,{options}"), 10, 0.01), f"remount,{options}"

    def _mount(self, *command: str) -> str:
        """What a command says when it fails."""
        done = subprocess.run([*command, str(self.folder)], capture_output=True, text=True)
        return done.stderr or "failed" if done.returncode else ""


@pytest.fixture
def disk(run: Run) -> Iterator[Disk]:
    """A small disk under the run's checkpoints."""
    (run.folder / "checkpoints").mkdir(parents=True)
    made = Disk(run.folder / "checkpoints")
    if made.error:
        pytest.skip(f"no file system can be mounted here: {made.error}")
    yield made
    run.cluster.cancel_all()  # what still runs holds the disk open
    made.unmount()


def test_a_disk_that_refuses_for_a_while(run: Run, disk: Disk, reference: History) -> None:
    """Full before a save, full in the middle of one, read-only: training goes on, says so, and saves again when it can."""
    job = run.sbatch()
    token = f"{job.id}.0"
    saved = run.wait_checkpoint(job, token)
    for number, hurt in enumerate((disk.fill, disk.limit_files, disk.write_protect), start=1):
        hurt()
        known = len(run.events("save_failed"))
        run.wait(job, lambda n=known: len(run.events("save_failed")) > n, f"a save was refused: {hurt.__name__}")
        refused = run.events("save_failed")[-1]
        print(f"\n{hurt.__name__}: {refused['reason'][:150]}", end="")
        assert EXPECTED[number - 1] in refused["reason"]
        run.wait_step(job, refused["step"] + 1, token)
        assert run.checkpoint(saved).is_dir(), "what was saved before stays"
        disk.mend()
        run.wait(job, lambda r=refused["step"]: run.events("save")[-1]["step"] >= r, "it saves again")
        saved = run.events("save")[-1]["step"]
    assert saved < STEPS, "the faults came while it trained"
    run.wait_done(job)
    assert run.check_equals(reference) == [] and job.restarts == 0
    assert run.log(token).count("NOT SAVED") >= 3


EXPECTED = ("MB free for a checkpoint of", "No space left on device", "Read-only file system")


def test_a_poison_step_stops_the_loop(cluster: Cluster, own_data: Path, reference: History, tmp_path: Path) -> None:
    """A sample that always raises: three attempts without a new step, then FAILED with one line why, and no more."""
    step, key = first_seen(reference, "digits", 2)
    assert step <= SAVE_EVERY
    replace_sample(own_data / "train/digits", key, lambda data: data[:50] + bytes(len(data) - 50), "png")
    run = Run(cluster, tmp_path, own_data, "data.on_error=raise")
    job = run.sbatch()
    assert job.wait_end(170) == "FAILED"
    assert job.fields()["ExitCode"] == "1:0" and job.restarts == 2
    assert [one.decision for one in run.attempts] == ["requeue", "requeue", "give_up"]
    assert [one.outcome for one in run.attempts] == ["failed"] * 3
    reason = json.loads((run.folder / "DO_NOT_RESTART").read_text())["reason"]
    (line,) = [line for line in job.log.splitlines() if "FAILED: " in line]
    assert reason in line and "3 attempts in a row without a new checkpoint" in line and key in line
    assert max(run.history.ids) == step - 1 and not (run.folder / "DONE").exists()


def test_a_batch_without_a_finite_loss(cluster: Cluster, own_data: Path, reference: History, tmp_path: Path) -> None:
    """A clip so loud that its spectrum overflows: that step makes no update, the event names its samples, the run goes on."""
    step, key = first_seen(reference, "beeps", SAVE_EVERY + 2)
    replace_sample(own_data / "train/audio", key, too_loud, "flac")
    run = Run(cluster, tmp_path, own_data)
    job = run.sbatch()
    run.wait_done(job)
    check_samples(run.history, reference)
    bad = run.events("nonfinite")
    assert bad[0]["step"] == step and bad[0]["ids"] == reference.ids[step]
    before = {number: loss for number, loss in reference.losses.items() if number < step}
    found = {number: loss for number, loss in run.history.losses.items() if number < step}
    check_losses(History({}, found), History({}, before))
    later = [loss for number, loss in run.history.losses.items() if number > bad[-1]["step"]]
    assert all(loss is not None and abs(float.fromhex(loss)) < 100 for loss in later)
    assert job.restarts == 0 and f"step {step}: no update" in run.log()


def first_seen(history: History, kind: str, first: int) -> tuple[int, str]:
    """The first step from `first` on that has a sample of one kind which came in no step before, and the sample's key."""
    seen = {one for step in range(1, first) for one in history.ids[step]}
    for step in range(first, STEPS + 1):
        for one in history.ids[step]:
            key = one.rpartition(":")[2]
            if key.startswith(kind) and one not in seen:
                return step, key
        seen.update(history.ids[step])
    raise AssertionError(f"expected a new sample of {kind} from step {first} on, found none")


def too_loud(clip: bytes) -> bytes:
    """The clip with the same length as numbers of 1e30, which a file of floats can hold."""
    from io import BytesIO

    import soundfile

    wave, rate_hz = soundfile.read(BytesIO(clip), dtype="float32")
    out = BytesIO()
    soundfile.write(out, np.full_like(wave, 1e30), rate_hz, format="WAV", subtype="FLOAT")
    return out.getvalue()


DEEPSPEED = ("parallel.engine=deepspeed", "train.steps=9")


def test_deepspeed_goes_on_as_fsdp_does(cluster: Cluster, demo_data: Path, tmp_path: Path) -> None:
    """One hard kill with the other engine, against its own straight run."""
    straight = Run(cluster, tmp_path / "straight", demo_data, *DEEPSPEED)
    straight.wait_done(straight.sbatch())
    run = Run(cluster, tmp_path / "killed", demo_data, *DEEPSPEED)
    job = run.sbatch()
    ranks = run.ranks(job, f"{job.id}.0")
    run.wait_checkpoint(job, f"{job.id}.0")
    kill(ranks[1])
    run.wait_done(job)
    (recovery,) = run.check_equals(straight.history)
    assert recovery.redone <= SAVE_EVERY and job.restarts == 1
