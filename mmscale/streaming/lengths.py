"""How many tokens each row of a dataset has, so that everything can be planned without decoding anything.

Computed once from the text of every row and the index's length columns, and stored beside each shard for the tokenizer,
template and media specs that it holds for.
"""

from __future__ import annotations

import hashlib
import io
import os
import uuid
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmscale.errors import BadSampleError, RefusedInputError
from mmscale.logging import get_logger
from mmscale.streaming.chat import count_text_tokens, encode_chat
from mmscale.streaming.encode import Encoder, media_counts, media_end
from mmscale.streaming.index import TEXT_EXTENSIONS, ShardIndex
from mmscale.streaming.media import Lengths as HeaderLengths
from mmscale.streaming.media import modality_of
from mmscale.streaming.plan import TOO_LONG
from mmscale.streaming.rows import parse_sample
from mmscale.streaming.shards import Shard, ShardSet
from mmscale.types import Modality, Sample

log = get_logger(__name__)

_BATCH_ROWS = 1024
_NAMED_FAULTS = 5


@dataclass(frozen=True)
class SampleLengths:
    """Per row of a `ShardSet`: `tokens` uint32 [rows] as planned (0 = unusable, `reasons[row]` says why) and `media_rows`
    uint32 [rows], how many of them are media."""

    tokens: NDArray[np.uint32]
    media_rows: NDArray[np.uint32]
    reasons: dict[int, str]


def sample_lengths(shards: ShardSet, encoder: Encoder) -> SampleLengths:
    """The length of every row as `encoder` will give it, from stored files where they fit.

    Raises:
        RefusedInputError: a sample is longer than a pack and `data.on_long` is `error`.
    """
    parts = [_shard_lengths(shard, shards.name, encoder) for shard in shards.shards]
    starts = np.cumsum([0, *(len(shard) for shard in shards.shards)]).tolist()
    tokens = np.concatenate([p.tokens for p in parts])
    media_rows = np.concatenate([p.media_rows for p in parts])
    reasons = {start + row: r for start, p in zip(starts, parts, strict=False) for row, r in p.reasons.items()}
    for row in np.flatnonzero(tokens > encoder.max_tokens).tolist():
        tokens[row] = _shortened(shards, row, int(tokens[row]), encoder)
        if not tokens[row]:
            reasons[row] = TOO_LONG
    return SampleLengths(tokens, media_rows, reasons)


def _shortened(shards: ShardSet, row: int, tokens: int, encoder: Encoder) -> int:
    """Tokens of a row that is longer than a pack, 0 when it is left out."""
    if encoder.on_long == "error":
        text = f"{shards.id(row)}: expected at most data.seq_len={encoder.max_tokens} tokens, found {tokens}"
        raise RefusedInputError(f"{text}; raise data.seq_len, or set data.on_long to drop or truncate")
    if encoder.on_long == "drop":
        return 0
    shard, i = shards.locate(row)
    sample = _text_of(shards.shards[shard], i, shards.id(row))
    counts = _media_tokens(sample, shards.shards[shard].index, i, encoder)
    end = media_end(encode_chat(encoder.template, encoder.tokenizer, sample.turns, counts), counts)
    return encoder.kept_tokens(tokens, end)


def _shard_lengths(shard: Shard, name: str, encoder: Encoder) -> SampleLengths:
    # The digest of the whole tar: other text of equal size leaves sizes, headers and the index as they were.
    identity = f"2/{encoder.fingerprint}/{shard.sha256}/{len(shard)}"
    path = shard.path.with_suffix(f".lengths.{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npz")
    found = _load(path, len(shard))
    if found is None:
        found = _compute(shard, name, encoder)
        _store(path, found)
    return found


