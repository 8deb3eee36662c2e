"""Planned packs in, finished packs out, in the same order, through worker processes or in this process.

Workers read, decode and collate. A sample that fails becomes filler of its planned length; what ends the run is returned
as a value and raised in the trainer's process.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.data import DataLoader, Dataset

from mmscale.config.env import set_env_default
from mmscale.errors import BadSampleError, ConfigError, DataError, MmscaleError
from mmscale.logging import get_logger
from mmscale.streaming.collate import collate
from mmscale.streaming.encode import Encoder
from mmscale.streaming.plan import Draw, Pack
from mmscale.streaming.shards import ShardSet
from mmscale.types import EncodedSample, PackedBatch, Skip

if TYPE_CHECKING:
    from torch.utils.data import Sampler

log = get_logger(__name__)

_LOOK_UP_S = 2.0
"""A worker looks so often whether its trainer still lives."""


@dataclass(frozen=True)
class Source:
    """An opened source: its name in the config, its shards, and how its samples become documents."""

    name: str
    shards: ShardSet
    encoder: Encoder


def read_packs(
    sources: Sequence[Source], packs: Iterator[Pack], num_workers: int, prefetch: int
) -> Generator[PackedBatch, None, None]:
    """The finished packs of `packs`, in order; close the iterator to end its worker processes.

    Args:
        sources: what `Draw.source_idx` points into.
        packs: asked for in this process, `num_workers * prefetch` packs ahead.
        num_workers: processes; 0 works in this process.
        prefetch: packs that each worker prepares ahead.

    Raises:
        DataError: a worker process died, or a shard changed while it was read.
    """
    loader = DataLoader(
        _PackReader(sources),
        batch_size=None,
        sampler=cast("Sampler[Pack]", packs),
        num_workers=num_workers,
        collate_fn=_as_is,
        prefetch_factor=prefetch if num_workers else None,
        multiprocessing_context=multiprocessing.get_context("fork") if num_workers else None,
        worker_init_fn=_init_worker,
        generator=torch.Generator(),  # else every iterator would draw from the trainer's random numbers
    )
    results, workers = _start(loader) if num_workers else (iter(loader), [])
    try:
        while True:
            _check_alive(workers)
            result = next(results, None)
            if result is None:
                return
            if isinstance(result, MmscaleError):
                raise result
            yield result
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(_worker_died(str(error).splitlines()[0])) from error
    finally:
        del results  # its end is the end of the workers


def _start(loader: DataLoader[Any]) -> tuple[Iterator[Any], list[BaseProcess]]:
    """The running loader and its processes."""
    # The tokenizer's threads do not survive a fork; without this the library says so once per worker.
    set_env_default("TOKENIZERS_PARALLELISM", "false")
    # Each tensor on its way from a worker holds a file descriptor, and many systems start with 1024.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    others, handler = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
    results = iter(loader)
    if threading.current_thread() is threading.main_thread():
        # torch's handler would raise the death of a worker at whatever line the trainer is; it is noticed here instead.
        signal.signal(signal.SIGCHLD, handler if handler is not None else signal.SIG_DFL)
    return results, [p for p in multiprocessing.active_children() if p not in others]


def _check_alive(workers: Sequence[BaseProcess]) -> None:
    for worker in workers:
        if not worker.is_alive():
            raise DataError(_worker_died(f"process {worker.pid} ended with code {worker.exitcode}"))


def _worker_died(found: str) -> str:
    text = f"expected loader processes that live as long as the run, found: {found}"
    return (
        f"{text}; look for an out-of-memory kill or a full /dev/shm, lower data.workers or data.prefetch, start again"
    )


class _PackReader(Dataset[Any]):
    """Planned pack -> finished pack, or the error that ends the run."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = tuple(sources)

    def __getitem__(self, pack: Any) -> PackedBatch | MmscaleError:
        skips: list[Skip] = []
        try:
            documents = [self._document(draw, skips) for draw in pack]
        except MmscaleError as error:
            return error if isinstance(error, DataError) else ConfigError(str(error))
        return collate(documents, self._sources[0].encoder.specs, skips)

    def _document(self, draw: Draw, skips: list[Skip]) -> EncodedSample:
        source = self._sources[draw.source_idx]
        try:
            document = source.encoder.encode(source.shards.read(draw.row))
            if len(document) == draw.tokens:
                return document
            reason, detail = "length", f"{draw.tokens} tokens planned from the headers, {len(document)} found"
        except BadSampleError as error:
            reason, detail = error.reason, error.detail
        except MmscaleError:
            raise
        except Exception as error:  # the worker's border: whatever a decoder raises, one sample never ends a run
            reason, detail = "unexpected", f"{type(error).__name__}: {error}"
            log.exception("%s: unexpected failure", source.shards.id(draw.row), all_ranks=True)
        sample_id, offset = source.shards.id(draw.row), source.shards.offset(draw.row)
        skip = Skip(sample_id, reason, detail[:500], offset, source.name, draw.epoch)
        log.warning("skipped %s at offset %d: %s: %s", sample_id, offset, reason, skip.detail, all_ranks=True)
        skips.append(skip)
        return source.encoder.filler(sample_id, draw.tokens)


def _as_is(item: Any) -> Any:
    return item


def _init_worker(_worker_idx: int) -> None:
    """Leaves signals to the trainer: it finishes its step and saves, and for that it still needs its workers.

    SIGTERM ends a worker only when the trainer itself sends it or is gone. A thread waits for it, so that it works while the
    main thread sits in a decoder.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_trainer, args=(os.getppid(),), daemon=True).start()


def _end_with_trainer(trainer_pid: int) -> None:
    while os.getppid() == trainer_pid:
        info = signal.sigtimedwait({signal.SIGTERM}, _LOOK_UP_S)
        if info is not None and info.si_pid == trainer_pid:
            break
    os._exit(0)
