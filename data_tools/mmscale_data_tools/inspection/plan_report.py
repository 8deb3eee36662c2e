"""What a plan will do, in numbers, before any training: fill, balance, epochs, tokens, and why the fill is low when it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.config.cost import predict_cost
from mmscale.data_tools.inspection.run_stream import RunStream
from mmscale.streaming.draws import PlanSource
from mmscale.streaming.lengths import modality_tokens
from mmscale.streaming.pack import cost_imbalance, pack_documents
from mmscale.streaming.plan import TOO_LONG, TOO_MANY_IMAGES, Pack, Plan, PlanState
from mmscale.types import MODALITIES

Floats = NDArray[np.float64]
TokensByKind = Mapping[str, NDArray[Any]]
"""`text` and each modality -> tokens of every row of a source, rows that are too long in full."""

GOOD_FILL = 0.98
_LEAST_PACKS, _TURNS = 1024, 16
_NAMED = 5
_RANDOM_SEED = 0
_MANY_LONG = 0.01
_BEST_DRAWS = 10_000


@dataclass(frozen=True)
class PlanInput:
    """A plan with what it does not know itself.

    `tokens`: per source. `id_of`: (source index, row) -> sample id. `skipped`: per source, what was left out before
    planning, by reason. `steps`: optimizer steps of the run, `global_batch`: packs of each.
    """

    plan: Plan
    tokens: Sequence[TokensByKind]
    id_of: Callable[[int, int], str]
    skipped: Sequence[Mapping[str, int]]
    steps: int
    global_batch: int


@dataclass(frozen=True)
class SourceReport:
    """One source: `rows` of an epoch, `usable` of them; `share` of the draws; `epochs` over the whole run; `epoch_steps`,
    the optimizer steps of one epoch; `tokens` by modality in the packs looked at; `skipped` by reason."""

    name: str
    rows: int
    usable: int
    share: float
    epochs: float
    epoch_steps: float
    tokens: Mapping[str, int]
    skipped: Mapping[str, int]


@dataclass(frozen=True)
class Imbalance:
    """Dearest pack / mean pack side by side on some ranks, mean and worst over micro-steps; and for the same packs in a
    random order. `ratios`, `random_ratios`: of each micro-step."""

    ranks: int
    mean: float
    worst: float
    random_mean: float
    random_worst: float
    ratios: Floats = field(repr=False)
    random_ratios: Floats = field(repr=False)


@dataclass(frozen=True)
class PlanReport:
    """`fill` [packs]: share of the tokens of each pack in use. `documents`: per pack, on average. `largest`: (id,
    tokens, reason why it is left out or nothing). `costs` [packs]: in the unit of the plan's cost. `advice`: what to do, one line each; empty when all is well."""

    sources: tuple[SourceReport, ...]
    fill: Floats
    documents: float
    imbalance: tuple[Imbalance, ...]
    largest: tuple[tuple[str, int, str], ...]
    costs: Floats
    advice: tuple[str, ...]


def run_plan(opened: RunStream) -> PlanInput:
    """The plan of a run."""
    stream, train = opened.stream, opened.config.train
    return PlanInput(
        plan=stream.plan,
        tokens=[modality_tokens(source.shards, source.encoder) for source in stream.sources],
        id_of=lambda source_idx, row: stream.sources[source_idx].shards.id(row),
        skipped=[source.shards.skipped for source in stream.sources],
        steps=train.steps,
        global_batch=train.global_batch,
    )


