"""The samples of one shard as they stand in the stream, opened and grouped by the webdataset library.

Between its opener and its grouping stands our own reading of the tar: the library's ends in silence at a damaged header,
passes on every name, and fills the memory from a compressed bomb. None of its decoders is used.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import IO, Any

from mmscale.errors import DataError
from mmscale.logging import get_logger
from mmscale.streaming.index import TEXT_EXTENSIONS
from mmscale.streaming.media import is_executable, modality_of
from mmscale.streaming.storage.source import RETRY_DELAYS_S
from mmscale.streaming.tar import Member, split_name
from mmscale.streaming.unindexed.tar import read_members
from mmscale.streaming.unindexed.urls import ShardUrl

log = get_logger(__name__)

DAMAGED = "shard_damaged"
"""Reason for the one skip that a shard leaves behind when it cannot be read to its end."""


@dataclass(frozen=True, slots=True)
class RawSample:
    """A sample of a shard: (extension, bytes) of its members, or why it may not be used. `offset` is of its first member."""

    key: str
    offset: int
    members: tuple[tuple[str, bytes], ...] = ()
    reason: str = ""
    detail: str = ""


def read_shard(shard: ShardUrl, *, wait: Callable[[float], None] = time.sleep) -> Iterator[RawSample]:
    """Every sample of a shard in its order, refused ones included.

    A shard that is damaged gives what stands before the damage, and then one sample with the reason DAMAGED. When the
    connection breaks, the shard is opened again and what was given is left out.

    Raises:
        DataError: the shard cannot be opened or read, after some tries.
    """
    given = 0
    for delay_s in (*RETRY_DELAYS_S, None):
        try:
            for sample in islice(_read_once(shard), given, None):
                given += 1
                yield sample
            return
        except OSError as error:
            if delay_s is None:
                raise DataError(
                    f"{shard.name}: cannot be read after {len(RETRY_DELAYS_S) + 1} tries ({_why(error)}), {given} samples of it "
                    "were; see that it can be reached and start again"
                ) from None
            log.warning("%s: %s; it is opened again", shard.name, _why(error), all_ranks=True)
            wait(delay_s)


def _read_once(shard: ShardUrl) -> Iterator[RawSample]:
    from webdataset.tariterators import group_by_keys, url_opener

    faults = _Faults()
    files = _files(url_opener([{"url": shard.url}]), shard, faults)
    for found in group_by_keys(files, keys=tuple):  # the names are (key, extension) already
        key = found.pop("__key__")
        found.pop("__url__")
        ours = faults.named.pop(key, None)
        yield from faults.drain()
        offset = min(offset for offset, _ in found.values())
        yield ours or RawSample(key, offset, tuple((ext, data) for ext, (_, data) in found.items()))
    yield from faults.drain()


@dataclass(slots=True)
class _Faults:
    """The refused samples of a shard that were not given yet, and the keys that are of no use any more."""

    named: dict[str, RawSample] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)

    def add(self, key: str, offset: int, reason: str, detail: str) -> None:
        self.refused.add(key)
        self.named.setdefault(key, RawSample(key, offset, reason=reason, detail=detail))

    def drain(self) -> Iterator[RawSample]:
        while self.named:
            yield self.named.pop(next(iter(self.named)))


def _files(opened: Iterator[dict[str, Any]], shard: ShardUrl, faults: _Faults) -> Iterator[dict[str, Any]]:
    """The members that may be used, as webdataset groups them; what is wrong with the others goes to `faults`.

    A fault of any member takes its whole sample out, once. Only a sample whose members are not adjacent cannot be taken back:
    what comes later is refused.
    """
    for source in opened:
        stream = source["stream"]
        current, exts, ended = "", set[str](), set[str]()
        try:
            for member, data in read_members(stream, shard.name, _is_read):
                key, ext = split_name(member.name)
                _refuse_executable(shard, member, ext, data)
                if not member.fault and key != current and key not in faults.refused:
                    ended.add(current)
                    current, exts = key, set()
                fault = member.fault or ("split_sample" if key in ended else "duplicate_member" if ext in exts else "")
                if fault and key not in faults.refused:
                    faults.add(key, member.offset, fault, f"the member {member.name[:80]!r}")
                if key not in faults.refused:
                    exts.add(ext)
                    yield {"fname": (key, ext), "data": (member.offset, data), "__url__": shard.name}
            stream.close()  # here a command or a transfer says that it has failed
        except DataError as error:
            if not stream.read(1):
                stream.close()  # an OSError when it was the transfer that broke, and not the shard
            log.warning("put aside at its damage: %s", error, all_ranks=True)
            faults.add("" if current in faults.refused else current, 0, DAMAGED, str(error))
        finally:
            _abandon(stream)


def _is_read(member: Member) -> bool:
    ext = split_name(member.name)[1]
    return ext in TEXT_EXTENSIONS or modality_of(ext) is not None


def _refuse_executable(shard: ShardUrl, member: Member, ext: str, head: bytes) -> None:
    if is_executable(ext, head):
        raise DataError(
            f"{shard.name}: the member {member.name[:80]!r} at offset {member.offset} is of a kind that runs code when loaded; "
            "the shard is not read on: write it again without such files"
        )


def _abandon(stream: IO[bytes]) -> None:
    """Closes a stream that may not be at its end, without waiting for the command behind it."""
    from webdataset.gopen import Pipe

    if isinstance(stream, Pipe):
        stream.ignore_errors = True
        stream.proc.kill()
    stream.close()


def _why(error: OSError) -> str:
    """What went wrong, without the command or URL: those may hold secrets."""
    if error.strerror:
        return error.strerror
    code = re.search(r"exit -?\d+", str(error))
    return f"the command behind it ended with {code[0]}" if code else type(error).__name__
