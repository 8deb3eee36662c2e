"""The decision after an attempt, from run directories that tell a story."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mmscale.cluster.after import Decision, decide, main, newest_step, record
from mmscale.train.attempt import write_json
from mmscale.train.manifest import file_record, folder_name, manifest_text


class Story:
    """A run directory, written attempt by attempt. The current attempt is the last one."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.token = ""
        self.clock = 1000.0

    def attempt(
        self,
        token: str,
        base: int | None = 0,
        submission: str = "7",
        nodes: int = 2,
        saves: tuple[int, ...] = (),
        outcome: str | None = None,
        signalled: int = 0,
        after: dict[str, object] | None = None,
    ) -> Story:
        """One attempt: `base` = step it went on from (None: it never started), `signalled` = nodes that got a signal."""
        self.token, self.clock = token, self.clock + 10
        folder = self.run / "attempts" / token
        names = [f"fx{n}" for n in range(nodes)]
        job = {"job": token.partition(".")[0], "restarts": int(token.partition(".")[2]), "nodes": names}
        write_json(folder / "job.json", {**job, "started_at": self.clock, "submission": submission, "mode": "requeue"})
        if base is not None:
            write_json(folder / "claim.json", {"token": token, "predecessor": None, "at": self.clock})
            write_json(
                folder / "start.json", {"token": token, "predecessor": None, "base_step": base, "at": self.clock}
            )
            (self.run / "OWNER").write_text(token + "\n")
        for step in saves:
            self.save(step, token)
        if outcome is not None:
            write_json(folder / "end.json", {"outcome": outcome, "step": base, "reason": f"why {outcome}", "at": 1.0})
        for node in range(signalled):
            write_json(folder / f"signal-{node}.json", {"signal": "SIGTERM", "at": 1.0})
        if after is not None:
            write_json(folder / "after.json", after)
        return self

    def save(self, step: int, token: str) -> Path:
        folder = self.run / "checkpoints" / folder_name(step)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "data").write_bytes(b"weights")
        (folder / "manifest.json").write_text(manifest_text(step, token, {"data": file_record(folder / "data")}))
        return folder

    def decide(self, restarts: int | None = None, state: str = "RUNNING", signal: str | None = None) -> Decision:
        own = int(self.token.partition(".")[2])
        return decide(self.run, self.token, own if restarts is None else restarts, state, signal)


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path)


def three_failures(story: Story, **kinds: object) -> Story:
    return story.attempt("7.0", **kinds).attempt("7.1", **kinds).attempt("7.2", **kinds)


def test_done_wins_over_everything(story: Story) -> None:
    three_failures(story, outcome="failed")
    (story.run / "DONE").touch()
    assert story.decide(restarts=5, state="COMPLETING").word == "done"


@pytest.mark.parametrize("restarts", [0, 2, 3])
def test_another_restart_count_is_stale(story: Story, restarts: int) -> None:
    story.attempt("7.0").attempt("7.1", saves=(10,))
    assert story.decide(restarts=restarts).word == "stale"


def test_another_owner_is_stale(story: Story) -> None:
    """A zombie: another job has claimed the directory since."""
    story.attempt("7.0", saves=(10,))
    (story.run / "OWNER").write_text("8.0\n")
    assert story.decide() == Decision("stale", "the run belongs to attempt 8.0, this script is attempt 7.0")


@pytest.mark.parametrize(("age_s", "word"), [(-5.0, "requeue"), (5.0, "stale")])
def test_an_attempt_that_never_claimed_looks_when_the_owner_did(story: Story, age_s: float, word: str) -> None:
    """The owner of before is no successor; one that claimed after this attempt's start is."""
    story.attempt("7.0", saves=(10,)).attempt("7.1", base=None)
    began = (story.run / "attempts/7.1/job.json").stat().st_mtime
    os.utime(story.run / "OWNER", (began + age_s, began + age_s))
    assert story.decide().word == word


@pytest.mark.parametrize(("state", "word"), [("RUNNING", "requeue"), ("TIMEOUT", "requeue"), ("COMPLETING", "stopped")])
def test_a_job_that_somebody_ended_is_not_requeued(story: Story, state: str, word: str) -> None:
    assert story.attempt("7.0", saves=(10,)).decide(state=state).word == word


