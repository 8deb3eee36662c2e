"""What one rank meets while a checkpoint is written in the background, all ranks act on."""

from __future__ import annotations

import contextlib
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import build, train_config, train_steps, whole_state

from mmscale.config.env import JobLimits
from mmscale.config.schema import Config
from mmscale.errors import FencedError, SaveError
from mmscale.parallel.comm import sum_ints
from mmscale.parallel.engines.base import Engine
from mmscale.parallel.mesh import Mesh
from mmscale.train import saver as saver_module
from mmscale.train.attempt import Attempt
from mmscale.train.checkpoint import find_checkpoint, open_checkpoint, verify_checkpoint
from mmscale.train.deadline import Deadline
from mmscale.train.metrics import Reporter
from mmscale.train.saver import Saver

STEPS = 12
SMALL_FILE = 200
"""Bytes of the largest file that a rank may write while its disk refuses."""


def open_saver(
    mesh: Mesh, run: str, engine: Engine, token: str, async_save: bool = True
) -> tuple[Saver, Attempt, Reporter]:
    attempt = Attempt(Path(run), token)
    if mesh.is_main:
        attempt.claim()
    reader = find_checkpoint(Path(run) / "checkpoints", mesh, attempt if mesh.is_main else None)
    base = 0 if reader is None else reader.step
    if mesh.is_main:
        attempt.started(base, mesh.world_size)
    train = {"steps": STEPS, "save_every": 4, "async_save": async_save}
    config = Config(
        model={"llm": {"config": {"model_type": "llama"}}, "tokenizer": {"path": "none"}},
        data={"sources": {"a": {"path": "a"}}, "seq_len": 8},
        train={"global_batch": 1, "lr": 1.0, "parts": {"llm": {"tune": "full"}}, **train},
        run={"dir": run, "tensorboard": False},
    )
    reporter = Reporter(config, mesh.is_main, base + 1, token)
    root, deadline = Path(run) / "checkpoints", Deadline(JobLimits())
    return Saver(root, engine, mesh, config.train, attempt, reporter, deadline, base), attempt, reporter


def settle_when_all_have_written(mesh: Mesh, saver: Saver) -> None:
    """As the loop does at step boundaries, without the steps."""
    limit = time.monotonic() + 60
    while sum_ints(mesh, [saver.is_written])[0] < mesh.world_size:
        assert time.monotonic() < limit, "a rank has written nothing"
    saver.settle()


@contextlib.contextmanager
def refusing_disk(is_refused: bool) -> Iterator[None]:
    """Files of this process cannot grow, as over a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILE if is_refused else soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_while_training(mesh: Mesh, run: str, stage: int, seed: int, async_save: bool) -> Any:
    train = train_config()
    engine = build(mesh, stage, train, seed)
    saver, _, reporter = open_saver(mesh, run, engine, "7.0", async_save)
    train_steps(engine, mesh, train, range(4), 2, seed)
    wanted = whole_state(engine, mesh)
    saver.start(4, {"at": 4})
    train_steps(engine, mesh, train, range(4, 7), 2, seed)
    saver.finish()
    saver.abandon()
    reporter.__exit__(None, None, None)
    engine.close()
    return saver.saved, wanted


@pytest.mark.parametrize("async_save", [True, False])
@pytest.mark.parametrize("stage", [1, 3, 4])
def test_the_state_of_the_step_is_saved_though_training_went_on(ranks, tmp_path, seed, stage, async_save) -> None:
    answers = ranks(2).run(save_while_training, str(tmp_path), stage, seed % 1000, async_save)
    assert [saved for saved, _ in answers] == [4, 4]
    wanted = answers[0][1]
    reader = open_checkpoint(tmp_path / "checkpoints/step_00000004")
    assert reader.names == frozenset(wanted) and len(wanted) > 10
    for name, value in wanted.items():
        assert torch.equal(reader.read(name), value), name


def fail_on_rank_1(mesh: Mesh, run: str, seed: int) -> Any:
    engine = build(mesh, 1, train_config(), seed)
    saver, _, reporter = open_saver(mesh, run, engine, "7.0")
    saver.start(4, {"at": 4})
    saver.finish()
    seen = []
    for step in (8, 9):
        with refusing_disk(mesh.rank == 1):
            saver.start(step, {"at": step})
            settle_when_all_have_written(mesh, saver)
        left = sorted(path.name for path in (Path(run) / "checkpoints").glob("step_*"))
        seen.append((saver.saved, saver.is_due(step), saver.is_due(step + 1), left))
    saver.start(10, {"at": 10})
    saver.finish()
    seen.append((saver.saved, saver.is_due(11)))
    saver.abandon()
    reporter.__exit__(None, None, None)
    engine.close()
    return seen


def test_a_disk_that_refuses_rank_1_alone(ranks, tmp_path, seed) -> None:
    first, second = ranks(2).run(fail_on_rank_1, str(tmp_path), seed % 1000)
    assert first == second == [(4, True, True, ["step_00000004"]), (4, False, True, ["step_00000004"]), (10, False)]
    failed = [row for row in events(tmp_path) if row["event"] == "save_failed"]
    assert [row["step"] for row in failed] == [8, 9] and all("File too large" in row["reason"] for row in failed)
    assert all("(rank 1)" in row["reason"] for row in failed)
    assert verify_checkpoint(tmp_path / "checkpoints/step_00000010") == []


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def fail_to_the_end(mesh: Mesh, run: str, seed: int) -> Any:
    saver_module.FINISH_PAUSE_S = 0.01  # type: ignore[misc]
    engine = build(mesh, 1, train_config(), seed)
    saver, _, reporter = open_saver(mesh, run, engine, "7.0")
    try:
        with refusing_disk(mesh.rank == 1):
            saver.start(STEPS, {"at": STEPS})
            saver.finish()
    except SaveError as error:
        return error.exit_code, str(error)
    finally:
        saver.abandon()
        reporter.__exit__(None, None, None)
        engine.close()
    return "saved"


def test_a_last_save_that_rank_1_cannot_write_ends_all_ranks(ranks, tmp_path, seed) -> None:
    for code, text in ranks(2).run(fail_to_the_end, str(tmp_path), seed % 1000):
        assert code == 1 and "refused it 4 times" in text
    assert not list((tmp_path / "checkpoints").glob("step_*"))


def lose_the_run(mesh: Mesh, run: str, seed: int) -> Any:
    engine = build(mesh, 1, train_config(), seed)
    saver, _, reporter = open_saver(mesh, run, engine, "7.0")
    saver.start(4, {"at": 4})
    saver.finish()
    saver.start(8, {"at": 8})
    if mesh.is_main:
        Attempt(Path(run), "8.0").claim()
    answers = []
    for work in (saver.finish, lambda: saver.start(9, {"at": 9})):
        try:
            work()
        except FencedError as error:
            answers.append("8.0" in str(error))
    saver.abandon()
    reporter.__exit__(None, None, None)
    engine.close()
    return answers, saver.saved


def test_a_fenced_attempt_ends_on_all_ranks_and_commits_nothing(ranks, tmp_path, seed) -> None:
    assert ranks(2).run(lose_the_run, str(tmp_path), seed % 1000) == [([True, True], 4)] * 2
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000004"]
