"""Who owns a run directory, and whose checkpoints count."""

from __future__ import annotations

import json
import os
import random
import threading
from pathlib import Path

import pytest

from mmscale.errors import CheckpointError, ConfigError, DivergedError, FencedError, RefusedInputError, SaveError
from mmscale.train.attempt import (
    Attempt,
    Lineage,
    first_cause,
    read_json,
    read_lineage,
    read_owner,
    record_error,
    write_json,
)


def begin(run: Path, token: str, base: int | None) -> Attempt:
    """A start that went on from step `base`; None = killed before it had chosen a checkpoint."""
    attempt = Attempt(run, token)
    attempt.claim()
    if base is not None:
        attempt.started(base, 1)
    return attempt


def end(run: Path, token: str) -> dict:
    return read_json(run / "attempts" / token / "end.json") or {}


# --- claim and fence ------------------------------------------------------------------------------------------------------------


def test_the_newest_start_owns_the_run(tmp_path) -> None:
    assert read_owner(tmp_path) is None
    first = begin(tmp_path, "7.0", 0)
    assert not first.is_fenced() and read_owner(tmp_path) == "7.0"
    second = begin(tmp_path, "7.1", 4)
    assert first.is_fenced() and not second.is_fenced() and read_owner(tmp_path) == "7.1"
    assert read_json(tmp_path / "attempts/7.1/start.json")["predecessor"] == "7.0"
    error = first.fence_error()
    assert isinstance(error, FencedError) and "7.0" in str(error) and "7.1" in str(error)
    first.claim()  # it has been the owner once; claiming again takes nothing back
    assert first.is_fenced() and read_owner(tmp_path) == "7.1"


def test_a_run_without_owner_is_nobodys(tmp_path) -> None:
    attempt = begin(tmp_path, "7.0", 0)
    (tmp_path / "OWNER").unlink()
    assert attempt.is_fenced() and "no owner" in str(attempt.fence_error())


def test_owner_written_again_with_the_same_token_is_no_fence(tmp_path) -> None:
    attempt = begin(tmp_path, "7.0", 0)
    (tmp_path / "other").write_text("7.0\n")
    os.replace(tmp_path / "other", tmp_path / "OWNER")  # restored by hand: another inode and time
    assert not attempt.is_fenced() and not attempt.is_fenced()


def test_a_token_that_has_started_before_gets_a_number(tmp_path) -> None:
    tokens = [begin(tmp_path, "7.0", 0).token for _ in range(3)]
    assert tokens == ["7.0", "7.0-2", "7.0-3"]
    assert Attempt(tmp_path).token is None
    made_up = Attempt(tmp_path)
    made_up.claim()
    assert made_up.token.startswith("local.") and str(os.getpid()) in made_up.token


def test_of_starts_at_the_same_time_one_owns(tmp_path, seed) -> None:
    attempts = [Attempt(tmp_path, f"{number}.0") for number in range(8)]
    ready = threading.Barrier(len(attempts))

    def start(attempt: Attempt) -> None:
        ready.wait()
        attempt.claim()

    threads = [threading.Thread(target=start, args=(attempt,)) for attempt in attempts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [attempt.token for attempt in attempts if not attempt.is_fenced()] == [read_owner(tmp_path)]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RefusedInputError, match=r"set run\.dir"):
        Attempt(tmp_path / "file", "7.0").claim()


# --- lineage --------------------------------------------------------------------------------------------------------------------


def test_checkpoints_count_up_to_where_the_successor_went_on(tmp_path) -> None:
    begin(tmp_path, "7.0", 0)
    begin(tmp_path, "7.1", 20)
    begin(tmp_path, "7.2", None)  # killed while it verified
    newest = begin(tmp_path, "8.0", 30)
    lineage = newest.lineage()
    assert lineage == Lineage({"8.0": None, "7.2": 30, "7.1": 30, "7.0": 20}, 0)
    assert lineage.problem("7.0", 20) is None and lineage.problem("7.0", 21) is not None
    assert lineage.problem("7.1", 30) is None and lineage.problem("7.1", 31) is not None
    assert lineage.problem("8.0", 10**6) is None
    assert "none of this run's attempts" in lineage.problem("9.0", 1)
    assert lineage.problem(None, 1) is not None


def test_a_run_may_begin_with_a_copied_checkpoint(tmp_path) -> None:
    first = Attempt(tmp_path, "7.0")
    first.claim()
    assert first.lineage().problem("elsewhere.0", 500) is None, "before it has chosen, all count"
    first.started(500, 1)
    assert first.lineage().problem("elsewhere.0", 500) is None
    assert first.lineage().problem("elsewhere.0", 501) is not None
    assert begin(tmp_path, "7.1", 510).lineage().problem("elsewhere.0", 500) is None


def test_a_fall_back_takes_back_what_lies_behind(tmp_path) -> None:
    """7.1 found the checkpoint of step 20 damaged and went on from 10: what 7.0 wrote after 10 is of another history."""
    begin(tmp_path, "7.0", 0)
    begin(tmp_path, "7.1", 10)
    lineage = begin(tmp_path, "7.2", 30).lineage()
    assert lineage.problem("7.0", 20) is not None and lineage.problem("7.1", 20) is None