@pytest.mark.parametrize(("outcome", "base"), [("refused", None), ("refused", 0), ("diverged", 0)])
def test_what_another_start_would_repeat_is_given_up_at_once(story: Story, outcome: str, base: int | None) -> None:
    assert story.attempt("7.0", base=base, outcome=outcome).decide() == Decision("give_up", f"why {outcome}")


def test_an_input_that_was_accepted_before_is_tried_again(story: Story) -> None:
    """A disk that is away for a while looks like data that is missing."""
    story.attempt("7.0", saves=(10,), outcome="stopped", signalled=1)
    for token, word in (("7.1", "requeue"), ("7.2", "requeue"), ("7.3", "give_up")):
        found = story.attempt(token, base=None, outcome="refused").decide()
        assert found.word == word and "why refused" in found.reason


def test_a_refused_second_job_does_not_stop_the_first(story: Story) -> None:
    story.attempt("7.0", saves=(10,)).attempt("8.0", base=None, submission="8", outcome="refused")
    (story.run / "OWNER").write_text("7.0\n")
    past = (story.run / "attempts/8.0/job.json").stat().st_mtime - 5
    os.utime(story.run / "OWNER", (past, past))
    decision = story.decide()
    assert decision.word == "give_up"
    record(story.run, "8.0", decision, 2, None)
    assert not (story.run / "DO_NOT_RESTART").exists()


@pytest.mark.parametrize(
    ("kinds", "text"),
    [
        ({"base": None}, "7.2 did not start; see its log"),
        ({"outcome": "failed"}, "7.2 why failed"),
        ({}, "7.2 was killed after it went on from step 0"),
        ({"signalled": 1}, "7.2 was killed"),  # SLURM signals the other nodes when one has crashed
    ],
)
def test_three_attempts_without_a_step_are_enough(story: Story, kinds: dict[str, object], text: str) -> None:
    assert story.attempt("7.0", **kinds).decide().word == "requeue"
    assert story.attempt("7.1", **kinds).decide().reason.startswith("attempt 2 of 3")
    found = story.attempt("7.2", **kinds).decide()
    assert found.word == "give_up" and text in found.reason
    assert found.reason.startswith("3 attempts in a row without a new checkpoint")


@pytest.mark.parametrize(
    "kinds",
    [
        {"outcome": "stopped", "signalled": 1},
        {"signalled": 2},
        {"after": {"decision": "stale", "signal": "TERM"}},
    ],
)
def test_attempts_that_were_asked_to_stop_do_not_count(story: Story, kinds: dict[str, object]) -> None:
    three_failures(story, **kinds).attempt("7.3", **kinds)
    assert story.decide().word == "requeue"


def test_time_limits_without_a_checkpoint_count(story: Story) -> None:
    """A limit shorter than the start-up would go on for ever."""
    limit = {"outcome": "stopped", "signalled": 2, "after": {"decision": "requeue", "signal": "USR1"}}
    story.attempt("7.0", **limit).attempt("7.1", **limit).attempt("7.2", outcome="stopped", signalled=2)
    assert story.decide().reason.startswith("attempt 2 of 3")
    found = story.decide(signal="USR1")
    assert found.word == "give_up" and "7.2 came to its time limit before it had a new checkpoint" in found.reason


def test_a_signal_excuses_no_failure(story: Story) -> None:
    """As with a full disk, for which every attempt fails to save when its time is over."""
    three_failures(story, outcome="failed", signalled=2)
    assert story.decide(signal="TERM").word == "give_up"


def test_an_attempt_that_was_taken_away_is_not_to_blame(story: Story) -> None:
    three_failures(story, after={"signal": "TERM"})
    assert story.decide(signal="TERM") == Decision("requeue", "it was stopped before a checkpoint, the run goes on")


def test_a_stop_between_crashes_neither_counts_nor_forgives(story: Story) -> None:
    story.attempt("7.0").attempt("7.1", outcome="stopped", signalled=1).attempt("7.2")
    assert story.decide().reason.startswith("attempt 2 of 3")
    assert story.attempt("7.3").decide().word == "give_up"


def test_progress_forgives(story: Story) -> None:
    """The crash is met again after each new checkpoint: two failures, progress, two failures, and so on."""
    story.attempt("7.0").attempt("7.1").attempt("7.2", saves=(10,))
    assert story.decide() == Decision("requeue", "checkpoint of step 10, the run goes on")
    story.attempt("7.3", base=10).attempt("7.4", base=10)
    assert story.decide().reason.startswith("attempt 2 of 3")
    assert story.attempt("7.5", base=10).decide().word == "give_up"


