"""The rule by which a run goes on when its mixture was changed at a resume.

* Documents that were drawn but not consumed stay, and are packed again, in a window of their own: however often a mixture is
  changed, no more of them wait than one window holds.
* Each source goes on at its next draw, in the epoch where it is; the new shares hold from there.
* A new source begins with its epoch 0. One that was removed leaves, with its documents that were not consumed.
* A source with another `max_samples` is another set of samples: its epoch ends unfinished, the next one begins.
* A source that is past a lower `max_epochs` ends at once, in the middle of its epoch.
* The data, text encoding and lengths of a source that stays must be those of the checkpoint.

So within a source every sample still comes once per epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from mmscale.errors import CheckpointError
from mmscale.logging import get_logger
from mmscale.streaming.plan import PlanState, Rest

log = get_logger(__name__)

Account = Mapping[tuple[str, int], Mapping[str, int]]
Sources = Mapping[str, "SourceFacts"]


@dataclass(frozen=True)
class SourceFacts:
    """One source of a stream. `num_rows`: samples of an epoch; `unplanned`: those never planned, by reason.

    `digests`: part (shards, encoding, lengths) -> digest. `share` of the draws as a fraction, `max_samples`, `max_epochs`.
    """

    num_rows: int
    unplanned: Mapping[str, int]
    digests: Mapping[str, str]
    share: str
    max_samples: int | None
    max_epochs: int | None

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SourceFacts:
        """What `to_dict` wrote. Raises KeyError, TypeError or ValueError when the values have another form."""
        counts = {str(k): int(v) for k, v in data["unplanned"].items()}
        digests = {str(k): str(v) for k, v in data["digests"].items()}
        caps = (None if data[k] is None else int(data[k]) for k in ("max_samples", "max_epochs"))
        return cls(int(data["num_rows"]), counts, digests, str(Fraction(data["share"])), *caps)

    @property
    def mixing(self) -> tuple[str, int | None, int | None]:
        """What may change at a resume."""
        return self.share, self.max_samples, self.max_epochs


def carry_on(plan: PlanState, account: Account, before: Sources, now: Sources) -> tuple[PlanState, Account]:
    """Place and account for the sources `now`, from those of a checkpoint with the sources `before`.

    Raises:
        CheckpointError: the data, encoding or lengths of a source that is in both differ.
    """
    _check_data(before, now)
    if {name: s.mixing for name, s in before.items()} == {name: s.mixing for name, s in now.items()}:
        return plan, account
    same_rows = {name for name in now if name in before and now[name].num_rows == before[name].num_rows}
    rest = Rest(plan.carry, plan.drawn) if plan.rest is None else plan.rest()
    _tell(before, now)
    _close(account, before, {name for name in before if name not in same_rows})
    drawn = dict(rest.drawn)
    for name in now:
        if name not in before:
            drawn[name] = 0
        elif name not in same_rows:
            epochs_begun = -(-drawn.get(name, 0) // before[name].num_rows)
            drawn[name] = epochs_begun * now[name].num_rows
    window = plan.window if plan.rest is None else plan.window + 1
    changed = PlanState(
        window=window,
        step=plan.step,
        since=window + 1,
        drawn=tuple((name, drawn.get(name, 0)) for name in now),
        carry=rest.carry.only(same_rows),
    )
    return changed, {key: counts for key, counts in account.items() if key[0] in same_rows}


def _check_data(before: Sources, now: Sources) -> None:
    for name in sorted({*before} & {*now}):
        saved, found = before[name].digests, now[name].digests
        differing = sorted(part for part in {*saved, *found} if saved.get(part) != found.get(part))
        if differing:
            parts = ", ".join(f"{p} ({saved.get(p, 'none')} then, {found.get(p, 'none')} now)" for p in differing)
            raise CheckpointError(
                f"data state: source '{name}': expected the data of the checkpoint, found another {parts}; restore them, give "
                "the source another name to start it anew, or start a new run with another run.dir"
            )


def _tell(before: Sources, now: Sources) -> None:
    log.warning("the mixture is another one than in the checkpoint; the run goes on with the new one")
    for name in sorted({*before, *now}):
        if name not in now:
            log.warning("  '%s' was removed", name)
        elif name not in before:
            log.warning("  '%s' is new and has %.4g of the draws", name, float(Fraction(now[name].share)))
        elif before[name].mixing != now[name].mixing:
            log.warning("  '%s': share %.4g -> %.4g, max_samples %s -> %s, max_epochs %s -> %s", name,
                        float(Fraction(before[name].share)), float(Fraction(now[name].share)),
                        before[name].max_samples, now[name].max_samples,
                        before[name].max_epochs, now[name].max_epochs)  # fmt: skip


def _close(account: Account, before: Sources, names: set[str]) -> None:
    """Says which epochs end unfinished."""
    for (name, epoch), counts in sorted(account.items()):
        if name in names:
            text = ", ".join(f"{reason} {n}" for reason, n in sorted(counts.items()))
            log.warning("  epoch %d of '%s' ends unfinished: %d of %d samples came (%s)",
                        epoch, name, sum(counts.values()), before[name].num_rows, text)  # fmt: skip
