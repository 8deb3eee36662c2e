"""What `verify` tells beside faults: duplicates over all shards, and shards that are unlike the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmscale.data_tools.inspection.shard_check import ShardCheck
from mmscale.streaming.index import index_path, read_index

_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Note:
    """Something worth knowing that is no fault: a fixed word, how often it occurs, and examples."""

    kind: str
    count: int
    examples: tuple[str, ...]


def notes(folder: Path, checks: Mapping[str, ShardCheck]) -> Iterator[Note]:
    """Duplicates over all shards, and shards whose samples are made of other files than those of most shards.

    Kinds: `duplicate_key`; `duplicate_sample`, the same media and text; `repeated_text` and `repeated_media`, one of them;
    `other_extensions`.
    """
    names, parts = list(checks), list(checks.values())
    if not parts:
        return
    owners = [check.owners for check in parts]
    whole = [np.arange(len(check.keys)) for check in parts]
    for kind, digests, samples in (
        ("duplicate_key", [check.keys for check in parts], whole),
        ("duplicate_sample", [check.contents for check in parts], whole),
        ("repeated_text", [check.texts for check in parts], whole),
        ("repeated_media", [check.media for check in parts], owners),
    ):
        count, pairs = _repeats(np.concatenate(digests))
        if count:
            shard = np.repeat(np.arange(len(parts)), [len(d) for d in digests])
            sample = np.concatenate(samples)
            examples = (
                " = ".join(_sample_name(folder, names[shard[i]], int(sample[i])) for i in pair) for pair in pairs
            )
            yield Note(kind, count, tuple(examples))
    yield from _other_layouts({name: frozenset(check.layouts) for name, check in checks.items()})


def _repeats(digests: NDArray[np.uint64]) -> tuple[int, list[tuple[int, int]]]:
    """How many digests have stood before (0 = none, not counted), and the places of the first few with their equals."""
    order = np.argsort(digests, kind="stable")
    ranked = digests[order]
    again = np.flatnonzero((ranked[1:] == ranked[:-1]) & (ranked[1:] != 0))
    earliest = again[np.argsort(order[again + 1], kind="stable")[:_EXAMPLES]]
    return len(again), [(int(order[i]), int(order[i + 1])) for i in earliest]


def _sample_name(folder: Path, shard: str, sample: int) -> str:
    return f"{shard}:{read_index(index_path(folder / shard)).key(sample)}"


def _other_layouts(layouts: Mapping[str, frozenset[str]]) -> Iterator[Note]:
    layouts = {name: kinds for name, kinds in layouts.items() if kinds}
    usual = Counter(layouts.values()).most_common(1)
    other = [name for name, kinds in layouts.items() if kinds != usual[0][0]]
    if other:
        common = ", ".join(sorted(usual[0][0]))
        examples = (f"{name} has [{', '.join(sorted(layouts[name]))}], most have [{common}]" for name in other)
        yield Note("other_extensions", len(other), tuple(examples)[:_EXAMPLES])