def test_a_rollback_leaves_the_predecessors_where_they_were(tmp_path) -> None:
    begin(tmp_path, "7.0", 0)
    own = begin(tmp_path, "7.1", 10)
    own.started(25, 1)  # opened again from its own checkpoint
    assert own.lineage().problem("7.0", 20) is not None and own.lineage().problem("7.1", 25) is None
    assert read_json(tmp_path / "attempts/7.1/start.json")["base_step"] == 10


def test_lineage_is_what_a_walk_through_history_says(tmp_path, seed) -> None:
    """Random histories of starts, saves by the owner and saves by zombies: exactly those of the owner's own past count."""
    rng = random.Random(seed)
    for case in range(30):
        run = tmp_path / str(case)
        past: list[
            set[tuple[str, int]]
        ] = []  # per attempt: what it may go on from, and what it wrote while it owned the run
        strangers: set[tuple[str, int]] = set()
        attempts: list[Attempt] = []
        steps = 0
        for number in range(rng.randrange(2, 7)):
            known = set().union(*past) if past else set()
            base = rng.choice(sorted({step for _, step in known} | {0}))
            past = [{(token, step) for token, step in own if step <= base} for own in past]
            strangers |= {entry for entry in known if entry[1] > base}
            attempts.append(begin(run, f"{number}.0", base))
            steps = base
            own = set()
            for _ in range(rng.randrange(4)):
                steps += rng.randrange(1, 5)
                own.add((f"{number}.0", steps))
            past.append(own)
            for zombie in attempts[:-1]:
                if rng.random() < 0.5:
                    strangers.add((str(zombie.token), base + rng.randrange(1, 9)))
        lineage = attempts[-1].lineage()
        known = set().union(*past)
        for token, step in known | strangers:
            assert (lineage.problem(token, step) is None) == ((token, step) in known), (case, token, step)


def test_a_broken_chain_is_refused(tmp_path) -> None:
    begin(tmp_path, "7.0", 0)
    begin(tmp_path, "7.1", 4)
    for name in ("start.json", "claim.json"):
        (tmp_path / "attempts/7.0" / name).unlink()
    with pytest.raises(CheckpointError, match=r"7\.0.*restore the folder"):
        read_lineage(tmp_path, "7.1")
    (tmp_path / "attempts/7.1/start.json").write_text('{"predecessor": "7.1", "base_step": 4}')
    with pytest.raises(CheckpointError, match="its own predecessor"):
        read_lineage(tmp_path, "7.1")
    (tmp_path / "attempts/7.1/start.json").write_text("{")
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        read_lineage(tmp_path, "7.1")


# --- how an attempt ended ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (FencedError("x"), "fenced"),
        (DivergedError("x"), "diverged"),
        (ConfigError("x"), "refused"),
        (CheckpointError("x"), "refused"),
        (SaveError("x"), "failed"),
        (ValueError("x"), "failed"),
    ],
)
def test_an_error_is_recorded_and_passes(tmp_path, error, outcome) -> None:
    attempt = begin(tmp_path, "7.0", 0)
    with pytest.raises(type(error)), attempt.recording(rank=1):
        raise error
    assert end(tmp_path, "7.0") == {}, "rank 0 alone records the end"
    assert first_cause(errors(tmp_path / "attempts/7.0")) == f"rank 1: {type(error).__name__}: x"
    with pytest.raises(type(error)), attempt.recording(rank=0):
        raise error
    assert end(tmp_path, "7.0")["outcome"] == outcome and "x" in end(tmp_path, "7.0")["reason"]


def test_the_first_cause_is_the_most_telling_record(tmp_path) -> None:
    """Where one rank fails, all others say that their connection was closed, often before it has said why."""
    expected = None
    for rank, (cause, reason) in enumerate(
        [("other", "closed"), ("killed", "SIGKILL"), ("named", "bad"), ("named", "later")]
    ):
        assert first_cause(errors(tmp_path)) == expected
        record_error(tmp_path, rank, reason, cause)
        expected = "bad" if reason == "later" else reason
    assert first_cause([*errors(tmp_path), {}]) == "bad", "a record that cannot be read says nothing"


def errors(folder: Path) -> list[dict]:
    return [read_json(path) or {} for path in folder.glob("error-*.json")]


def test_a_start_that_never_owned_the_run_leaves_a_record_only_where_the_job_made_a_folder(tmp_path) -> None:
    run = tmp_path / "run"
    Attempt(run, "7.0").ended("refused")
    assert not run.exists()
    write_json(run / "attempts/7.0/job.json", {"job": "7"})
    Attempt(run, "7.0").ended("refused", reason="bad data")
    assert end(run, "7.0")["reason"] == "bad data" and read_owner(run) is None


def test_a_file_is_the_old_one_or_the_new_one(tmp_path) -> None:
    """A reader that reads all the time never sees a part."""
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"n": 0, "filler": ""})
    is_over = threading.Event()
    seen, problems = set(), []

    def read() -> None:
        while not is_over.is_set():
            try:
                content = json.loads(path.read_text())
                seen.add(content["n"])
                assert content["filler"] == "x" * content["n"]
            except (ValueError, AssertionError) as error:
                problems.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, 300):
        write_json(path, {"n": number, "filler": "x" * number})
    is_over.set()
    reader.join()
    assert not problems and len(seen) > 1 and os.listdir(path.parent) == ["file.json"]
