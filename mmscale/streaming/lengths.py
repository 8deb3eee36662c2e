"""How many tokens and tower inputs each row of a dataset has, so that everything can be planned without decoding anything.

Computed once from the text of every row and the index's length columns, and stored per shard for the tokenizer, template
and media specs that it holds for. Several processes share the work: each begins with other shards and finds the rest done.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
import uuid
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmscale.errors import BadSampleError, RefusedInputError
from mmscale.logging import get_logger
from mmscale.streaming.chat import count_text_tokens, encode_chat
from mmscale.streaming.encode import Encoder, PlannedMedia, media_counts, media_end
from mmscale.streaming.index import TEXT_EXTENSIONS, ShardIndex
from mmscale.streaming.media import Lengths as HeaderLengths
from mmscale.streaming.media import modality_of
from mmscale.streaming.plan import TOO_LONG
from mmscale.streaming.rows import parse_sample
from mmscale.streaming.shards import Shard, ShardSet
from mmscale.types import MODALITIES, Modality, Sample

log = get_logger(__name__)

_FORMAT = 3
_BATCH_ROWS = 1024
_NAMED_FAULTS = 5
_TELL_EVERY_S = 10.0
_MOST_INPUTS = 65_535

_PLANNED = {"tokens": "<u4", "vision": "<u2", "audio": "<u2"}
_BY_MODALITY = {f"{modality}_tokens": "<u4" for modality in MODALITIES}
COLUMNS = {**_PLANNED, **_BY_MODALITY}
"""What is stored per row: for the plan, and for reports."""

_MOST_BYTES = 256
"""Per row in a file of lengths, that of its reason included."""

_DAMAGED = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    MemoryError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What numpy and zipfile raise for files that are not what they should be."""

Columns = Mapping[str, NDArray[np.generic]]


def _nothing() -> None:
    """What a process that works alone does on its way."""


@dataclass(frozen=True)
class Turn:
    """The part of one process in work that `world` processes share: where it begins.

    `on_progress` is called after at most 1024 rows, for processes that must hear of each other now and then.
    """

    rank: int = 0
    world: int = 1
    on_progress: Callable[[], None] = _nothing

    def order(self, num_shards: int) -> list[int]:
        """Shard numbers: those of this process, then those of the others from the far end, where they are not yet done."""
        own = list(range(self.rank, num_shards, self.world))
        return [*own, *(i for i in reversed(range(num_shards)) if i % self.world != self.rank)]


ALONE = Turn()


@dataclass(frozen=True)
class SampleLengths:
    """Per row of a `ShardSet`: `tokens` uint32 [rows] as planned (0 = unusable, `reasons[row]` says why), `vision` and
    `audio` uint16 [rows], its tower inputs."""

    tokens: NDArray[np.uint32]
    vision: NDArray[np.uint16]
    audio: NDArray[np.uint16]
    reasons: dict[int, str]


def sample_lengths(shards: ShardSet, encoder: Encoder, turn: Turn = ALONE) -> SampleLengths:
    """The length of every row as `encoder` will give it, from stored files where they fit.

    Raises:
        RefusedInputError: a sample is longer than a pack and `data.on_long` is `error`.

    Distributed: every rank may call it with its own `turn`; the result is the same on all.
    """
    out = SampleLengths(
        np.zeros(len(shards), np.uint32), np.zeros(len(shards), np.uint16), np.zeros(len(shards), np.uint16), {}
    )
    starts = np.cumsum([0, *(len(shard) for shard in shards.shards)]).tolist()
    progress = _Progress(shards.name, len(shards), turn)
    for number in turn.order(len(shards.shards)):
        shard, start = shards.shards[number], starts[number]
        columns, reasons = _shard_lengths(shard, shards.name, encoder, progress, _PLANNED)
        for name in _PLANNED:
            getattr(out, name)[start : start + len(shard)] = columns[name]
        out.reasons.update({start + row: reason for row, reason in reasons.items()})
        progress.passed(len(shard))
    for row in np.flatnonzero(out.tokens > encoder.max_tokens).tolist():
        out.tokens[row] = _shortened(shards, row, int(out.tokens[row]), encoder)
        if not out.tokens[row]:
            out.reasons[row] = TOO_LONG
    return out


def modality_tokens(shards: ShardSet, encoder: Encoder) -> dict[str, NDArray[np.uint32]]:
    """Tokens of every row [rows] by what they stand for: `text` and each of `MODALITIES`; for reports.

    Rows that are longer than a pack count in full.
    """
    progress = _Progress(shards.name, len(shards), ALONE)
    parts = [_shard_lengths(shard, shards.name, encoder, progress, COLUMNS)[0] for shard in shards.shards]
    counts = {"text": np.concatenate([p["tokens"] for p in parts]).astype(np.uint32)}
    for modality in MODALITIES:
        counts[modality] = np.concatenate([p[f"{modality}_tokens"] for p in parts]).astype(np.uint32)
        counts["text"] -= counts[modality]
    return counts


