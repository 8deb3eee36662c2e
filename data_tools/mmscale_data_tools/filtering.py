"""A part of some datasets as a dataset of its own: by key, by condition, without duplicates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmscale.data_tools.build import BuildOptions, BuildReport, OnRow, write_items
from mmscale.data_tools.predicate import Condition, parse_condition
from mmscale.data_tools.readers.items import Item
from mmscale.data_tools.reshard import check_out, dataset_items, refused_items
from mmscale.errors import BadSampleError, RefusedInputError
from mmscale.logging import get_logger
from mmscale.streaming.media import modality_of
from mmscale.streaming.rows import parse_sample
from mmscale.streaming.shards import ShardSet
from mmscale.streaming.strict_json import JsonFault, parse_json
from mmscale.types import MODALITIES

log = get_logger(__name__)


@dataclass(frozen=True)
class Selection:
    """Which samples stay. Keys are those of samples (`000000012`) or whole ids (`name/000000.tar:000000012`)."""

    keep: frozenset[str] | None = None
    drop: frozenset[str] = frozenset()
    where: Condition | None = None
    dedup: bool = False

    @classmethod
    def read(cls, keep: Path | None, drop: Path | None, where: str | None, dedup: bool) -> Selection:
        """A selection from files of keys, one per line, and the text of a condition.

        Raises:
            RefusedInputError: a file is missing or not UTF-8, or nothing is selected by.
            ConfigError: the condition is none.
        """
        if keep is None and drop is None and where is None and not dedup:
            raise RefusedInputError("nothing to filter by; give --keys, --drop-keys, --where or --dedup")
        kept, dropped = (_read_keys(path) if path else None for path in (keep, drop))
        return cls(kept, dropped or frozenset(), parse_condition(where) if where is not None else None, dedup)


def filter_samples(
    folders: Sequence[Path],
    out: Path,
    selection: Selection,
    options: BuildOptions,
    rename: bool = False,
    on_row: OnRow | None = None,
) -> BuildReport:
    """Writes the selected samples of some dataset folders, in order and unchanged, as one dataset folder.

    What is left out is counted as `keys`, `where` or `duplicate`. For `dedup` the first of equal samples stays; it takes
    about 150 bytes of memory per sample.

    Raises:
        RefusedInputError: a folder is no dataset, or `out` is one of them.
        DataError: two samples of a shard have the same key.
    """
    check_out(folders, out)
    return write_items(
        _select([ShardSet.open(folder, folder.resolve().name) for folder in folders], selection, rename),
        out,
        options,
        on_row,
    )


def _select(sets: Sequence[ShardSet], selection: Selection, rename: bool) -> Iterator[Item]:
    fault = _Judge(selection)
    for data in sets:
        for row in range(len(data)):
            skip = fault(data, row)
            yield Item({"id": data.id(row)}, skip=skip) if skip else next(dataset_items(data, [row], rename))
        yield from refused_items(data)
    fault.report()


class _Judge:
    """Says why a sample is left out; remembers the contents and keys that it has seen."""

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._first: dict[int, str] = {}
        self._found: set[str] = set()

    def __call__(self, data: ShardSet, row: int) -> BadSampleError | None:
        """The reason, None when the sample stays."""
        listed, facts = self._selection, SampleFacts(data, row)
        names = {facts.key, data.id(row)}
        if listed.keep is not None and not self._listed(names, listed.keep):
            return BadSampleError("keys", "not among the keys to keep")
        if self._listed(names, listed.drop):
            return BadSampleError("keys", "among the keys to leave out")
        if listed.where is not None and not listed.where(facts):
            return BadSampleError("where", "the condition is not met")
        if listed.dedup:
            content = facts.content_hash()
            if content in self._first:
                return BadSampleError("duplicate", f"media and text of {self._first[content]}")
            self._first[content] = data.id(row)
        return None

    def report(self) -> None:
        """Warns of listed keys that no sample has."""
        unknown = ((self._selection.keep or frozenset()) | self._selection.drop) - self._found
        if unknown:
            log.warning("%d listed keys are in none of the folders, such as %r", len(unknown), min(unknown))

    def _listed(self, names: set[str], keys: frozenset[str]) -> bool:
        found = names & keys
        self._found |= found
        return bool(found)


class SampleFacts:
    """What a condition can ask about one sample; members are read only when they are asked for."""

    def __init__(self, data: ShardSet, row: int) -> None:
        self._data = data
        self._row = row
        number, self._sample = data.locate(row)
        self._shard = data.shards[number]
        self.key = self._shard.key(self._sample)

    def named(self, name: str) -> Any:
        """A value of the sample, or the list of the numbers that its media have (see `predicate`)."""
        if name == "key":
            return self.key
        if name == "shard":
            return self._shard.name
        if name == "text_bytes":
            return sum(self._column("text_bytes"))
        kinds = [modality_of(ext) for ext in self._exts()]
        modality = name.removesuffix("s")
        if modality in MODALITIES and name != modality:
            return kinds.count(modality)
        return [value for value, kind in zip(self._per_member(name), kinds, strict=True) if kind and value]

    def json(self) -> Any:
        """The `.json` member, None when there is none or it is not JSON."""
        try:
            return next((parse_json(data) for _, data in self._data.members(self._row, "json".__eq__)), None)
        except JsonFault:
            return None

    def content_hash(self) -> int:
        """128 bits of the media and the turns; of all members when the row cannot be read."""
        from xxhash import xxh3_128

        members = self._data.members(self._row)
        try:
            sample = parse_sample("", members)
            parts = [(item.modality, item.data) for item in sample.media]
            parts += [(turn.role, turn.text.encode()) for turn in sample.turns]  # type: ignore[misc]
        except BadSampleError:
            parts = members  # type: ignore[assignment]
        digest = xxh3_128()
        for kind, data in parts:
            digest.update(f"{kind} {len(data)} ".encode())
            digest.update(data)
        return digest.intdigest()

    def _per_member(self, name: str) -> list[float]:
        column: Callable[[str], list[int]] = self._column
        if name == "pixels":
            return [w * h for w, h in zip(column("width"), column("height"), strict=True)]
        if name == "audio_s":
            return [n / rate if rate else 0 for n, rate in zip(column("audio_samples"), column("rate_hz"), strict=True)]
        if name == "fps":
            return [value / 1000 for value in column("fps_milli")]
        return list(column("size" if name == "bytes" else name))

    def _column(self, name: str) -> list[int]:
        index = self._shard.index
        found: list[int] = index.columns[name][index.first[self._sample] : index.first[self._sample + 1]].tolist()
        return found

    def _exts(self) -> list[str]:
        return [self._shard.index.exts[code] for code in self._column("ext")]


def _read_keys(path: Path) -> frozenset[str]:
    try:
        return frozenset(line.strip() for line in path.read_text("utf-8").splitlines() if line.strip())
    except FileNotFoundError:
        raise RefusedInputError(f"{path}: expected a file of keys, one per line, found none; check the path") from None
    except UnicodeDecodeError:
        raise RefusedInputError(f"{path}: expected keys in UTF-8, one per line; write the file again") from None
