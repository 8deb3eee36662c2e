"""Where the stream stands, and what became of every sample: a few KB of JSON inside the checkpoint."""

from __future__ import annotations

import base64
import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mmscale.errors import CheckpointError, DataError
from mmscale.logging import get_logger
from mmscale.streaming.plan import BY_SIZE, PlannedStep, PlanState
from mmscale.streaming.remix import SourceFacts, carry_on
from mmscale.types import Skip

log = get_logger(__name__)

DELIVERED = "delivered"
JUDGED_FROM = 1000
"""Samples after which the share of bad ones is judged: a single fault in a small start says nothing."""

_NAMED_BAD = 5

Account = Mapping[tuple[str, int], Mapping[str, int]]


@dataclass(frozen=True)
class StreamFacts:
    """What the stream is made of; the same on all ranks.

    `fingerprint`: part -> digest of what decides the plan besides the sources. `sources`: name -> facts, in the order of the
    plan. `max_bad`, `max_bad_in_a_row`: see `DataConfig`.
    """

    fingerprint: Mapping[str, str]
    sources: Mapping[str, SourceFacts]
    max_bad: float
    max_bad_in_a_row: int

    @property
    def num_rows(self) -> int:
        """Samples of one epoch of every source."""
        return sum(source.num_rows for source in self.sources.values())

    def digests(self) -> dict[str, str]:
        """All that decides the plan, by name: streams in which it is equal have equal packs."""
        parts = dict(self.fingerprint)
        for name, source in self.sources.items():
            parts |= {f"{part} of '{name}'": digest for part, digest in source.digests.items()}
            parts[f"mixing of '{name}'"] = str(source.mixing)
        return parts


