"""The samples of datasets and tars as new shards: other sizes, other compression, another order, the same bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mmscale.data_tools.build import BuildOptions, BuildReport, OnRow, write_items
from mmscale.data_tools.readers.decompress import SUFFIXES
from mmscale.data_tools.readers.items import Item, Source, refuse_twice
from mmscale.data_tools.readers.read_tars import raw_items
from mmscale.errors import BadSampleError, RefusedInputError
from mmscale.streaming.manifest import MANIFEST_NAME
from mmscale.streaming.shards import ShardSet


def reshard(
    inputs: Sequence[Path],
    out: Path,
    options: BuildOptions,
    shuffle: int | None = None,
    rename: bool = False,
    on_row: OnRow | None = None,
) -> BuildReport:
    """Writes the samples of some inputs as one dataset folder. Members are not changed, rows are not judged.

    Args:
        inputs: dataset folders (with a manifest), tars, or folders with tars below them.
        out: dataset folder, made when missing.
        shuffle: seed of a random order over all samples; None keeps the order of the inputs.
        rename: samples get running numbers as keys.

    Raises:
        RefusedInputError: an input is missing or holds no samples, `shuffle` without an index, or `out` is an input.
        DataError: two samples of a shard have the same key.
    """
    check_out(inputs, out)
    items: Iterator[Item]
    if shuffle is None:
        items = (item for path in inputs for item in _in_order(path, Source((path,), rename=rename, scratch=out)))
    else:
        items = _shuffled([_open(path) for path in inputs], shuffle, rename)
    return write_items(items, out, options, on_row)


def check_out(inputs: Sequence[Path], out: Path) -> None:
    """Refuses inputs that are given twice, and to write into one."""
    refuse_twice(inputs)
    for path in inputs:
        if out.resolve().is_relative_to(path.resolve()):
            raise RefusedInputError(f"{out}: lies inside the input {path}; choose another output folder")


def dataset_items(data: ShardSet, rows: Sequence[int] | range, rename: bool) -> Iterator[Item]:
    """Some samples of a dataset as they are, without what was refused."""
    for row in rows:
        shard, i = data.locate(row)
        yield Item({"id": data.id(row)}, dict(data.members(row)), key="" if rename else data.shards[shard].key(i))


def refused_items(data: ShardSet) -> Iterator[Item]:
    """One skipped item for each sample of a dataset that was refused when it was indexed or opened."""
    for reason, count in data.skipped.items():
        yield from [Item({"file": data.name}, skip=BadSampleError(reason, "refused when indexed or opened"))] * count


def _open(path: Path) -> ShardSet:
    if not (path / MANIFEST_NAME).is_file():
        raise RefusedInputError(
            f"{path}: --shuffle needs an indexed folder, found no {MANIFEST_NAME}; run: mmscale-data index {path}"
        )
    return ShardSet.open(path, path.resolve().name)


def _in_order(path: Path, source: Source) -> Iterator[Item]:
    if not (path / MANIFEST_NAME).is_file():
        yield from raw_items(source)
        return
    data = ShardSet.open(path, path.resolve().name)
    yield from dataset_items(data, range(len(data)), source.rename)
    yield from refused_items(data)
    # Shards that were put aside for a compression without random access: to write them anew is the remedy.
    compressed = sorted(
        path / name for name in data.quarantined if name.endswith(SUFFIXES) and not name.endswith(".tar")
    )
    yield from raw_items(replace(source, paths=tuple(compressed)))


def _shuffled(sets: Sequence[ShardSet], seed: int, rename: bool) -> Iterator[Item]:
    """A random order over all samples: 8 bytes of memory each."""
    starts = np.cumsum([0, *map(len, sets)])
    for place in np.random.default_rng(seed).permutation(starts[-1]):
        number = int(np.searchsorted(starts, place, side="right")) - 1
        yield from dataset_items(sets[number], [int(place - starts[number])], rename)
    for data in sets:
        yield from refused_items(data)