def plan_report(data: PlanInput, ranks: Sequence[int], num_steps: int | None = None) -> PlanReport:
    """The numbers of the first packs of a plan.

    Args:
        data: the plan.
        ranks: data-parallel sizes for which the balance is told.
        num_steps: steps to plan; None = the run's, but no more than are enough for steady figures.
    """
    plan = data.plan
    enough = max(_LEAST_PACKS, _TURNS * max(ranks))
    num_packs = num_steps * data.global_batch if num_steps else min(data.steps * data.global_batch, enough)
    packs = [pack for pack, _, _ in islice(plan.packs(PlanState()), num_packs) if pack]
    draws = np.array([draw for pack in packs for draw in pack], np.int64).reshape(-1, 4)
    features = pack_table(packs, draws, plan.sources)
    costs = predict_cost(plan.rules.cost, features)
    fill = features[:, 1] / plan.rules.seq_len
    sources = _source_reports(data, draws, float(fill.mean()))
    imbalance = tuple(_imbalance(costs, n) for n in ranks if n <= len(packs))
    advice = (*_why_low_fill(plan, features, packs), *_other_advice(data, sources, ranks))
    return PlanReport(sources, fill, len(draws) / len(packs), imbalance, _largest(data), costs, advice)


def pack_table(packs: Sequence[Pack], draws: NDArray[np.int64], sources: Sequence[PlanSource]) -> Floats:
    """The cost features of packs, float64 [packs, 5] in the order of `mmscale.config.cost.FEATURES`.

    Args:
        packs: none of them empty.
        draws: int64 [documents, 4], all documents of the packs in their order: source, row, epoch, tokens.
        sources: of the plan.
    """
    vision, audio = np.zeros(len(draws)), np.zeros(len(draws))
    for s, source in enumerate(sources):
        own = draws[:, 0] == s
        vision[own], audio[own] = source.vision[draws[own, 1]], source.audio[draws[own, 1]]
    tokens = draws[:, 3].astype(np.float64)
    columns = np.stack([tokens, tokens**2, vision, audio], axis=1)
    starts = np.cumsum([0, *(len(pack) for pack in packs[:-1])])
    return np.concatenate([np.ones((len(packs), 1)), np.add.reduceat(columns, starts)], axis=1)


def _source_reports(data: PlanInput, draws: NDArray[np.int64], fill: float) -> tuple[SourceReport, ...]:
    plan = data.plan
    total = sum(source.share for source in plan.sources)
    share = [float(source.share / total) for source in plan.sources]
    per_draw = sum(p * _mean_tokens(source) for p, source in zip(share, plan.sources, strict=True))
    draws_per_step = data.global_batch * plan.rules.seq_len * fill / per_draw
    found = []
    for s, source in enumerate(plan.sources):
        rows = draws[draws[:, 0] == s, 1]
        media = {str(m): int(data.tokens[s][m][rows].sum()) for m in MODALITIES}
        text = int(draws[draws[:, 0] == s, 3].sum()) - sum(media.values())  # what is left of a text that was cut
        epochs = share[s] * draws_per_step * data.steps / source.num_rows
        found.append(
            SourceReport(
                name=source.name,
                rows=source.num_rows,
                usable=int((source.tokens > 0).sum()),
                share=share[s],
                epochs=min(epochs, float(source.max_epochs or epochs)),
                epoch_steps=source.num_rows / (share[s] * draws_per_step),
                tokens={"text": text, **media},
                skipped=Counter(source.reasons.values()) + Counter(data.skipped[s]),
            )
        )
    return tuple(found)


def _mean_tokens(source: PlanSource) -> float:
    """Tokens of a draw, unusable rows counted as none."""
    return float(source.tokens.mean(dtype=np.float64))


def _imbalance(costs: Floats, ranks: int) -> Imbalance:
    """For the packs in the order of the plan and in a random one."""
    shuffled = np.random.default_rng(_RANDOM_SEED).permutation(costs)
    ours, other = cost_imbalance(costs, ranks), cost_imbalance(shuffled, ranks)
    return Imbalance(ranks, *ours, *other, _ratios(costs, ranks), _ratios(shuffled, ranks))


