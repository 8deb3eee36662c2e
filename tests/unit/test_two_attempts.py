"""An attempt that was stopped at an awkward line, and what the next start or the batch script makes of it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmscale.cluster.after import decide, main
from mmscale.config.env import Launch
from mmscale.config.schema import Config, ParallelConfig
from mmscale.errors import CheckpointError, DataError, FencedError, SaveError
from mmscale.parallel.mesh import init_mesh
from mmscale.train import checkpoint, setup
from mmscale.train import manifest as manifest_module
from mmscale.train.attempt import Attempt, write_json
from mmscale.train.checkpoint import find_checkpoint
from mmscale.train.checkpoint_folders import clear_left_overs, set_aside
from mmscale.train.heartbeat import beat_path
from mmscale.train.manifest import file_record, folder_name, manifest_text, verify_checkpoint
from mmscale.train.metrics import JsonLines

MESH = init_mesh(ParallelConfig(), "cpu", Launch())


def begin(run: Path, token: str, base: int | None = 0) -> Attempt:
    """A start as the batch script and rank 0 make it; `base` None = killed before it had chosen a checkpoint."""
    number = int(token.partition(".")[2])
    job = {"job": "7", "restarts": number, "nodes": ["n1"], "started_at": 100.0 + number, "submission": "7"}
    write_json(run / "attempts" / token / "job.json", job)
    attempt = Attempt(run, token)
    attempt.claim()
    if base is not None:
        attempt.started(base, 1)
    return attempt


def save(run: Path, step: int, token: str) -> Path:
    folder = run / "checkpoints" / folder_name(step)
    folder.mkdir(parents=True)
    (folder / "data").write_bytes(b"weights")
    (folder / "manifest.json").write_text(manifest_text(step, token, {"data": file_record(folder / "data")}))
    return folder


# --- the batch script ------------------------------------------------------------------------------------------------------------


def test_killed_between_claim_and_owner(tmp_path: Path) -> None:
    """Nobody has taken over: the run goes on. Before, the job ended with exit code 0 and the run stood still."""
    begin(tmp_path, "7.0")
    before = (tmp_path / "OWNER").read_text()
    begin(tmp_path, "7.1", None)
    (tmp_path / "OWNER").write_text(before)
    earlier = (tmp_path / "attempts/7.1/claim.json").stat().st_mtime - 60
    os.utime(tmp_path / "OWNER", (earlier, earlier))
    assert decide(tmp_path, "7.1", 1).word == "requeue"
    begin(tmp_path, "8.0", None)
    assert decide(tmp_path, "7.1", 1).word == "stale"


@pytest.mark.parametrize("text", ["", "{", "[]", "\0" * 64], ids=["empty", "torn", "list", "zeros"])
@pytest.mark.parametrize(
    "name",
    ["attempts/7.0/job.json", "attempts/7.0/end.json", "attempts/7.0/after.json", "attempts/7.0/start.json",
     "attempts/7.1/hang-0.json", "attempts/7.1/health-0.json", "attempts/7.1/error-0.json", "bad_nodes.json"],
)  # fmt: skip
def test_a_damaged_record_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], name, text) -> None:
    """As after a power cut on a file system that loses what was synced."""
    begin(tmp_path, "7.0")
    begin(tmp_path, "7.1")
    (tmp_path / name).write_text(text)
    main([str(tmp_path), "--token", "7.1", "--restarts", "1", "--rc", "1"])
    assert capsys.readouterr().out.startswith("requeue attempt ")


def test_a_run_that_stops_itself_again_and_again_is_given_up(tmp_path: Path) -> None:
    """The start-up takes all of a short job, and the trainer ends before SLURM's signal: that is no preemption."""
    for number in range(3):
        begin(tmp_path, f"7.{number}").ended("stopped")
    assert decide(tmp_path, "7.2", 2).word == "give_up"
    write_json(tmp_path / "attempts/7.1/signal-0.json", {"signal": "SIGTERM", "at": 1.0})
    assert decide(tmp_path, "7.2", 2).reason.startswith("attempt 2 of 3")


# --- the trainer -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path, tiny_config) -> Config:
    built = tiny_config(train={"steps": 10, "save_every": 5})
    return built.model_copy(update={"run": built.run.model_copy(update={"dir": str(tmp_path)})})


