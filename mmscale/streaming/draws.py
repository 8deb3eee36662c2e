"""Which documents a window of the plan holds: every source's own order, the shares, and what was carried over.

The draws of all sources form one stream. Draw k of a source with the share `p` has the virtual time `(k + 1/2) / p`, and
window w covers the virtual times `[w * W, (w + 1) * W)`: so a window is a function of w alone. Draw k of a source of N rows
is position `k % N` of epoch `k // N`, and each epoch is an order of its own: each row once per epoch, whatever the shares are.
When a source has ended, the count begins anew at that window, and behind that window when the mixture was changed at a resume: a
phase of the mixture.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.streaming.pack import Ints
from mmscale.streaming.permute import shuffle_blocks

MAX_AGE = 4
"""A document that was carried over so many windows is emitted, however empty its pack is; more are not counted."""

Drawn = tuple[tuple[str, int], ...]
"""Draws made so far, by source."""


@dataclass(frozen=True)
class Carry:
    """Documents that wait. `runs`: (source, windows waited, how many), those of a source together; `numbers`: their draws, see
    `encode_numbers`."""

    runs: tuple[tuple[str, int, int], ...] = ()
    numbers: str = ""

    def __len__(self) -> int:
        return sum(count for _, _, count in self.runs)

    def items(self) -> Iterator[tuple[str, int, Ints]]:
        """(source, windows waited, numbers of its draws) for each run. Raises ValueError when the numbers are damaged."""
        arrays = decode_numbers(self.numbers, [count for _, _, count in self.runs])
        for (name, age, _), numbers in zip(self.runs, arrays, strict=True):
            yield name, age, numbers

    @classmethod
    def of(cls, items: Iterable[tuple[str, int, Ints]]) -> Carry:
        """The documents of some (source, windows waited, ascending numbers), those of a source together."""
        runs = list(items)
        return cls(tuple((name, age, len(n)) for name, age, n in runs), encode_numbers([n for _, _, n in runs]))

    def only(self, names: Collection[str]) -> Carry:
        """The documents of some sources."""
        return Carry.of(item for item in self.items() if item[0] in names)

    def to_dict(self) -> dict[str, Any]:
        """The documents as JSON values, each name once."""
        runs: dict[str, list[list[int]]] = {}
        for name, age, count in self.runs:
            runs.setdefault(name, []).append([age, count])
        return {"runs": runs, "numbers": self.numbers}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Carry:
        """What `to_dict` wrote. Raises KeyError, TypeError or ValueError when the values have another form."""
        runs = ((str(name), int(age), int(n)) for name, of_source in data["runs"].items() for age, n in of_source)
        carry = cls(tuple(runs), str(data["numbers"]))
        list(carry.items())
        return carry


@dataclass(frozen=True)
class PlanSource:
    """One source as the plan sees it.

    Per row: `tokens` uint32 (0 = unusable, its reason is in `reasons`), `vision` and `audio` uint16, the tower inputs.
    `share`: of the draws, relative to the other sources. `max_samples`: rows that are used, chosen by the seed; None = all.
    `max_epochs`: epochs after which the source ends; None = never.
    """

    name: str
    tokens: NDArray[np.uint32]
    vision: NDArray[np.uint16]
    audio: NDArray[np.uint16]
    reasons: Mapping[int, str] = field(default_factory=dict)
    share: Fraction = Fraction(1)
    max_samples: int | None = None
    max_epochs: int | None = None

    @property
    def num_rows(self) -> int:
        """Rows of an epoch, unusable ones included."""
        return min(len(self.tokens), self.max_samples or len(self.tokens))

    @property
    def last_draw(self) -> int | None:
        """Draws after which the source ends; None = never."""
        return None if self.max_epochs is None else self.max_epochs * self.num_rows

    @cached_property
    def digest(self) -> str:
        """Equal for equal lengths of all rows."""
        parts = hashlib.blake2b(digest_size=8)
        for column in (self.tokens, self.vision, self.audio):
            parts.update(column.tobytes())
        return parts.hexdigest()

    def used_tokens(self, block: int, seed: int) -> NDArray[np.uint32]:
        """`tokens` of the rows that are used."""
        everything = np.arange(self.num_rows, dtype=np.int64)
        return self.tokens if self.num_rows == len(self.tokens) else self.tokens[self.rows(everything, 0, block, seed)]

    def rows(self, positions: Ints, epoch: int, block: int, seed: int) -> Ints:
        """The rows at some positions of an epoch."""
        positions = shuffle_blocks(positions, self.num_rows, block, f"{seed}/{self.name}/{epoch}")
        if self.num_rows == len(self.tokens):
            return positions
        return shuffle_blocks(positions, len(self.tokens), block, f"{seed}/{self.name}/chosen")


@dataclass(frozen=True)
class Draws:
    """Columns int64 [n] of draws: source index, number of the draw in its source, windows waited, row, epoch, tokens,
    vision and audio inputs."""

    source: Ints
    number: Ints
    age: Ints
    row: Ints
    epoch: Ints
    tokens: Ints
    vision: Ints
    audio: Ints

    def __getitem__(self, idx: Any) -> Draws:
        return Draws(*(getattr(self, name)[idx] for name in self.__dataclass_fields__))

    def __len__(self) -> int:
        return len(self.source)

    @classmethod
    def cat(cls, parts: Sequence[Draws]) -> Draws:
        """All draws of some parts, one part after the other."""
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in cls.__dataclass_fields__))


class Mixture:
    """Draws of some sources, by window."""

    def __init__(self, sources: Sequence[PlanSource], *, window: int, block: int, seed: int) -> None:
        """`window`: draws of a window while no source has ended; `block`: see `shuffle_blocks`."""
        self.sources, self.window, self.block, self.seed = tuple(sources), window, block, seed

    def positions(self, window: int, since: int, drawn: Drawn) -> Drawn:
        """Draws of each source before `window`, when `drawn` were made before the window `since` of the same phase.

        A phase that begins later than `window` has drawn nothing yet.
        """
        windows = max(0, window - since)
        base = dict(drawn)
        live = [s for s in self.sources if s.last_draw is None or base.get(s.name, 0) < s.last_draw]
        total = sum((s.share for s in live), Fraction(0))
        out = {s.name: base.get(s.name, 0) for s in self.sources}
        for source in live:
            num, den = (source.share / total).as_integer_ratio()
            number = out[source.name] + (2 * num * windows * self.window + den) // (2 * den)
            out[source.name] = number if source.last_draw is None else min(number, source.last_draw)
        return tuple(out.items())

    def has_ended(self, drawn: Drawn) -> bool:
        """Whether every source has made its last draw."""
        return all(s.last_draw is not None and n >= s.last_draw for s, (_, n) in zip(self.sources, drawn, strict=True))

    def next_phase(self, since: int, drawn: Drawn, window: int, positions: Drawn) -> tuple[int, Drawn]:
        """(`since`, `drawn`) for the window `window`, before which `positions` draws were made: new when a source ended."""
        before = dict(drawn)
        for source, (_, now) in zip(self.sources, positions, strict=True):
            if source.last_draw is not None and before.get(source.name, 0) < source.last_draw <= now:
                return window, positions
        return since, drawn

    def draws(self, first: Drawn, last: Drawn, carry: Carry) -> Draws:
        """The documents between two places of every source, and those that were carried over, by source and number."""
        by_name = {source.name: i for i, source in enumerate(self.sources)}
        parts = [self._draws(by_name[name], numbers, age) for name, age, numbers in carry.items()]
        for i, ((_, lo), (_, hi)) in enumerate(zip(first, last, strict=True)):
            parts.append(self._draws(i, np.arange(lo, hi, dtype=np.int64), 0))
        draws = Draws.cat(parts)
        return draws[np.lexsort((draws.number, draws.source))]

    def encode(self, draws: Draws) -> Carry:
        """Draws that wait, one window older. `draws` stand by source and number."""
        waited = np.minimum(draws.age + 1, MAX_AGE)
        runs = []
        for source_idx, age in sorted(set(zip(draws.source.tolist(), waited.tolist(), strict=True))):
            numbers = draws.number[(draws.source == source_idx) & (waited == age)]
            runs.append((self.sources[source_idx].name, age, numbers))
        return Carry.of(runs)

    def _draws(self, source_idx: int, number: Ints, age: int) -> Draws:
        source = self.sources[source_idx]
        epoch, position = np.divmod(number, source.num_rows)
        row = np.empty_like(number)
        for e in np.unique(epoch).tolist():
            here = epoch == e
            row[here] = source.rows(position[here], e, self.block, self.seed)
        columns = (c[row].astype(np.int64) for c in (source.tokens, source.vision, source.audio))
        return Draws(np.full_like(number, source_idx), number, np.full_like(number, age), row, epoch, *columns)


def encode_numbers(runs: Sequence[Ints]) -> str:
    """Runs of ascending numbers as text: the distances in bytes of 7 bits, packed; about 5 bits a number when 1 in 16 is there.

    Example:
        >>> text = encode_numbers([np.array([3, 4, 1000]), np.array([2])])
        >>> [run.tolist() for run in decode_numbers(text, [3, 1])]
        [[3, 4, 1000], [2]]
    """
    steps = np.concatenate([np.diff(run, prepend=0) for run in runs]) if runs else np.zeros(0, np.int64)
    width = max(1, -(-int(steps.max(initial=0)).bit_length() // 7))
    place = np.arange(width)
    groups = steps[:, None] >> 7 * place & 0x7F
    last = np.max(np.where(groups != 0, place, 0), axis=1)[:, None]  # of the bytes of a number that say something
    data = (groups | np.where(place < last, 0x80, 0))[place <= last].astype(np.uint8).tobytes()
    # distances are noise, in which a search for repeats only costs
    packer = zlib.compressobj(9, strategy=zlib.Z_HUFFMAN_ONLY)
    return base64.b85encode(packer.compress(data) + packer.flush()).decode()


def decode_numbers(text: str, counts: Sequence[int]) -> list[Ints]:
    """The runs of `counts` numbers in what `encode_numbers` wrote. Raises ValueError when it is something else."""
    if not sum(counts):
        return [np.zeros(0, np.int64) for _ in counts]
    try:
        data = np.frombuffer(zlib.decompress(base64.b85decode(text)), np.uint8)
    except zlib.error as error:
        raise ValueError(f"not a list of numbers: {error}") from error
    ends = np.flatnonzero(data < 0x80)
    if len(ends) != sum(counts):
        raise ValueError(f"expected {sum(counts)} numbers, found {len(ends)}")
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(len(data)) - np.repeat(starts, np.diff(starts, append=len(data)))
    steps = np.add.reduceat((data & 0x7F).astype(np.int64) << 7 * place, starts)
    return [np.cumsum(run) for run in np.split(steps, np.cumsum(counts)[:-1])]