def _ratios(costs: Floats, ranks: int) -> Floats:
    turns = costs[: len(costs) // ranks * ranks].reshape(-1, ranks)
    return turns.max(1) / turns.mean(1)


def _largest(data: PlanInput) -> tuple[tuple[str, int, str], ...]:
    found: list[tuple[int, int, int]] = []
    for s, by_kind in enumerate(data.tokens):
        tokens = sum(by_kind.values(), np.zeros(1, np.int64))
        found += [(int(tokens[row]), s, int(row)) for row in np.argsort(-tokens, kind="stable")[:_NAMED]]
    sources = data.plan.sources
    largest = sorted(found, key=lambda item: (-item[0], item[1:]))[:_NAMED]
    return tuple((data.id_of(s, row), tokens, sources[s].reasons.get(row, "")) for tokens, s, row in largest)


def _why_low_fill(plan: Plan, features: Floats, packs: Sequence[Pack]) -> tuple[str, ...]:
    """One line on what keeps packs from being full, none when they are."""
    rules, fill = plan.rules, features[:, 1] / plan.rules.seq_len
    if fill.mean() >= GOOD_FILL:
        return ()
    low = np.flatnonzero(fill < GOOD_FILL)
    text = f"fill is {fill.mean():.1%}"
    if _best_fill(plan, packs) >= GOOD_FILL:  # the lengths do fit together, when enough of them are seen at once
        if rules.window == plan.window:
            held = f"{plan.window} samples at a time offer too few lengths that fit"
            return (f"{text}: {held}; raise data.window, or set it to null",)
        epoch = sum(int(source.tokens.sum(dtype=np.uint64)) for source in plan.sources) / rules.seq_len
        held = f"an epoch fills only {epoch:.1f} packs, so only {plan.window} samples are planned at a time"
        return (f"{text}: {held}; add data, or raise data.plan_group",)
    most = rules.max_images_per_pack
    if most is not None and 2 * int((features[low, 3] >= GOOD_FILL * most).sum()) >= len(low):
        held = f"most under-full packs hold the {most} images that a pack may have"
        return (f"{text}: {held}; raise data.max_images_per_pack, or lower data.seq_len to what such packs use",)
    if 2 * sum(2 * max(draw.tokens for draw in packs[i]) > rules.seq_len for i in low.tolist()) >= len(low):
        held = "in most under-full packs one document takes more than half, and nothing fits beside it"
        return (f"{text}: {held}; raise data.seq_len, or mix in a source of short samples",)
    held = "the lengths do not add up to whole packs"
    return (f"{text}: {held}; choose another data.seq_len, or mix in a source of short samples",)


def _best_fill(plan: Plan, packs: Sequence[Pack]) -> float:
    """The fill when the documents looked at, up to some 10,000, are packed all at once and without groups."""
    draws = np.array([draw for pack in packs for draw in pack][:_BEST_DRAWS], np.int64)
    vision = np.array([plan.sources[s].vision[row] for s, row in draws[:, :2].tolist()], np.int64)
    best = pack_documents(draws[:, 3], plan.rules.seq_len, vision, plan.rules.max_images_per_pack)
    return float(best.sums(draws[:, 3])[:-1].mean() / plan.rules.seq_len) if len(best) > 1 else 0.0


def _other_advice(data: PlanInput, sources: Sequence[SourceReport], ranks: Sequence[int]) -> tuple[str, ...]:
    rules, found = data.plan.rules, []
    if max(ranks) > rules.plan_group:
        found.append(
            f"data.plan_group={rules.plan_group} is less than {max(ranks)} ranks, and packs cost alike only within groups of "
            f"{rules.plan_group}; set data.plan_group={max(ranks)} before the run begins"
        )
    for source, by_kind in zip(sources, data.tokens, strict=True):
        crowded = source.skipped.get(TOO_MANY_IMAGES, 0)
        if crowded > _MANY_LONG * source.rows:
            found.append(
                f"{crowded / source.rows:.1%} of '{source.name}' has more than data.max_images_per_pack="
                f"{rules.max_images_per_pack} images and is left out; raise it"
            )
        long = source.skipped.get(TOO_LONG, 0)
        if long > _MANY_LONG * source.rows:
            tokens = sum(by_kind.values(), np.zeros(1, np.int64))
            need = int(np.quantile(tokens[tokens > 0], 1 - _MANY_LONG, method="higher"))
            found.append(
                f"{long / source.rows:.1%} of '{source.name}' is longer than data.seq_len={rules.seq_len} and left out; "
                f"data.seq_len={need} would keep 99 %, or set data.on_long=truncate"
            )
    return tuple(found)
