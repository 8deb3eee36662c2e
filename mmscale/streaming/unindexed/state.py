"""The resume point of a stream without an index, and what became of every sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mmscale.errors import CheckpointError, DataError
from mmscale.logging import get_logger
from mmscale.streaming.plan import BY_SIZE
from mmscale.streaming.state import DELIVERED, JUDGED_FROM
from mmscale.streaming.unindexed.progress import End, Place, Progress, advance
from mmscale.types import Skip

log = get_logger(__name__)


@dataclass(frozen=True)
class UnindexedFacts:
    """What the stream is made of; the same on all ranks.

    `fingerprint`: by source, the digest of its shards and their order. `num_shards`: by source, in the order of
    `Place.source_idx`. `max_bad`: see `DataConfig`.
    """

    fingerprint: Mapping[str, str]
    num_shards: Mapping[str, int]
    max_bad: float


@dataclass(frozen=True)
class UnindexedState:
    """The resume point after a step: `progress` by source, and the account of the epochs that are not complete.

    `account[source, epoch]` counts samples as `delivered` or by the reason of their skip. Since the run began, `num_seen`
    counts samples, `num_skipped` those not delivered, `num_bad` those skipped for another reason than their size.
    """

    facts: UnindexedFacts
    progress: tuple[Progress, ...]
    account: Mapping[tuple[str, int], Mapping[str, int]] = field(default_factory=dict)
    num_seen: int = 0
    num_skipped: int = 0
    num_bad: int = 0

    @classmethod
    def start(cls, facts: UnindexedFacts) -> UnindexedState:
        """The beginning of a run."""
        return cls(facts, tuple(Progress() for _ in facts.num_shards))

    def to_dict(self) -> dict[str, Any]:
        """The state as JSON values."""
        account: dict[str, dict[str, dict[str, int]]] = {}
        for (source, epoch), counts in self.account.items():
            account.setdefault(source, {})[str(epoch)] = dict(counts)
        names = self.facts.num_shards
        return {
            "mode": "stream",
            "fingerprint": dict(self.facts.fingerprint),
            "progress": {name: progress.to_dict() for name, progress in zip(names, self.progress, strict=True)},
            "account": account,
            "num_seen": self.num_seen,
            "num_skipped": self.num_skipped,
            "num_bad": self.num_bad,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], facts: UnindexedFacts) -> UnindexedState:
        """The state that `to_dict` wrote, for the stream of `facts`.

        Sources may have been added (they begin), removed (they are forgotten) or weighted anew.

        Raises:
            CheckpointError: the state is of an indexed run, or a source has other shards or another order now.
        """
        if data.get("mode") != "stream":
            raise CheckpointError(
                "data state: expected one of stream mode, found that of indexed sources; restore the sources of the run, or "
                "start a new one with another run.dir"
            )
        try:
            saved = {str(name): str(digest) for name, digest in data["fingerprint"].items()}
            progress = {name: Progress.from_dict(data["progress"][name]) for name in saved}
            account = {
                (str(source), int(epoch)): {str(r): int(n) for r, n in counts.items()}
                for source, epochs in data["account"].items()
                for epoch, counts in epochs.items()
            }
            totals = [int(data[name]) for name in ("num_seen", "num_skipped", "num_bad")]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            text = f"data state: expected fingerprint, progress and account, found {type(error).__name__}: {error}"
            raise CheckpointError(f"{text}; resume from another checkpoint") from error
        _compare(saved, facts.fingerprint)
        kept = {key: counts for key, counts in account.items() if key[0] in facts.num_shards}
        return cls(facts, tuple(progress.get(name, Progress()) for name in facts.num_shards), kept, *totals)

    def after(self, taken: Sequence[Place], ended: Sequence[End], skips: Sequence[Skip]) -> UnindexedState:
        """The state when the samples of a step were taken on all ranks; `skips` are those of them that were skipped.

        Raises:
            DataError: more than `max_bad` of the samples were bad.
        """
        account = {key: Counter(counts) for key, counts in self.account.items()}
        names = list(self.facts.num_shards)
        for place in taken:
            name = names[place.source_idx]
            account.setdefault((name, place.unit // self.facts.num_shards[name]), Counter())[DELIVERED] += 1
        for skip in skips:
            account[skip.source, skip.epoch][DELIVERED] -= 1
            account[skip.source, skip.epoch][skip.reason] += 1
        state = replace(
            self,
            progress=advance(self.progress, taken, ended),
            account=account,
            num_seen=self.num_seen + len(taken),
            num_skipped=self.num_skipped + len(skips),
            num_bad=self.num_bad + sum(skip.reason not in BY_SIZE for skip in skips),
        )
        _judge(state)
        return replace(state, account=_close_epochs(state))


def _close_epochs(state: UnindexedState) -> dict[tuple[str, int], dict[str, int]]:
    """The account without the epochs whose shards are all done; each of them is logged."""
    still_open = {}
    done = dict(zip(state.facts.num_shards, state.progress, strict=True))
    for (source, epoch), counts in state.account.items():
        if done[source].next < (epoch + 1) * state.facts.num_shards[source]:
            still_open[source, epoch] = {reason: n for reason, n in counts.items() if n}
            continue
        skipped = {reason: n for reason, n in sorted(counts.items()) if reason != DELIVERED and n}
        text = ", ".join(f"{reason} {n}" for reason, n in skipped.items()) or "none"
        log.info("epoch %d of '%s': read %d = delivered %d + skipped %d (%s)",
                 epoch, source, sum(counts.values()), counts.get(DELIVERED, 0), sum(skipped.values()), text)  # fmt: skip
    return still_open


def _judge(state: UnindexedState) -> None:
    if state.num_seen < JUDGED_FROM or state.num_bad <= state.facts.max_bad * state.num_seen:
        return
    reasons = Counter[str]()
    for (source, _), counts in state.account.items():
        for reason, n in counts.items():
            if reason not in (DELIVERED, *BY_SIZE):
                reasons[f"{reason} in '{source}'"] += n
    found = f"{state.num_bad} of {state.num_seen} ({state.num_bad / state.num_seen:.1%})"
    of_late = ", ".join(f"{reason} {n}" for reason, n in reasons.most_common(5))
    raise DataError(
        f"expected at most data.max_bad={state.facts.max_bad:.1%} bad samples, found {found}, of late: {of_late}; look at the "
        "skips in skipped.jsonl, or raise data.max_bad"
    )


def _compare(saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    differing = sorted(name for name in saved.keys() & now.keys() if saved[name] != now[name])
    if differing:
        raise CheckpointError(
            f"data state: expected the shards, data.seed and chat encoding of the checkpoint, found others for the sources "
            f"{', '.join(differing)}; restore them, or start a new run with another run.dir"
        )
    for what, names in (("added", now.keys() - saved.keys()), ("removed", saved.keys() - now.keys())):
        if names:
            log.warning("sources %s since the checkpoint: %s", what, ", ".join(sorted(names)))