@dataclass(frozen=True)
class StreamState:
    """The resume point after a step, with the account of the epochs that are not complete.

    `account[source, epoch]` counts samples as `delivered` or by the reason of their skip. Since the run began, `num_seen`
    counts samples, `num_skipped` those not delivered, `num_bad` those skipped for another reason than their size.
    `bad_run`: how many samples of a source in a row were bad just now, where it is not 0.
    """

    facts: StreamFacts
    plan: PlanState = field(default_factory=PlanState)
    account: Account = field(default_factory=dict)
    num_seen: int = 0
    num_skipped: int = 0
    num_bad: int = 0
    bad_run: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_epochs(self) -> float:
        """Samples drawn so far, in epochs of all sources together."""
        return self.num_seen / self.facts.num_rows

    def to_dict(self) -> dict[str, Any]:
        """The state as JSON values, below 64 KB; equal for equal states, however they came about."""
        account: dict[str, dict[str, dict[str, int]]] = {}
        for (source, epoch), counts in sorted(self.account.items()):
            account.setdefault(source, {})[str(epoch)] = dict(sorted(counts.items()))
        by_source = {
            "sources": {name: source.to_dict() for name, source in self.facts.sources.items()},
            "plan": self.plan.to_dict(),
            "account": account,
            "bad_run": dict(sorted(self.bad_run.items())),
        }
        return {
            "fingerprint": dict(self.facts.fingerprint),
            "num_seen": self.num_seen,
            "num_skipped": self.num_skipped,
            "num_bad": self.num_bad,
            "packed": pack_json(by_source),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], facts: StreamFacts) -> StreamState:
        """The state that `to_dict` wrote, for the stream that `facts` describe.

        Another mixture of sources goes on from here by the rule in `remix.carry_on`, which is logged.

        Raises:
            CheckpointError: the values have another form, or the data, the packing or the planner differ; the text names what.
        """
        try:
            saved = {str(k): str(v) for k, v in data["fingerprint"].items()}
            _check_fingerprint(saved, facts.fingerprint)  # first: another version's state has another form
            num_seen, num_skipped, num_bad = (int(data[name]) for name in ("num_seen", "num_skipped", "num_bad"))
            by_source = unpack_json(data["packed"])
            before = {str(name): SourceFacts.from_dict(source) for name, source in by_source["sources"].items()}
            account: Account = {
                (str(source), int(epoch)): {str(r): int(n) for r, n in counts.items()}
                for source, epochs in by_source["account"].items()
                for epoch, counts in epochs.items()
            }
            bad_run = {str(name): int(n) for name, n in by_source["bad_run"].items()}
            plan = PlanState.from_dict(by_source["plan"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            text = f"data state: expected fingerprint, counts and packed, found {type(error).__name__}: {error}"
            raise CheckpointError(f"{text}; resume from another checkpoint") from error
        plan, account = carry_on(plan, account, before, facts.sources)
        bad_run = {name: n for name, n in bad_run.items() if name in facts.sources}
        return cls(facts, plan, account, num_seen, num_skipped, num_bad, bad_run)

    def after(self, step: PlannedStep, skips: Sequence[Skip], ids: Sequence[str]) -> StreamState:
        """The state after `step`: a pure function, equal on all ranks when `skips` holds the skips of all of them.

        Args:
            step: what was planned.
            skips: what became filler, in any order.
            ids: of all samples of the step, in plan order.

        Raises:
            DataError: too many of the samples were bad, in all or in a row, or a sample came twice in an epoch.
        """
        account = {key: dict(counts) for key, counts in self.account.items()}

        def count(source: str, epoch: int, reason: str, n: int = 1) -> None:
            entry = account.setdefault((source, epoch), {})
            entry[reason] = entry.get(reason, 0) + n

        names = tuple(self.facts.sources)
        draws = [d for pack in step.packs for d in pack]
        for draw in draws:
            count(names[draw.source_idx], draw.epoch, DELIVERED)
        for drop in step.dropped:
            count(names[drop.source_idx], drop.epoch, drop.reason)
        for skip in skips:
            count(skip.source, skip.epoch, DELIVERED, -1)
            count(skip.source, skip.epoch, skip.reason)
        order = [(names[d.source_idx], d.epoch, i) for d, i in zip(draws, ids, strict=True)]
        state = replace(
            self,
            plan=step.state_after,
            account=_close_epochs(account, self.facts),
            num_seen=self.num_seen + len(draws) + len(step.dropped),
            num_skipped=self.num_skipped + len(skips) + len(step.dropped),
            num_bad=self.num_bad + len(skips) + sum(d.reason not in BY_SIZE for d in step.dropped),
            bad_run=self._bad_runs(order, skips) if skips or self.bad_run else {},
        )
        _judge(state, account)
        return state

    def _bad_runs(self, order: Sequence[tuple[str, int, str]], skips: Sequence[Skip]) -> dict[str, int]:
        """`bad_run` after samples (source, epoch, id) in plan order. Raises DataError when one is too long."""
        bad = {(skip.source, skip.epoch, skip.id): skip for skip in skips}
        runs = dict(self.bad_run)
        latest: dict[str, list[Skip]] = {}
        for sample in order:
            source = sample[0]
            if sample not in bad:
                runs.pop(source, None)
                continue
            runs[source] = runs.get(source, 0) + 1
            latest.setdefault(source, []).append(bad[sample])
            if runs[source] >= self.facts.max_bad_in_a_row:
                named = "; ".join(f"{s.id} ({s.reason}: {s.detail})" for s in latest[source][-_NAMED_BAD:])
                text = f"source '{source}': expected fewer than data.max_bad_in_a_row={self.facts.max_bad_in_a_row} bad"
                raise DataError(
                    f"{text} samples in a row, found {runs[source]}, the last of them {named}; look at the data with "
                    "`mmscale-data verify DIR`, or raise data.max_bad_in_a_row"
                )
        return runs


def pack_json(value: object) -> str:
    """JSON values as a short text: names that come again and again, as those of sources do, cost next to nothing.

    Example:
        >>> unpack_json(pack_json({"a": [1, 2]}))
        {'a': [1, 2]}
    """
    return base64.b85encode(zlib.compress(json.dumps(value).encode(), 9)).decode()


def unpack_json(text: str) -> Any:
    """What `pack_json` was given. Raises ValueError when the text is something else."""
    try:
        return json.loads(zlib.decompress(base64.b85decode(text)))
    except zlib.error as error:
        raise ValueError(f"not packed JSON: {error}") from error


def _judge(state: StreamState, account: Account) -> None:
    """Raises DataError when too many samples were bad; `account` tells the reasons."""
    if state.num_seen < JUDGED_FROM or state.num_bad <= state.facts.max_bad * state.num_seen:
        return
    reasons = Counter[str]()
    for (source, _), counts in account.items():
        reasons.update(
            {f"{reason} in '{source}'": n for reason, n in counts.items() if reason not in (DELIVERED, *BY_SIZE)}
        )
    found = f"{state.num_bad} of {state.num_seen} ({state.num_bad / state.num_seen:.1%})"
    of_late = ", ".join(f"{reason} {n}" for reason, n in reasons.most_common(5))
    text = f"expected at most data.max_bad={state.facts.max_bad:.1%} bad samples, found {found}, of late: {of_late}"
    raise DataError(f"{text}; look at the data with `mmscale-data verify DIR`, or raise data.max_bad")


def _close_epochs(account: dict[tuple[str, int], dict[str, int]], facts: StreamFacts) -> Account:
    """The account without the epochs that are complete; each of them is checked and logged."""
    still_open = {}
    for (source, epoch), counts in sorted(account.items()):
        drawn, rows = sum(counts.values()), facts.sources[source].num_rows
        if drawn > rows or min(counts.values()) < 0:
            text = f"source '{source}' epoch {epoch}: expected {rows} samples, each once, found {drawn} ({counts})"
            raise DataError(f"{text}; the data state is damaged: resume from another checkpoint")
        if drawn < rows:
            still_open[source, epoch] = {reason: n for reason, n in counts.items() if n}
            continue
        skipped = dict(facts.sources[source].unplanned)
        for reason, n in counts.items():
            if reason != DELIVERED and n:
                skipped[reason] = skipped.get(reason, 0) + n
        indexed = rows + sum(facts.sources[source].unplanned.values())
        text = ", ".join(f"{reason} {n}" for reason, n in sorted(skipped.items())) or "none"
        delivered = counts.get(DELIVERED, 0)
        log.info("epoch %d of '%s': indexed %d = delivered %d + skipped %d (%s)",
                 epoch, source, indexed, delivered, sum(skipped.values()), text)  # fmt: skip
    return still_open


def _check_fingerprint(saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    differing = sorted(k for k in {*saved, *now} if saved.get(k) != now.get(k))
    if differing:
        parts = ", ".join(f"{k} ({saved.get(k, 'none')} then, {now.get(k, 'none')} now)" for k in differing)
        text = f"data state: expected the packing and planner of the checkpoint, found another {parts}"
        raise CheckpointError(f"{text}; restore them, or start a new run with another run.dir")
