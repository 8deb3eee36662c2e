"""What counts as a bad step, what a run passes over after it, and that a resumed run judges as one without a stop."""

import json
import math
import random

import pytest

from mmscale.config.schema import GuardConfig
from mmscale.errors import CheckpointError, DivergedError, FencedError
from mmscale.train.attempt import Attempt
from mmscale.train.guard import Guard, History, Judgement, Verdict, read_history
from mmscale.train.records import rows_backward, rows_of_steps
from mmscale.train.rollback import PassedOver, read_passed_over, roll_back, steps_to_pass

LAST = 10_000
NAN, INF = math.nan, math.inf
SPIKES = GuardConfig(spike_sigma=6, spike_window=16)


def guard(config, history=History(), last=LAST):  # noqa: B008  (frozen)
    return Guard(config, last, history)


def verdicts(config, losses, history=History()):  # noqa: B008
    """The verdict on each of some losses; nan and inf make no update, None was passed over."""
    judge = guard(config, history)
    return [
        judge.judge(step, loss, 1.0, loss is not None and math.isfinite(loss)).verdict
        for step, loss in enumerate(losses, 1)
    ]


@pytest.mark.parametrize(("loss", "norm"), [(NAN, 1.0), (INF, 1.0), (-INF, 1.0), (2.0, NAN), (2.0, INF), (NAN, NAN)])
def test_what_is_not_finite_is_skipped_and_named(loss, norm):
    judged = guard(GuardConfig()).judge(7, loss, norm, False)
    assert (judged.verdict, judged.kind, judged.bad_steps) == (Verdict.SKIPPED, "nonfinite", (7,))
    assert str(loss) in judged.reason and str(norm) in judged.reason


def test_so_many_in_a_row_roll_back():
    found = verdicts(GuardConfig(max_nonfinite=3), [1.0, NAN, NAN, 1.0, NAN, NAN, NAN])
    assert [v.value for v in found] == ["sound", "skipped", "skipped", "sound", "skipped", "skipped", "rollback"]


def test_a_batch_passed_over_or_without_targets_neither_ends_a_row_nor_counts():
    judge = guard(GuardConfig(max_nonfinite=2, spike_sigma=1, spike_window=8))
    assert judge.judge(1, NAN, NAN, False).verdict is Verdict.SKIPPED
    assert judge.judge(2, None, NAN, False) == Judgement(Verdict.SKIPPED)
    assert judge.judge(3, 0.0, 0.0, False) == Judgement(Verdict.SOUND)
    judged = judge.judge(4, NAN, NAN, False)
    assert (judged.verdict, judged.bad_steps) == (Verdict.ROLLBACK, (1, 4))


def test_the_last_step_must_be_finite():
    judge = guard(GuardConfig(max_nonfinite=3), last=5)
    assert judge.judge(4, NAN, NAN, False).verdict is Verdict.SKIPPED
    assert judge.judge(5, NAN, NAN, False).verdict is Verdict.ROLLBACK


def test_a_spike_rolls_back_and_is_no_part_of_what_later_losses_are_judged_by():
    judge = guard(SPIKES)
    for step in range(1, 17):
        assert judge.judge(step, 2.0 + 0.1 * (-1) ** step, 1.0, True).verdict is Verdict.SOUND
    for step in (17, 18, 19):  # would they count, the third would be none any more
        judged = judge.judge(step, 2.7, 1.0, True)
        assert (judged.verdict, judged.kind, judged.bad_steps) == (Verdict.ROLLBACK, "spike", (step,))
    assert "above 2.6" in judged.reason
    assert judge.judge(20, 2.59, 1.0, True).verdict is Verdict.SOUND


def test_without_a_sigma_nothing_is_a_spike():
    assert set(verdicts(GuardConfig(), [2.0] * 200 + [1e30])) == {Verdict.SOUND}


@pytest.mark.parametrize(("seen", "verdict"), [(3, Verdict.SOUND), (4, Verdict.ROLLBACK)])
def test_a_quarter_of_the_window_must_have_been_seen(seen, verdict):
    assert verdicts(SPIKES, [*[2.0] * seen, 5.0])[-1] is verdict


