"""One rank's part of a checkpoint: copied into host memory, planned together with all ranks, written without talking to them.

torch's distributed checkpoint writes the files. Its own planner lets a tensor be written with a gap in one process, and takes
chunks only from its own tensor classes; this one takes ours, any number of one tensor per rank.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from mmscale.errors import CheckpointError
from mmscale.parallel.comm import gather_objects, on_main
from mmscale.parallel.layout import Chunk
from mmscale.parallel.mesh import Mesh
from mmscale.train.coverage import Box, coverage_problem
from mmscale.train.manifest import file_record

ITEM_BYTES = 4096
"""Room for what a file holds beside the numbers of a chunk: torch's archive of it and its place in `.metadata`."""


class Snapshot(DefaultSavePlanner):
    """This rank's part of the state in host memory, untouched by later updates.

    The memory is kept and filled again by the next `take`: fresh pages would cost more than the copy.
    """

    def __init__(self) -> None:
        super().__init__()
        self.items: list[WriteItem] = []
        self._values: dict[MetadataIndex, Tensor] = {}
        self._is_cancelled = threading.Event()

    def take(self, views: Iterable[tuple[str, Chunk]]) -> None:
        """Copies the chunks of `Engine.state_views`."""
        kept, self._values, self.items = self._values, {}, []
        for name, chunk in views:
            if not chunk.whole.numel():
                chunk = Chunk(chunk.value.new_empty(chunk.whole), (0,) * len(chunk.whole), chunk.whole)
            # an empty part of a tensor would stand at the place of its neighbour
            if chunk.value.numel() or not chunk.whole.numel():
                index = MetadataIndex(name, torch.Size(chunk.offsets))
                self._values[index] = _copy(chunk.value.detach(), kept.get(index))
                self.items.append(_write_item(index, self._values[index], chunk.whole))
        self._is_cancelled.clear()

    @property
    def bytes_needed(self) -> int:
        """At least as many bytes as the files of this part take."""
        return sum(value.nbytes + ITEM_BYTES for value in self._values.values())

    def cancel(self) -> None:
        """Lets a `write_part` that is under way fail at its next chunk."""
        self._is_cancelled.set()

    def create_local_plan(self) -> SavePlan:
        """The items of this rank."""
        return SavePlan(self.items)

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The values of an item, contiguous on the CPU. Raises OSError once cancelled."""
        if self._is_cancelled.is_set():
            raise OSError("the save was given up")
        return self._values[write_item.index]


class StatePlan:
    """Where each tensor of the state lies in the files of all ranks. Gathered again only when a rank's part has changed."""

    def __init__(self, mesh: Mesh, names: frozenset[str]) -> None:
        """Args:
        names: of all tensors that the checkpoint must have.
        """
        self._mesh, self._names = mesh, names
        self._own: list[WriteItem] | None = None
        self._all: list[list[WriteItem]] = [[] for _ in range(mesh.world_size)]
        self._metadata: Metadata | None = None

    def agree(self, items: list[WriteItem]) -> None:
        """Takes the items of all ranks together.

        Raises:
            CheckpointError: on every rank, when chunks leave a gap or overlap, or a tensor out; the text names it.

        Distributed: every rank calls it.
        """
        gathered = gather_objects(self._mesh, None if items == self._own else items)
        on_main(self._mesh, lambda: self._merge(gathered or []))
        self._own = items

    def write_metadata(self, folder: Path, places: Sequence[list[WriteResult]]) -> None:
        """On rank 0: writes `.metadata`, which makes the files of all ranks readable. Raises OSError.

        Args:
            places: of all ranks, see `Part`.
        """
        assert self._metadata is not None, "the ranks agree before they write"
        _file_writer(folder).finish(self._metadata, list(places))

    def _merge(self, gathered: Sequence[list[WriteItem] | None]) -> None:
        if all(new is None for new in gathered):
            return
        self._all = [old if new is None else new for old, new in zip(self._all, gathered, strict=True)]
        plans = _without_repeated_empty(self._all)
        _check((item for plan in plans for item in plan.items), self._names)
        _, self._metadata = create_default_global_save_plan(plans)


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank has written: places of its chunks, `file_record` of its files, and how long it took."""

    places: list[WriteResult]
    files: dict[str, dict[str, Any]]
    seconds: float


def write_part(folder: Path, rank: int, snapshot: Snapshot) -> Part:
    """Writes this rank's chunks into `folder`, synced to the disk. Talks to no other rank.

    Raises OSError or RuntimeError (torch) when the disk refuses or the snapshot is cancelled.
    """
    started = time.perf_counter()
    writer = _file_writer(folder)
    # the writer names files by the place of a plan in the list of all ranks' plans
    plan = writer.prepare_global_plan([SavePlan([])] * rank + [snapshot.create_local_plan()])[rank]
    places = writer.write_data(plan, snapshot).value()
    files = {path.name: file_record(path) for path in sorted(folder.glob(f"__{rank}_*"))}
    return Part(places, files, time.perf_counter() - started)


def _file_writer(folder: Path) -> dcp.FileSystemWriter:
    return dcp.FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, thread_count=1)


def _copy(value: Tensor, buffer: Tensor | None) -> Tensor:
    """The values in `buffer` if they fit, else in new memory; contiguous on the CPU."""
    if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
        buffer = torch.empty(value.shape, dtype=value.dtype)
    return buffer.copy_(value)


def _write_item(index: MetadataIndex, value: Tensor, whole: torch.Size) -> WriteItem:
    assert index.offset is not None, "every chunk has a place"
    place = ChunkStorageMetadata(offsets=index.offset, sizes=value.shape)
    data = TensorWriteData(chunk=place, properties=TensorProperties.create_from_tensor(value), size=whole)
    return WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)


def _without_repeated_empty(parts: Sequence[Sequence[WriteItem]]) -> list[SavePlan]:
    """The plans of all ranks; an empty tensor that several ranks write counts once."""
    seen: set[str] = set()
    kept = []
    for part in parts:
        items = []
        for item in part:
            is_empty = item.tensor_data is not None and not item.tensor_data.size.numel()
            if not (is_empty and item.index.fqn in seen):
                items.append(item)
            if is_empty:
                seen.add(item.index.fqn)
        kept.append(SavePlan(items))
    return kept


def _check(items: Iterable[WriteItem], names: frozenset[str]) -> None:
    """Raises CheckpointError unless there are all tensors and no others, and the chunks of each agree in its shape and type and
    make it up exactly once."""
    chunks: defaultdict[str, list[TensorWriteData]] = defaultdict(list)
    for item in items:
        assert item.tensor_data is not None, "every item is a chunk"
        chunks[item.index.fqn].append(item.tensor_data)
    for name in sorted(names ^ set(chunks)):
        raise _refusal(name, "none" if name in names else "some of a tensor that the engine does not name")
    for name, found in chunks.items():
        kinds = {(data.size, data.properties.dtype) for data in found}
        if len(kinds) > 1:
            raise _refusal(name, f"chunks of different tensors: {sorted(map(str, kinds))}")
        boxes = [Box(tuple(d.chunk.offsets), tuple(d.chunk.sizes)) for d in found if d.chunk is not None]
        problem = coverage_problem(found[0].size, boxes)
        if problem is not None:
            raise _refusal(name, f"{problem}, in a tensor of shape {list(found[0].size)}")


def _refusal(name: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"{name}: expected chunks of all ranks that make it up, each element once, found {found}; nothing was saved: the engine "
        "gives a wrong layout, report it with the parallel.* keys"
    )