def _compute(shard: Shard, name: str, encoder: Encoder) -> SampleLengths:
    log.info("counting the tokens of %d samples in %s", len(shard), shard.path)
    tokens, media_rows = np.zeros(len(shard), np.uint32), np.zeros(len(shard), np.uint32)
    faults: dict[int, BadSampleError] = {}
    for lo in range(0, len(shard), _BATCH_ROWS):
        usable: dict[int, tuple[Sample, int]] = {}
        for i in range(lo, min(lo + _BATCH_ROWS, len(shard))):
            try:
                sample = _text_of(shard, i, f"{name}/{shard.path.name}:{shard.key(i)}")
                counts = _media_tokens(sample, shard.index, i, encoder)
                usable[i] = sample, sum(map(sum, counts.values()))
            except BadSampleError as error:
                faults[i] = error
        text = _count_text([sample for sample, _ in usable.values()], encoder)
        for (i, (_, media)), found in zip(usable.items(), text, strict=True):
            if isinstance(found, BadSampleError):
                faults[i] = found
            else:
                tokens[i], media_rows[i] = found + media, media
    _report(shard, faults)
    return SampleLengths(tokens, media_rows, {i: error.reason for i, error in sorted(faults.items())})


def _report(shard: Shard, faults: dict[int, BadSampleError]) -> None:
    if not faults:
        return
    counts = Counter(error.reason for error in faults.values())
    text = ", ".join(f"{reason} {n}" for reason, n in counts.most_common())
    log.warning("%s: %d of %d samples cannot be used (%s), such as", shard.path, len(faults), len(shard), text)
    for i in sorted(faults)[:_NAMED_FAULTS]:
        log.warning("  %s at offset %d: %s", shard.key(i), shard.offset(i), faults[i])


def _count_text(samples: Sequence[Sample], encoder: Encoder) -> list[int | BadSampleError]:
    """Text tokens of each sample, or why it has none; one call of the tokenizer unless a sample is at fault."""
    rows = [(s.turns, {m.modality for m in s.media}) for s in samples]
    try:
        return [int(n) for n in count_text_tokens(encoder.template, encoder.tokenizer, rows)]
    except BadSampleError as error:
        if len(samples) == 1:
            return [error]
        return [n for sample in samples for n in _count_text([sample], encoder)]


def _text_of(shard: Shard, i: int, sample_id: str) -> Sample:
    """The sample with empty media: only its text is read."""
    first, last = shard.index.columns["first"][i : i + 2].tolist()
    exts = [shard.index.exts[code] for code in shard.index.columns["ext"][first:last].tolist()]
    media = [(ext, b"") for ext in exts if modality_of(ext)]
    return parse_sample(sample_id, media + shard.members(i, keep=TEXT_EXTENSIONS.__contains__), shard.offset(i))


def _media_tokens(sample: Sample, index: ShardIndex, i: int, encoder: Encoder) -> dict[Modality, list[int]]:
    """Token counts of the sample's media from the index alone. Raises BadSampleError."""
    first, last = index.columns["first"][i : i + 2].tolist()
    members = range(first, first + len(sample.media))  # media stand before all else in a sample
    assert last - first >= len(members), "an index row holds at least its media"
    counts = []
    for item, member in zip(sample.media, members, strict=True):
        header = HeaderLengths(**{name: int(index.columns[name][member]) for name in HeaderLengths._fields})
        counts.append((item.modality, encoder.planned_tokens(item.modality, header)))
    return media_counts(counts)


def _load(path: Path, num_rows: int) -> SampleLengths | None:
    """What is stored at `path`; None when there is nothing usable."""
    try:
        with np.load(path, allow_pickle=False) as file:
            tokens, media_rows = file["tokens"].astype(np.uint32), file["media_rows"].astype(np.uint32)
            reasons = dict(zip(file["bad_rows"].tolist(), file["bad_reasons"].tolist(), strict=True))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("%s is damaged (%s); its lengths are computed again", path, error)
        return None
    whole = tokens.shape == media_rows.shape == (num_rows,) and set(np.flatnonzero(tokens == 0).tolist()) == set(
        reasons
    )
    return SampleLengths(tokens, media_rows, reasons) if whole else None


def _store(path: Path, lengths: SampleLengths) -> None:
    buffer = io.BytesIO()
    bad = sorted(lengths.reasons)
    np.savez(
        buffer,
        tokens=lengths.tokens,
        media_rows=lengths.media_rows,
        bad_rows=np.array(bad, np.int64),
        bad_reasons=np.array([lengths.reasons[row] for row in bad], np.str_),
    )
    # Several ranks may write the same file at once: each under a name of its own, then the last rename wins.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(buffer.getvalue())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        log.warning("%s cannot be written (%s); the lengths are computed again at every start", path, error.strerror)