def test_the_noise_of_a_flat_curve_is_no_spike():
    """On a curve without any deviation every rise would be infinitely many of them."""
    assert verdicts(SPIKES, [*[2.0] * 16, 2.1])[-1] is Verdict.SOUND
    assert verdicts(SPIKES, [*[2.0] * 16, 2.13])[-1] is Verdict.ROLLBACK


def test_a_falling_curve_with_noise_has_no_spikes(seed):
    noise = random.Random(seed)
    losses = [1.5 + 4 * math.exp(-step / 100) + noise.gauss(0, 0.05) for step in range(2000)]
    assert set(verdicts(GuardConfig(spike_sigma=8, spike_window=64), losses)) == {Verdict.SOUND}


def row(step, loss, grad_norm=1.0, passed=False):
    """A line of metrics.jsonl, as the reporter writes it."""
    finite = loss is not None and math.isfinite(loss)
    return {
        "step": step,
        "loss": loss if finite else None,
        "loss_hex": None if passed else float(loss).hex(),
        "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
        "update_skipped": passed or not (finite and math.isfinite(grad_norm)),
    }


def write_rows(path, rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def test_a_resumed_guard_judges_as_one_without_a_stop(tmp_path, seed):
    """At every step of a curve with all that can happen to a step, and after a rollback that left lines of steps done again."""
    draw = random.Random(seed)
    config = GuardConfig(max_nonfinite=4, spike_sigma=3, spike_window=12)
    kinds = draw.choices(["sound", "nan", "norm", "passed", "empty"], [8, 2, 1, 1, 1], k=80)
    curve = [
        {"sound": (draw.gauss(2, 0.003), 1.0, True), "nan": (NAN, NAN, False), "norm": (2.0, INF, False),
         "passed": (None, NAN, False), "empty": (0.0, 0.0, False)}[kind] for kind in kinds
    ]  # fmt: skip
    curve[-1] = (9.0, 1.0, True)  # a spike, behind every cut: a run goes back at once, and none stays in its history
    rows = [
        {**row(step, loss, norm, loss is None), "update_skipped": not has_update}
        for step, (loss, norm, has_update) in enumerate(curve, 1)
    ]
    stale = [row(step, 99.0) for step in range(1, 81)]  # a timeline that was given up
    compared = 0
    for cut in range(0, 80, 3):
        straight = Guard(config, LAST, History())
        for step, numbers in enumerate(curve, 1):
            if step == cut + 1:
                path = write_rows(tmp_path / "metrics.jsonl", [*stale, *rows[:cut], *stale[cut:]])
                history = read_history(path, first_step=cut + 1, config=config)
                resumed = Guard(config, LAST, history)
            judged = straight.judge(step, *numbers)
            if step > cut:
                assert resumed.judge(step, *numbers) == judged, (cut, step)
                compared += judged.verdict is not Verdict.SOUND
        assert judged.kind == "spike"
    assert compared > 100, "there was something to judge"


def test_history_reads_only_as_far_back_as_needed(tmp_path):
    path = write_rows(tmp_path / "m.jsonl", [row(s, float(s)) for s in range(1, 101)])
    broken = b"x" * 70_000 + b"\n" + path.read_bytes()
    path.write_bytes(broken)
    assert read_history(path, 101, SPIKES).losses == tuple(float(s) for s in range(85, 101))
    assert read_history(path, 51, GuardConfig()).losses == (50.0,)
    assert read_history(tmp_path / "none.jsonl", 51, SPIKES) == History()


@pytest.mark.parametrize("length", [1, 10, 65_500, 65_536, 65_537, 200_000])
def test_rows_come_backward_whatever_their_length(tmp_path, length):
    rows = [{"step": step, "text": "é" * (length // (1 + step % 3))} for step in range(7)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert list(rows_backward(path)) == rows[::-1]
    with path.open("ab") as file:
        file.write(b'{"step": 99, "te')  # a kill
    assert list(rows_backward(path)) == rows[::-1]
    assert rows_of_steps(path, [5, 2, 1000]) == {5: rows[5], 2: rows[2]}


def test_the_newest_line_of_a_step_counts(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"step": 1, "n": 1}, {"step": 2, "n": 1}, {"step": 1, "n": 2}])
    assert rows_of_steps(path, [1, 2]) == {1: {"step": 1, "n": 2}, 2: {"step": 2, "n": 1}}


def test_what_is_passed_over():
    assert steps_to_pass((10,), PassedOver(), 1) == (9, 10)
    assert steps_to_pass((8, 9, 10), PassedOver(), 4) == (4, 5, 6, 7, 8, 9, 10)
    assert steps_to_pass((2,), PassedOver(), 64) == (1, 2)
    assert steps_to_pass((1,), PassedOver(), 1) == (1,)
    # those passed over already have made no update, so passing them over again would undo nothing
    assert steps_to_pass((13,), PassedOver({12: "", 11: "", 9: ""}), 2) == (8, 10, 13)


class Run:
    """A run directory with a ledger and without checkpoints, owned by an attempt."""

    def __init__(self, folder):
        self.folder = folder
        self.attempt = Attempt(folder, "7.0")
        self.attempt.claim()
        self.attempt.started(0, 1)
        write_rows(folder / "ledger.jsonl", [{"step": s, "ids": [f"a:{s}", f"b:{s}"]} for s in range(1, 30)])

    def back(self, *bad, config=GuardConfig(), kind="nonfinite"):  # noqa: B008
        judged = Judgement(Verdict.ROLLBACK, kind, "loss nan", bad)
        return roll_back(self.folder, self.attempt, config, read_passed_over(self.folder), bad[-1], judged)


def test_rollbacks_double_what_they_pass_over_and_are_bounded(tmp_path):
    run = Run(tmp_path)
    assert read_passed_over(tmp_path) == PassedOver()
    config = GuardConfig(pass_over=2, max_rollbacks=3)
    made = [run.back(12, config=config), run.back(20, config=config), run.back(22, 23, config=config)]
    assert [m.steps for m in made] == [(10, 11, 12), (16, 17, 18, 19, 20), (6, 7, 8, 9, 13, 14, 15, 21, 22, 23)]
    assert [(m.base, m.number) for m in made] == [(0, 1), (0, 2), (0, 3)]
    before = (tmp_path / "passed_over.json").read_bytes()
    with pytest.raises(DivergedError, match=r"step 25: .*loss nan.*max_rollbacks=3.*mmscale replay"):
        run.back(25, config=config)
    assert (tmp_path / "passed_over.json").read_bytes() == before
    content = json.loads(before)
    assert content["rollbacks"] == 3
    assert content["steps"]["11"] == {"reason": "nonfinite at step 12", "ids": ["a:11", "b:11"]}
    passed = read_passed_over(tmp_path)
    assert sorted(passed.reasons) == sorted(s for m in made for s in m.steps) and passed.num_rollbacks == 3


def test_no_rollback_at_all_when_none_is_allowed(tmp_path):
    with pytest.raises(DivergedError):
        Run(tmp_path).back(5, config=GuardConfig(max_rollbacks=0))
    assert not (tmp_path / "passed_over.json").exists()


def test_a_fenced_attempt_takes_nothing_back(tmp_path):
    run = Run(tmp_path)
    Attempt(tmp_path, "8.0").claim()
    with pytest.raises(FencedError):
        run.back(5)
    assert not (tmp_path / "passed_over.json").exists()


@pytest.mark.parametrize(
    "text", ['{"steps": {"x": {"reason": "a"}}, "rollbacks": 1}', '{"steps": {}}', "[]", "{", '{"steps": [1], "rollbacks": 1}']
)  # fmt: skip
def test_a_damaged_file_is_refused(tmp_path, text):
    (tmp_path / "passed_over.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"passed_over\.json"):
        read_passed_over(tmp_path)