def test_progress_is_seen_after_its_checkpoint_was_pruned(story: Story) -> None:
    """By the step from which the next attempt went on."""
    story.attempt("7.0", base=0).attempt("7.1", base=10).attempt("7.2", base=20)
    assert story.decide().reason.startswith("attempt 1 of 3")


def test_a_damaged_checkpoint_is_no_progress(story: Story) -> None:
    story.attempt("7.0")
    (story.save(20, "7.0") / "data").write_bytes(b"weigh")
    story.save(10, "6.0")
    (story.run / "checkpoints/step_00000030.tmp").mkdir()
    folder = story.save(40, "7.0")
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text().replace("7.0", "7.1"))
    assert newest_step(story.run, "7.0") == 0
    assert story.decide().reason.startswith("attempt 1 of 3")
    story.save(20, "7.0")
    assert newest_step(story.run, "7.0") == 20


def test_failures_of_another_submission_do_not_count(story: Story) -> None:
    story.attempt("5.0", submission="5").attempt("5.1", submission="5").attempt("7.0")
    assert story.decide().reason.startswith("attempt 1 of 3")


def test_a_chain_counts_over_its_jobs(story: Story) -> None:
    story.attempt("11.0", submission="c").attempt("12.0", submission="c").attempt("13.0", submission="c")
    assert story.decide().word == "give_up"


def test_a_hang_and_a_bad_node_are_named(story: Story) -> None:
    three_failures(story)
    slowest = {"rank": 1, "host": "h", "phase": "step", "step": 12, "age_s": 40.0}
    write_json(story.run / "attempts/7.2/hang-0.json", {"at": 1.0, "slowest": slowest})
    assert "7.2 hung in rank 1, phase step, step 12" in story.decide().reason


def test_what_is_recorded(story: Story) -> None:
    story.attempt("7.0")
    folder = story.run / "attempts/7.0"
    write_json(folder / "health-0.json", {"node": "fx1", "problems": []})
    write_json(folder / "health-1.json", {"node": "fx2", "problems": ["disk full", "no GPU"]})
    record(story.run, "7.0", Decision("give_up", "why"), rc=1, signal=None)
    after = json.loads((folder / "after.json").read_text())
    assert {key: after[key] for key in ("decision", "reason", "rc")} == {
        "decision": "give_up",
        "reason": "why",
        "rc": 1,
    }
    nodes = json.loads((story.run / "bad_nodes.json").read_text())
    assert set(nodes) == {"fx2"} and nodes["fx2"]["reason"] == "disk full; no GPU"
    barrier = json.loads((story.run / "DO_NOT_RESTART").read_text())
    assert barrier["submission"] == "7" and barrier["token"] == "7.0" and barrier["reason"] == "why"


def test_a_stale_attempt_writes_only_into_its_own_folder(story: Story) -> None:
    story.attempt("7.0").attempt("7.1", saves=(10,))
    before = sorted(path for path in story.run.rglob("*") if "7.0" not in path.parts)
    record(story.run, "7.0", Decision("stale", "x"), rc=0, signal="TERM")
    assert sorted(path for path in story.run.rglob("*") if "7.0" not in path.parts) == before
    assert json.loads((story.run / "attempts/7.0/after.json").read_text())["signal"] == "TERM"


def test_the_command_prints_word_and_reason(story: Story, capsys: pytest.CaptureFixture[str]) -> None:
    story.attempt("7.0", saves=(10,))
    main([str(story.run), "--token", "7.0", "--restarts", "0", "--rc", "1", "--state", "RUNNING", "--signal", "USR1"])
    assert capsys.readouterr().out == "requeue checkpoint of step 10, the run goes on\n"
    assert json.loads((story.run / "attempts/7.0/after.json").read_text())["signal"] == "USR1"


def test_a_full_disk_does_not_hide_the_decision(story: Story, capsys: pytest.CaptureFixture[str]) -> None:
    story.attempt("7.0", saves=(10,))
    (story.run / "attempts/7.0/after.json").mkdir()  # a rename onto a folder fails even for root
    main([str(story.run), "--token", "7.0", "--restarts", "0", "--rc", "1"])
    printed = capsys.readouterr()
    assert printed.out.startswith("requeue ") and "cannot be written" in printed.err
