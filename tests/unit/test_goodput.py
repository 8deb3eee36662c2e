"""The time line of a run: what each category gets, and that all of them together are the wall-clock."""

import json
import random
import time

import pytest

from mmscale.errors import ConfigError
from mmscale.train.goodput import CATEGORIES, account, goodput_line, goodput_of
from mmscale.train.history import AttemptRecord, Event, History, Step, read_history, read_steps_backwards

T0 = 1_763_000_000.0


def step(number, attempt, ended_at, took_s=1.0, wait=0.0, comm=0.0):
    return Step(number, attempt, T0 + ended_at, took_s, wait, comm, 2.0, 100.0, 0.9, wait / took_s if took_s else 0.0)


def attempt(token, first_at, last_at, submitted_at=None, hung_at=None, **more):
    submitted, hung = (None if at is None else T0 + at for at in (submitted_at, hung_at))
    return AttemptRecord(token, T0 + first_at, T0 + last_at, submitted_at=submitted, hung_at=hung, **more)


def ledger(attempts, steps, events=()):
    """The account of steps in the order in which they were written."""
    found = account(History(None, tuple(attempts), tuple(events)), reversed(steps))
    assert set(found.seconds) == set(CATEGORIES)
    assert sum(found.seconds.values()) == pytest.approx(found.wall_s, abs=1e-6)
    assert all(seconds >= 0 for seconds in found.seconds.values()), found.seconds
    return found


def spent(found):
    return {name: round(seconds, 6) for name, seconds in found.seconds.items() if seconds}


def test_one_attempt_by_hand():
    """Submitted at 0, started at 10, first step 15 to 16, a save of 0.5 s and a validation of 1.5 s behind step 2, end at 21."""
    events = [
        Event("save", 2, T0 + 18, "7.0", {"blocked_s": 0.5}),
        Event("validation", 2, T0 + 20, "7.0", {"seconds": 1.5}),
    ]
    steps = [step(1, "7.0", 16, 1.0, wait=0.25, comm=0.125), step(2, "7.0", 17.1), step(3, "7.0", 20.2)]
    found = ledger([attempt("7.0", 10, 21, submitted_at=0, submission="7", outcome="done")], steps, events)
    assert spent(found) == {
        "queue": 10, "startup": 5, "data_wait": 0.25, "exposed_comm": 0.125, "compute": 2.625, "checkpoint": 0.5,
        "validation": 1.5, "shutdown": 0.8, "other": 0.2,
    }  # fmt: skip
    assert found.goodput == pytest.approx(2.625 / 21)
    assert goodput_line(found).startswith("goodput 12.5% of 21.0 s in 1 attempts: queue 47.6%, startup 23.8%")


def test_steps_done_again_are_lost_and_the_requeue_is_queue():
    """Killed at step 4 with a checkpoint of step 2: steps 3 and 4 count as redone, whole, with their waits."""
    first = [step(n, "7.0", 5 + n, wait=0.5) for n in (1, 2, 3, 4)]
    second = [step(n, "7.1", 25 + n, wait=0.5) for n in (3, 4, 5)]
    records = [
        attempt("7.0", 2, 9.5, submitted_at=0, submission="7"),
        attempt("7.1", 20, 31, submitted_at=0, submission="7", base_step=2, outcome="done"),
    ]
    found = ledger(records, first + second)
    assert spent(found) == {
        "queue": 2 + 10.5, "startup": 3 + 7, "redone": 2, "compute": 2.5, "data_wait": 2.5, "shutdown": 0.5 + 1,
    }  # fmt: skip
    assert [(one.num_steps, one.num_redone) for one in found.attempts] == [(4, 2), (3, 0)]


def test_lost_steps_count_before_they_are_done_again():
    records = [attempt("7.0", 0, 5), attempt("7.1", 6, 7, base_step=2)]
    found = ledger(records, [step(n, "7.0", n) for n in (1, 2, 3, 4)])
    assert found.seconds["redone"] == 2 and found.seconds["compute"] == 2


def test_a_rollback_inside_an_attempt():
    """Steps 3 and 4 are done, the run goes back to 2; the way back is start-up."""
    steps = [step(n, "7.0", n) for n in (1, 2, 3, 4)] + [step(n, "7.0", 7 + n) for n in (3, 4)]
    assert spent(ledger([attempt("7.0", 0, 11, outcome="done")], steps)) == {"redone": 2, "compute": 4, "startup": 5}


def test_a_hang_is_all_time_from_the_last_step_on():
    records = [attempt("7.0", 0, 40, hang="rank 1 hung"), attempt("7.1", 45, 50, base_step=2, outcome="done")]
    found = ledger(records, [step(1, "7.0", 1), step(2, "7.0", 2), step(3, "7.1", 50)])
    assert spent(found) == {"compute": 3, "hang": 38, "idle": 5, "startup": 4}


