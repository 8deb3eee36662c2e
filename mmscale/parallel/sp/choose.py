"""Which kind of sequence parallelism a run takes, and over how many ranks, when `parallel.sp` is `auto`.

P = U * R ranks share a pack: U by Ulysses, inside a node and as far as the heads allow, R outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from mmscale.config.layouts import data_parallel_size, fits_ulysses, is_undecided, possible
from mmscale.config.llm import LlmSizes
from mmscale.config.schema import ParallelConfig
from mmscale.errors import ConfigError
from mmscale.parallel.estimate import memory
from mmscale.parallel.sp.plan import Kind, Layout
from mmscale.parallel.workload import Workload

RankBytes = Callable[[int, int, Kind], float]
"""Bytes that one rank needs with so many Ulysses ranks, so many outer ranks and a kind."""

_GIB = 2**30
_USABLE = 0.9
"""Share of a device's memory that a run may count on: the rest is the allocator's, CUDA's and NCCL's."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the choice depends on.

    llm              sizes of the language model
    seq_len          tokens of a pack
    global_batch     packs of a step: data-parallel ranks must divide it
    ranks_per_node   processes that share a node, and its fast links
    documents        documents of a typical pack; None = unknown, then several are assumed
    device_bytes     memory of one device; None = unknown, then it is no reason for anything
    rank_bytes       what a rank needs of it; None = unknown
    """

    llm: LlmSizes
    seq_len: int
    global_batch: int
    ranks_per_node: int
    documents: float | None = None
    device_bytes: int | None = None
    rank_bytes: RankBytes | None = None


@dataclass(frozen=True, slots=True)
class _Try:
    """A layout, the kind that it takes and why, or why it cannot work."""

    ulysses: int
    ring: int
    kind: Kind = "exchange"
    why: str = ""
    trouble: str = ""

    @property
    def name(self) -> str:
        return f"ulysses={self.ulysses} ring={self.ring}"


def rank_bytes_of(work: Workload) -> RankBytes:
    """The memory estimate of a run as the choice asks for it; the degrees and the kind in `work` do not matter."""

    def needs(ulysses: int, ring: int, kind: Kind) -> float:
        data = work.shards // (ulysses * ring)
        return sum(memory(replace(work, ulysses=ulysses, ring=ring, sp=kind, data=data)).values())

    return needs


def resolve_layout(parallel: ParallelConfig) -> Layout:
    """The layout that `parallel.sp_layout` means: a ring is even in every step only with `per_document`."""
    if parallel.sp_layout != "auto":
        return parallel.sp_layout
    return "per_document" if parallel.sp == "ring" else "planned"


def choose_parallel(parallel: ParallelConfig, world_size: int, facts: Facts) -> tuple[ParallelConfig, str]:
    """The configuration with `sp`, `ulysses` and `ring` decided, and one line that says why.

    Degrees are chosen when `sp` is `auto` and both are 1: the fewest ranks per pack with which the data-parallel ranks divide
    the global batch and the estimate fits the device. Degrees that are set stay; only the kind is chosen then.

    Raises:
        ConfigError: no layout works; the message names the nearest ones and what they lack.
    """
    if parallel.sp != "auto":
        return parallel, f"parallel.sp={parallel.sp} as configured"
    data_parallel_size(parallel, world_size)
    if not is_undecided(parallel):
        chosen = _with_kind(_Try(parallel.ulysses, parallel.ring), facts)
        reason = f"{chosen.name} as configured; {chosen.why or chosen.trouble}"
        return parallel.model_copy(update={"sp": chosen.kind}), f"parallel.sp={chosen.kind}: {reason}"
    refused: list[_Try] = []
    for tried in _tries(parallel.tensor, world_size, facts):
        if tried.trouble:
            refused.append(tried)
            continue
        update = {"sp": tried.kind, "ulysses": tried.ulysses, "ring": tried.ring}
        return parallel.model_copy(update=update), _reason(tried, refused, parallel.tensor, facts)
    nearest = "; ".join(f"{t.name}: {t.trouble}" for t in refused[-2:])
    raise ConfigError(
        f"parallel.sp=auto: expected a layout of {world_size} processes for packs of data.seq_len={facts.seq_len} tokens, found none; "
        f"the nearest are {nearest}; lower data.seq_len, raise parallel.tensor, start more processes, or set parallel.ulysses and "
        "parallel.ring to go on nevertheless"
    )


def _tries(tensor: int, world_size: int, facts: Facts) -> Iterator[_Try]:
    """Every number of ranks that may share a pack, fewest first, cut into as much Ulysses as possible."""
    shards = world_size // tensor
    for sequence in possible(lambda degree: shards % degree == 0, min(shards, facts.seq_len)):
        inside = [d for d in range(1, sequence + 1) if sequence % d == 0 and _may_be_ulysses(d, tensor, facts)]
        ulysses = inside[-1]
        tried = _Try(ulysses, sequence // ulysses)
        data = shards // sequence
        if facts.global_batch % data:
            ranks = f"{data} data-parallel ranks do not divide train.global_batch={facts.global_batch}"
            yield replace(tried, trouble=ranks)
        else:
            yield _with_kind(tried, facts)


def _may_be_ulysses(degree: int, tensor: int, facts: Facts) -> bool:
    inside_node = degree == 1 or facts.ranks_per_node % (tensor * degree) == 0
    return inside_node and fits_ulysses(degree, tensor, facts.llm)


def _with_kind(tried: _Try, facts: Facts) -> _Try:
    """The layout with its kind, the first of two that fits the memory; with `trouble` when none does."""
    window = facts.llm.window
    kinds: dict[Kind, str]
    if tried.ring == 1:
        own = "every rank has packs of its own" if tried.ulysses == 1 else "heads alone are divided"
        kinds = {"exchange": f"{own}, no keys are exchanged"}
    elif window is not None and window < facts.seq_len:
        kinds = {"exchange": f"a sliding window of {window} tokens needs few keys of other ranks"}
    else:
        kinds = {**_first_kind(facts), "ring": "all keys of a pack do not fit at once, blocks of them do"}
    if facts.device_bytes is None or facts.rank_bytes is None:
        kind, why = next(iter(kinds.items()))
        return replace(tried, kind=kind, why=why)
    limit = facts.device_bytes * _USABLE
    for kind, why in kinds.items():
        needs = facts.rank_bytes(tried.ulysses, tried.ring, kind)
        if needs <= limit:
            memory_use = f"{needs / _GIB:.3g} of {limit / _GIB:.3g} GiB"
            return replace(tried, kind=kind, why=f"{why}; about {memory_use} per rank")
    trouble = f"needs about {needs / _GIB:.3g} GiB per rank of {limit / _GIB:.3g} usable (sp={kind})"
    return replace(tried, kind=kind, trouble=trouble)


def _first_kind(facts: Facts) -> dict[Kind, str]:
    if facts.documents is not None and facts.documents < 1.5:
        return {"gather": "one document fills a pack, so that every rank needs nearly all keys"}
    several = "several" if facts.documents is None else f"about {facts.documents:.3g}"
    return {"exchange": f"{several} documents per pack, of which each rank needs the keys of its own"}


def _reason(chosen: _Try, refused: list[_Try], tensor: int, facts: Facts) -> str:
    parts = [f"parallel.sp={chosen.kind} {chosen.name}: {chosen.why}"]
    if refused:
        parts.append(f"fewer ranks per pack do not work ({refused[-1].name}: {refused[-1].trouble})")
    if chosen.ring > 1:
        heads, kv_heads = facts.llm.heads // tensor, max(1, facts.llm.kv_heads // tensor)
        parts.append(
            f"Ulysses ends at {chosen.ulysses} ({heads} query and {kv_heads} key/value heads, {facts.ranks_per_node} ranks per node)"
        )
    return "; ".join(parts)
