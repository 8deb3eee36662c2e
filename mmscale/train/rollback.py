"""What a run does when training went wrong: back to a checkpoint, and past the batches that led there.

    passed_over.json   the steps whose batch is consumed without an update, why, and how often the run went back

Going back alone would repeat the same steps to the same end. Leaving out the bad batch alone helps only when that batch is to blame:
a loss that is not finite, or spikes, is computed with the weights that the batches before it have made. So these are left out too, and
twice as many at each further rollback, as PaLM was trained (Chowdhery et al. 2022, section 5.1: go back about 100 steps, pass over 200
to 500 batches; the same batches did no harm to other weights).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmscale.config.schema import GuardConfig
from mmscale.errors import CheckpointError, DivergedError
from mmscale.logging import get_logger
from mmscale.train.attempt import Attempt, Lineage, read_json, write_json
from mmscale.train.checkpoint_folders import list_checkpoints, problems_of, set_aside
from mmscale.train.guard import Judgement
from mmscale.train.manifest import folder_step
from mmscale.train.records import rows_of_steps

log = get_logger(__name__)

PASSED_OVER = "passed_over.json"


@dataclass(frozen=True, slots=True)
class PassedOver:
    """`reasons`: step -> why its batch is consumed without an update. `num_rollbacks`: how often the run went back."""

    reasons: Mapping[int, str] = field(default_factory=dict)
    num_rollbacks: int = 0


@dataclass(frozen=True, slots=True)
class Rollback:
    """Back to the checkpoint of `base` (0 = the beginning); `steps` are passed over from now on."""

    base: int
    steps: tuple[int, ...]
    number: int


def read_passed_over(folder: Path) -> PassedOver:
    """What a run passes over, from its directory. Raises CheckpointError when the file is damaged."""
    path = folder / PASSED_OVER
    content = read_json(path) or {"steps": {}, "rollbacks": 0}
    try:
        reasons = {int(step): str(entry["reason"]) for step, entry in content["steps"].items()}
        return PassedOver(reasons, int(content["rollbacks"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: expected steps with reasons and the number of rollbacks, found {type(error).__name__}: {error}; restore it, or "
            "remove it to train on every batch"
        ) from error


def roll_back(
    folder: Path, attempt: Attempt, guard: GuardConfig, passed: PassedOver, step: int, judgement: Judgement
) -> Rollback:
    """Takes a run back behind `step`; the next start goes on from there, whatever its number of ranks.

    It goes to the newest checkpoint before the first batch that is to be passed over, else to the oldest there is. Checkpoints after
    that are set aside first, so that a kill at any moment leaves a run that comes to the same decision, or one that has gone back.

    Raises:
        DivergedError: the run went back `max_rollbacks` times already.
        FencedError: another attempt owns the run.
        CheckpointError: the disk refuses.

    Distributed: on rank 0 only.
    """
    if passed.num_rollbacks >= guard.max_rollbacks:
        raise DivergedError(
            f"step {step}: expected finite losses without spikes, found {judgement.reason}, after {passed.num_rollbacks} rollbacks of "
            f"train.guard.max_rollbacks={guard.max_rollbacks}; lower train.lr, set train.clip, or look at the samples of this step: "
            f"mmscale replay {folder} --step {step}"
        )
    attempt.check_owner()
    wanted = steps_to_pass(judgement.bad_steps, passed, guard.pass_over << passed.num_rollbacks)
    try:
        base = _go_back(folder / "checkpoints", wanted[0], attempt.lineage(), f"step {step}: {judgement.reason}")
        made = Rollback(base, tuple(s for s in wanted if s > base), passed.num_rollbacks + 1)
        _write(folder, passed, made, f"{judgement.kind} at step {step}")
    except OSError as error:
        raise CheckpointError(
            f"expected to go back from step {step} in {folder}, found {type(error).__name__}: {error}; make room or fix the permissions "
            "and start again"
        ) from error
    log.warning(
        "step %d: %s; rollback %d of %d to step %d, steps %s are passed over",
        step, judgement.reason, made.number, guard.max_rollbacks, base, ", ".join(map(str, made.steps)),
    )  # fmt: skip
    return made


def steps_to_pass(bad_steps: Sequence[int], passed: PassedOver, num_before: int) -> tuple[int, ...]:
    """The bad steps and the `num_before` trained ones before them, ascending.

    Example:
        >>> steps_to_pass((7,), PassedOver({5: "spike"}), 2)
        (4, 6, 7)
    """
    trained = [step for step in range(1, bad_steps[0]) if step not in passed.reasons]
    return (*trained[-num_before:], *bad_steps)


def _go_back(root: Path, first: int, lineage: Lineage, reason: str) -> int:
    """The step of the newest whole checkpoint before `first`, else of the oldest whole one; 0 = there is none. Later ones are set
    aside."""
    base = 0
    for path in list_checkpoints(root):
        if not problems_of(path, lineage):
            base = folder_step(path.name) or 0
            if base < first:
                break
    for path in list_checkpoints(root):
        if (folder_step(path.name) or 0) > base > 0:
            set_aside(path, [reason])
    return base


def _write(folder: Path, passed: PassedOver, made: Rollback, reason: str) -> None:
    """Adds the steps of a rollback to the run's file, with the samples of their batches."""
    rows = rows_of_steps(folder / "ledger.jsonl", made.steps)
    content = read_json(folder / PASSED_OVER) or {"steps": {}}
    new = {str(step): {"reason": reason, "ids": rows.get(step, {}).get("ids")} for step in made.steps}
    write_json(folder / PASSED_OVER, {"steps": {**content["steps"], **new}, "rollbacks": made.number})