def test_a_step_that_ends_with_the_hang_is_no_lost_work():
    """Rank 1 is stopped at 2.5 and woken at 40 to print its stacks: step 3 is then recorded with 38 s, and done again."""
    records = [
        attempt("7.0", 0, 40.5, hang="rank 1 hung", hung_at=2.5),
        attempt("7.1", 45, 50, base_step=2, outcome="done"),
    ]
    found = ledger(records, [step(1, "7.0", 1), step(2, "7.0", 2), step(3, "7.0", 40, 38), step(3, "7.1", 50)])
    assert spent(found) == {"compute": 3, "redone": 0.5, "hang": 38, "idle": 4.5, "startup": 4}


def test_a_fenced_attempt_has_no_time_of_its_own():
    """It works on for 10 s beside its successor: those steps are not in the time line."""
    records = [attempt("7.0", 0, 20), attempt("7.1", 10, 20, base_step=8, outcome="done")]
    old = [step(n, "7.0", n) for n in range(1, 20)]
    new = [step(n, "7.1", n + 3) for n in range(9, 18)]
    found = ledger(records, sorted(old + new, key=lambda one: one.ended_at))
    assert found.wall_s == 20
    assert spent(found) == {"compute": 8 + 9, "redone": 2, "startup": 1}
    assert found.attempts[0].last_step == 10


def test_a_run_that_is_started_again_by_hand_was_idle():
    records = [
        attempt("7.0", 0, 10, submission="7", outcome="stopped"),
        attempt("8.0", 110, 112, submission="8", submitted_at=100, base_step=5),
    ]
    assert spent(ledger(records, [])) == {"idle": 90, "queue": 10, "startup": 12}


def test_other_holds_the_step_under_way():
    assert spent(ledger([attempt("7.0", 0, 9)], [step(1, "7.0", 2, 1.0)])) == {"startup": 1, "compute": 1, "other": 7}


def test_no_attempt_and_no_step():
    found = ledger([], [])
    assert found.wall_s == 0 and found.goodput == 0 and found.attempts == ()
    assert goodput_line(found).startswith("goodput 0.0% of 0.0 s")


def random_history(rng):
    """Attempts with any overlap, clocks that disagree, rollbacks, steps that never were, times that lie."""
    records, steps, events, at = [], [], [], rng.uniform(0, 50)
    for number in range(rng.randint(1, 6)):
        token = f"7.{number}"
        begin = at + rng.choice([0, rng.uniform(0, 30), -rng.uniform(0, 10)])
        now, done = begin + rng.uniform(-1, 20), rng.randint(0, 8)
        base = rng.choice([None, done])
        for _ in range(rng.randint(0, 30)):
            done += 1
            if rng.random() < 0.05:
                done = max(1, done - 5)
            took = rng.choice([rng.uniform(0, 3), rng.uniform(0, 30), 0.0])
            now += rng.choice([took, took + rng.uniform(0, 1), took - rng.uniform(0, 1)])
            steps.append(step(done, token, now, took, rng.uniform(0, 2) * took, rng.uniform(0, 2) * took))
            if rng.random() < 0.3:
                name, key = rng.choice([("save", "blocked_s"), ("validation", "seconds")])
                events.append(Event(name, done, T0 + now, token, {key: rng.uniform(0, 5)}))
        last = rng.choice([now, now + rng.uniform(0, 10), begin + 1])
        records.append(
            attempt(
                token,
                begin,
                max(begin, last),
                rng.choice([None, begin - rng.uniform(-5, 30)]),
                submission=rng.choice(["7", "7", "8", None]),
                base_step=base,
                hang=rng.choice([None, None, "hung"]),
                hung_at=rng.choice([None, begin + rng.uniform(-5, 30)]),
                outcome=rng.choice([None, "done", "stopped"]),
            )
        )
        at = last
    records.sort(key=lambda one: (one.first_at, one.token))
    if rng.random() < 0.3:
        steps.sort(key=lambda one: one.ended_at)
    return records, steps, events


def test_every_history_adds_up(seed):
    rng = random.Random(seed)
    totals = dict.fromkeys(CATEGORIES, 0.0)
    for _ in range(2000):
        records, steps, events = random_history(rng)
        found = ledger(records, steps, events)
        ends = [one.last_at for one in records] + [one.ended_at for one in steps]
        assert (
            found.wall_s
            <= max(ends) - min(min(one.first_at, one.submitted_at or one.first_at) for one in records) + 1e-3
        )
        for name, seconds in found.seconds.items():
            totals[name] += seconds
    assert all(totals.values()), totals


# ---------------------------------------------------------------- from files


