"""Writes the chunks of all ranks by torch's distributed checkpoint, once they are known to make up every tensor.

torch's own planner lets a tensor be written with a gap in one process, and takes chunks only from its own tensor classes; this
one takes ours, any number of one tensor per rank.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType

from mmscale.errors import CheckpointError
from mmscale.parallel.layout import Chunk
from mmscale.train.coverage import Box, coverage_problem


def write_chunks(
    folder: Path, chunks: Iterable[tuple[str, Chunk]], names: frozenset[str], group: dist.ProcessGroup | None
) -> None:
    """Writes the tensors that the chunks of all ranks make up into `folder`, and `.metadata` last.

    Args:
        chunks: state names and CPU tensors of this rank; all are held until the files are written.
        names: of all tensors that the checkpoint must have.
        group: a gloo group of all ranks that write; None on one process.

    Raises:
        CheckpointError: on every rank, when chunks leave a gap or overlap, or a tensor out; the text names it. Nothing is written.
        OSError: on every rank, when the disk refuses.

    Distributed: every rank of the group calls it.
    """
    planner = _Planner(chunks, names)
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, thread_count=1)
    try:
        with warnings.catch_warnings():
            # torch warns that one process without a group saves alone, which is what we ask for.
            warnings.simplefilter("ignore", UserWarning)
            dcp.save({}, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        for cause, _ in error.failures.values():
            if isinstance(cause, CheckpointError):
                raise CheckpointError(str(cause)) from error
        raise OSError(f"{type(error).__name__}: {error}") from error


class _Planner(SavePlanner):
    """Every chunk becomes one item; rank 0 refuses the plan of all ranks when a tensor is not made up exactly once."""

    def __init__(self, chunks: Iterable[tuple[str, Chunk]], names: frozenset[str]) -> None:
        self._names = names
        self._chunks: dict[MetadataIndex, Chunk] = {}
        self._items: list[WriteItem] = []
        for name, chunk in chunks:
            if not chunk.whole.numel():
                chunk = Chunk(chunk.value.new_empty(chunk.whole), (0,) * len(chunk.whole), chunk.whole)
            # an empty part of a tensor would stand at the place of its neighbour
            if chunk.value.numel() or not chunk.whole.numel():
                item = _write_item(name, chunk)
                self._items.append(item)
                self._chunks[item.index] = chunk

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Nothing: the chunks were given at construction."""

    def create_local_plan(self) -> SavePlan:
        """The items of this rank."""
        return SavePlan(self._items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """On rank 0: the plans of all ranks and the metadata. Raises CheckpointError when they do not make up the tensors."""
        plans = _without_repeated_empty(all_plans)
        _check((item for plan in plans for item in plan.items), self._names)
        return create_default_global_save_plan(plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """This rank's plan as rank 0 sent it back."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The values of an item, contiguous on the CPU."""
        return self._chunks[write_item.index].value.detach().cpu().contiguous()


def _write_item(name: str, chunk: Chunk) -> WriteItem:
    offsets = torch.Size(chunk.offsets)
    properties = TensorProperties.create_from_tensor(chunk.value)
    place = ChunkStorageMetadata(offsets=offsets, sizes=chunk.value.shape)
    data = TensorWriteData(chunk=place, properties=properties, size=chunk.whole)
    return WriteItem(index=MetadataIndex(name, offsets), type=WriteItemType.SHARD, tensor_data=data)


def _without_repeated_empty(plans: list[SavePlan]) -> list[SavePlan]:
    """An empty tensor that several ranks offer is written by the first of them."""
    seen: set[str] = set()
    kept = []
    for plan in plans:
        items = []
        for item in plan.items:
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