class _Progress:
    """Says now and then how far a long count is."""

    def __init__(self, name: str, num_rows: int, turn: Turn) -> None:
        self._name, self._num_rows, self._turn = name, num_rows, turn
        self._started = self._told = time.monotonic()
        self._passed = 0
        self._counted: int | None = None

    def begin(self) -> None:
        """A shard is counted here; said once."""
        if self._counted is None:
            self._counted, self._started = 0, time.monotonic()
            log.info("counting the tokens of the %d samples of '%s': not stored yet for this tokenizer, template and model",
                     self._num_rows, self._name)  # fmt: skip

    def passed(self, rows: int) -> None:
        """Some rows are done, found or counted."""
        self._passed += rows
        self._turn.on_progress()

    def counted(self, rows: int) -> None:
        """Some rows were counted here, in a shard that is not done yet."""
        self._counted = (self._counted or 0) + rows
        self._turn.on_progress()
        now = time.monotonic()
        if now - self._told > _TELL_EVERY_S:
            self._told = now
            rate = self._counted / (now - self._started)
            log.info("counting tokens of '%s': %d of %d samples are done, %.0f samples/s here",
                     self._name, self._passed, self._num_rows, rate)  # fmt: skip


def _shortened(shards: ShardSet, row: int, tokens: int, encoder: Encoder) -> int:
    """Tokens of a row that is longer than a pack, 0 when it is left out."""
    if encoder.on_long == "error":
        text = f"{shards.id(row)}: expected at most data.seq_len={encoder.max_tokens} tokens, found {tokens}"
        raise RefusedInputError(f"{text}; raise data.seq_len, or set data.on_long to drop or truncate")
    if encoder.on_long == "drop":
        return 0
    number, i = shards.locate(row)
    shard = shards.shards[number]
    sample = _sample(shard, i, shards.id(row), shard.members(i, TEXT_EXTENSIONS.__contains__))
    planned = _planned_media(sample, shard.index, i, encoder)
    counts = media_counts((modality, media.tokens) for modality, media in planned)
    end = media_end(encode_chat(encoder.template, encoder.tokenizer, sample.turns, counts), counts)
    return encoder.kept_tokens(tokens, end)


def _shard_lengths(
    shard: Shard, name: str, encoder: Encoder, progress: _Progress, wanted: Mapping[str, str]
) -> tuple[Columns, dict[int, str]]:
    """Some columns of a shard, and why rows without tokens cannot be used."""
    places = lengths_places(shard, encoder)
    for path in places:
        found = _load(path, len(shard), wanted)
        if found is not None:
            return found
    found = _compute(shard, name, encoder, progress)
    _store(places, shard, *found)
    return found


def lengths_places(shard: Shard, encoder: Encoder) -> tuple[Path, ...]:
    """Where the lengths of a shard may be kept, the best place first; another name for another encoder."""
    # The digest of the whole tar: other text of equal size leaves sizes, headers and the index as they were.
    identity = f"{_FORMAT}/{encoder.fingerprint}/{shard.sha256}/{len(shard)}"
    return shard.sidecars(f".lengths.{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npz")


def encode_lengths(columns: Columns, reasons: Mapping[int, str]) -> bytes:
    """The content of a file of lengths: one value per row in each column, and the reason of each row without tokens."""
    buffer = io.BytesIO()
    arrays = {"bad_rows": np.array(list(reasons), np.int64), "bad_reasons": np.array(list(reasons.values()), np.str_)}
    np.savez(buffer, **columns, **arrays)  # type: ignore[arg-type]  # its stub takes each name for `allow_pickle`
    return buffer.getvalue()


def _compute(shard: Shard, name: str, encoder: Encoder, progress: _Progress) -> tuple[Columns, dict[int, str]]:
    progress.begin()
    columns = {column: np.zeros(len(shard), dtype) for column, dtype in COLUMNS.items()}
    faults: dict[int, BadSampleError] = {}
    for lo in range(0, len(shard), _BATCH_ROWS):
        rows = range(lo, min(lo + _BATCH_ROWS, len(shard)))
        usable: dict[int, Sample] = {}
        for i, texts in zip(rows, shard.read_many(rows, TEXT_EXTENSIONS.__contains__), strict=True):
            try:
                sample = _sample(shard, i, f"{name}/{shard.name}:{shard.key(i)}", texts)
                for modality, media in _planned_media(sample, shard.index, i, encoder):
                    columns[f"{modality}_tokens"][i] += media.tokens
                    inputs = columns["audio" if modality == "audio" else "vision"]
                    inputs[i] = min(int(inputs[i]) + media.inputs, _MOST_INPUTS)  # more are too long for any pack
                usable[i] = sample
            except BadSampleError as error:
                faults[i] = error
        for i, found in zip(usable, _count_text(list(usable.values()), encoder), strict=True):
            if isinstance(found, BadSampleError):
                faults[i] = found
            else:
                columns["tokens"][i] = found + sum(int(columns[f"{m}_tokens"][i]) for m in MODALITIES)
        progress.counted(len(rows))
    for column in columns.values():
        column[list(faults)] = 0
    _report(shard, faults)
    return columns, {i: error.reason for i, error in sorted(faults.items())}