def test_a_zombie_in_its_start_up_leaves_the_owners_files_alone(tmp_path: Path, config: Config) -> None:
    """Stopped while it loaded the model. Without its heartbeats the healthy attempt would be taken for hung."""
    zombie = begin(tmp_path, "7.0")
    begin(tmp_path, "7.1")
    beat = beat_path(tmp_path, 0)
    beat.parent.mkdir()
    files = {path: f"the owner's {path.name}" for path in (tmp_path / "DONE", tmp_path / "config.yaml", beat)}
    for path, text in files.items():
        path.write_text(text)
    with pytest.raises(FencedError):
        setup._prepare_folder(config, zombie)
    assert {path: path.read_text() for path in files} == files


def test_a_zombie_that_chose_a_checkpoint_goes_no_further(tmp_path: Path) -> None:
    zombie = begin(tmp_path, "7.0", None)
    begin(tmp_path, "7.1")
    with pytest.raises(FencedError):
        zombie.started(10, 1)
    assert not (tmp_path / "attempts/7.0/start.json").exists()


def test_a_zombie_does_not_say_that_the_run_is_done(tmp_path: Path, config: Config) -> None:
    """The owner may have been given more steps."""
    zombie = begin(tmp_path, "7.0")
    owner = begin(tmp_path, "7.1")
    run = SimpleNamespace(mesh=MESH, folder=tmp_path, config=config)
    with pytest.raises(FencedError):
        setup.mark_done(run, zombie)
    assert not (tmp_path / "DONE").exists()
    setup.mark_done(run, owner)
    assert json.loads((tmp_path / "DONE").read_text()) == {"step": 10}


def test_a_record_that_the_disk_refuses_does_not_hide_the_first_cause(tmp_path: Path) -> None:
    attempt = begin(tmp_path, "7.0")
    for name in ("end.json", "error-0.json"):
        (tmp_path / "attempts/7.0" / name).mkdir()  # a rename onto a folder fails even for root
    with pytest.raises(DataError, match=r"^bad sample$"), attempt.recording(rank=0):
        raise DataError("bad sample")


# --- checkpoints -----------------------------------------------------------------------------------------------------------------


def test_a_rejected_folder_finds_a_free_name(tmp_path: Path) -> None:
    """Somebody has removed the first of two rejected ones to make room."""
    root = tmp_path / "checkpoints"
    for _ in range(2):
        set_aside(save(tmp_path, 20, "7.0"), ["x"])
    (root / ".bad-step_00000020-0" / "data").unlink()
    (root / ".bad-step_00000020-0" / "manifest.json").unlink()
    (root / ".bad-step_00000020-0").rmdir()
    save(tmp_path, 10, "7.0")
    (save(tmp_path, 20, "7.0") / "data").write_bytes(b"weight")
    found = [path for path in clear_left_overs(root, None) if checkpoint._counts(path, MESH, None)]
    assert [path.name for path in found] == ["step_00000010"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EMFILE, errno.ETIMEDOUT])
def test_a_file_system_that_does_not_answer_is_no_damage(tmp_path: Path, monkeypatch, number: int) -> None:
    """Else a node with a broken mount would set aside all checkpoints of a run, one by one."""
    folder = save(tmp_path, 20, "7.0")
    save(tmp_path, 10, "7.0")

    def refuse(path: Path) -> dict[str, object]:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(manifest_module, "file_record", refuse)
    with pytest.raises(SaveError, match=rf"{os.strerror(number)}.*left as it is"):
        find_checkpoint(tmp_path / "checkpoints", MESH)
    assert folder.exists()
    monkeypatch.setattr(
        manifest_module, "file_record", lambda path: (_ for _ in ()).throw(OSError(errno.EIO, "bad sector"))
    )
    assert verify_checkpoint(folder) == ["data: not readable ([Errno 5] bad sector)"], "a broken disk is damage"
    (folder / "manifest.json").unlink()
    assert "never completed" in verify_checkpoint(folder)[0]


def test_a_start_reads_the_end_of_a_long_runs_records_only(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    row = b'{"step": 1}\n'
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a sparse TB: read whole, it would not fit into memory
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + row + b'{"step": 2, "ids"')
    lines = JsonLines(path)
    lines.write({"step": 2})
    lines.close()
    with path.open("rb") as file:
        file.seek(1 << 40)
        assert file.read() == b"\n" + row + b'{"step": 2}\n'
    path.unlink()
    path.write_bytes(b'{"half')
    JsonLines(path).close()
    assert path.read_bytes() == b""


def test_a_lineage_that_is_damaged_is_refused_with_the_file(tmp_path: Path) -> None:
    begin(tmp_path, "7.0")
    begin(tmp_path, "7.1")
    (tmp_path / "attempts/7.0/start.json").write_text("")
    with pytest.raises(CheckpointError, match=r"7\.0/start\.json: expected a JSON object"):
        begin(tmp_path, "7.2", None).lineage()