def row(number, token, ended_at, took_s=1.0):
    return {
        "step": number, "loss": 2.5, "loss_hex": (2.5).hex(), "grad_norm": 1.0, "lr": 1e-3, "tokens": {"text": 10, "image": 5},
        "target_tokens": {"text": 3}, "tokens_per_s": 15.0, "mfu": None, "hfu": None, "data_wait_frac": 0.25, "fill": 0.5, "skipped": 0,
        "step_time_s": took_s, "epoch": 0.1, "memory_gb": 1.0, "update_skipped": False, "comm_bytes": {}, "comm_wait_s": 0.0,
        "ended_at": T0 + ended_at, "attempt": token,
    }  # fmt: skip


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_a_run_directory_with_torn_and_missing_files(tmp_path):
    run = tmp_path / "run"
    write(
        run / "attempts/7.0/job.json",
        {"job": "7", "submission": "7", "submitted_at": T0, "started_at": T0 + 4, "nodes": ["a"]},
    )
    write(run / "attempts/7.0/claim.json", {"token": "7.0", "predecessor": None, "at": T0 + 6})
    write(
        run / "attempts/7.1/job.json",
        {"job": "7", "submission": "7", "submitted_at": T0, "started_at": T0 + 20, "nodes": ["b"]},
    )
    write(run / "attempts/7.1/start.json", {"base_step": 1, "at": T0 + 22, "world_size": 2, "host": "b", "pid": 1})
    write(run / "attempts/7.1/end.json", {"outcome": "stopped", "step": 3, "reason": "", "at": T0 + 26})
    (run / "attempts/7.1/after.json").write_text('{"decision": "requ')
    write(run / "attempts/7.2/job.json", {})  # killed before it said when
    lines = [
        json.dumps(row(n, token, at)) for n, token, at in ((1, "7.0", 8), (2, "7.0", 9), (2, "7.1", 24), (3, "7.1", 25))
    ]
    (run / "metrics.jsonl").write_text("\n".join([*lines[:2], '{"step": 3, "lo', "[]", *lines[2:]]) + '\n{"step": 4')
    (run / "events.jsonl").write_text(
        '{"event": "stop", "step": 3, "at": 1763000025.5, "attempt": "7.1", "signal": "SIGTERM"}\n{"ev'
    )
    history = read_history(run)
    assert [one.token for one in history.attempts] == ["7.0", "7.1"]
    assert history.attempts[1].outcome == "stopped" and history.attempts[1].decision is None
    assert [one.step for one in read_steps_backwards(run)] == [3, 2, 2, 1]
    found = goodput_of(run)
    assert spent(found) == {
        "queue": 4 + 11, "startup": 3 + 3, "redone": 1, "compute": 2.25, "data_wait": 0.75, "shutdown": 1,
    }  # fmt: skip


def test_a_run_without_slurm_begins_with_its_process(tmp_path):
    """`start` says how long the process had been running."""
    run = tmp_path / "run"
    write(run / "attempts/local.h.1.2/claim.json", {"token": "local.h.1.2", "predecessor": None, "at": T0 + 9})
    run.joinpath("events.jsonl").write_text(
        json.dumps({"event": "start", "step": 0, "at": T0 + 10, "attempt": "local.h.1.2", "startup_s": 10.0}) + "\n"
    )
    run.joinpath("metrics.jsonl").write_text(json.dumps(row(1, "local.h.1.2", 12)) + "\n")
    assert spent(goodput_of(run)) == {"startup": 11, "compute": 0.75, "data_wait": 0.25}


def test_lines_of_a_version_without_times_are_steps_all_the_same(tmp_path):
    old = {key: value for key, value in row(1, "x", 1).items() if key not in ("ended_at", "attempt")}
    tmp_path.joinpath("metrics.jsonl").write_text(json.dumps(old) + "\n")
    found = goodput_of(tmp_path)
    assert found.wall_s == 0 and found.recent[0].step == 1


def test_lines_across_blocks_are_whole(tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    text = "".join(json.dumps({**row(n, "a", n), "pad": "x" * rng.randint(0, 300)}) + "\n" for n in range(1, 200))
    tmp_path.joinpath("metrics.jsonl").write_text(text + rng.choice(["", "{", '{"step": 200']))
    for block in (7, 64, 1000, 1 << 20):
        monkeypatch.setattr("mmscale.train.records._BLOCK_BYTES", block)
        assert [one.step for one in read_steps_backwards(tmp_path)] == list(range(199, 0, -1))


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"expected a run directory, found none of .* give the folder in `run.dir`"):
        read_history(tmp_path)


def test_a_long_run_is_streamed(tmp_path):
    """20,000 steps; nothing is held but the newest, and the time per step is small."""
    import tracemalloc

    with tmp_path.joinpath("metrics.jsonl").open("w") as file:
        for number in range(1, 20_001):
            file.write(json.dumps(row(number, "", number)) + "\n")
    tmp_path.joinpath("events.jsonl").write_text(
        json.dumps({"event": "start", "step": 0, "at": T0, "attempt": ""}) + "\n"
    )
    started = time.process_time()
    found = goodput_of(tmp_path)
    assert found.attempts[0].num_steps == 20_000
    print(f"{(time.process_time() - started) / 20_000 * 1e6:.1f} us per step")
    tracemalloc.start()
    goodput_of(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 << 20, peak