def _report(shard: Shard, faults: dict[int, BadSampleError]) -> None:
    if not faults:
        return
    counts = Counter(error.reason for error in faults.values())
    text = ", ".join(f"{reason} {n}" for reason, n in counts.most_common())
    log.warning("%s: %d of %d samples cannot be used (%s), such as",
                shard.where, len(faults), len(shard), text, all_ranks=True)  # fmt: skip
    for i in sorted(faults)[:_NAMED_FAULTS]:
        log.warning("  %s at offset %d: %s", shard.key(i), shard.offset(i), faults[i], all_ranks=True)


def _count_text(samples: Sequence[Sample], encoder: Encoder) -> list[int | BadSampleError]:
    """Text tokens of each sample, or why it has none; one call of the tokenizer unless a sample is at fault."""
    rows = [(s.turns, {m.modality for m in s.media}) for s in samples]
    try:
        return [int(n) for n in count_text_tokens(encoder.template, encoder.tokenizer, rows)]
    except BadSampleError as error:
        if len(samples) == 1:
            return [error]
        return [n for sample in samples for n in _count_text([sample], encoder)]


def _sample(shard: Shard, i: int, sample_id: str, texts: list[tuple[str, bytes]]) -> Sample:
    """A sample of its text and of empty media."""
    index = shard.index
    exts = [index.exts[index.ext[m]] for m in range(index.first[i], index.first[i + 1])]
    return parse_sample(sample_id, [(ext, b"") for ext in exts if modality_of(ext)] + texts, shard.offset(i))


def _planned_media(sample: Sample, index: ShardIndex, i: int, encoder: Encoder) -> list[tuple[Modality, PlannedMedia]]:
    """Tokens and tower inputs of the sample's media from the index alone. Raises BadSampleError."""
    first, last = index.columns["first"][i : i + 2].tolist()
    members = range(first, first + len(sample.media))  # media stand before all else in a sample
    assert last - first >= len(members), "an index row holds at least its media"
    planned = []
    for item, member in zip(sample.media, members, strict=True):
        header = HeaderLengths(**{name: int(index.columns[name][member]) for name in HeaderLengths._fields})
        planned.append((item.modality, encoder.planned(item.modality, header)))
    return planned


def _load(path: Path, num_rows: int, wanted: Mapping[str, str]) -> tuple[Columns, dict[int, str]] | None:
    """What is stored at `path`; None when there is nothing usable."""
    try:
        with np.load(path, allow_pickle=False) as file:
            size = sum(member.file_size for member in file.zip.infolist())
            if size > _MOST_BYTES * (num_rows + 64):  # whoever wrote it: nothing larger is unpacked
                raise ValueError(f"expected {num_rows} rows, found {size} bytes")
            columns = {name: _column(file[name], num_rows, dtype) for name, dtype in wanted.items()}
            reasons = dict(zip(file["bad_rows"].tolist(), map(str, file["bad_reasons"].tolist()), strict=True))
        if set(np.flatnonzero(columns["tokens"] == 0).tolist()) != set(reasons):
            raise ValueError("rows without tokens and reasons do not go together")
    except FileNotFoundError:
        return None
    except _DAMAGED as error:
        log.warning("%s is damaged (%s); its lengths are computed again", path, error)
        return None
    return columns, reasons


def _column(values: NDArray[np.generic], num_rows: int, dtype: str) -> NDArray[np.generic]:
    if values.shape != (num_rows,) or values.dtype != np.dtype(dtype):
        raise ValueError(f"expected {dtype} [{num_rows}], found {values.dtype} {list(values.shape)}")
    return values


def _store(places: Sequence[Path], shard: Shard, columns: Columns, reasons: Mapping[int, str]) -> None:
    """Writes a file into the first place that takes it; without one the lengths are computed at every start, and that is said."""
    data = encode_lengths(columns, reasons)
    faults = []
    for path in places:
        # Several ranks may write the same file at once: each under a name of its own, then the last rename wins.
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            os.replace(temporary, path)
        except OSError as error:
            faults.append(f"{path}: {error.strerror}")
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        else:
            return
    log.warning("the lengths of %s cannot be kept (%s) and are computed again at every start; set data.cache.dir",
                shard.where, "; ".join(faults) or "no place for them")  # fmt: skip
