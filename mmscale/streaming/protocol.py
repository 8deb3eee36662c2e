"""The face that every kind of stream shows to the trainer: `loader.Stream` over indexed shards, `unindexed.stream` without."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any, Protocol

from mmscale.types import PackedBatch, Skip


class DataState(Protocol):
    """A resume point, equal on all ranks."""

    @property
    def num_skipped(self) -> int:
        """Samples drawn and not delivered since the run began."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """The state as JSON values."""
        ...


class DataStep(Protocol):
    """One optimizer step on one rank."""

    @property
    def packs(self) -> tuple[PackedBatch, ...]:
        """The packs that this rank has made, in micro-batch order: all of its data rank's, or its share of them."""
        ...

    @property
    def places(self) -> tuple[int, ...]:
        """The micro-batch that each of `packs` is of."""
        ...

    @property
    def num_packs(self) -> int:
        """Micro-batches of this step on this data rank."""
        ...

    @property
    def ids(self) -> tuple[str, ...]:
        """The sample ids of the global batch, equal on all ranks."""
        ...

    @property
    def num_epochs(self) -> float:
        """What was drawn up to and with this step, in epochs of all sources together."""
        ...

    def left_out(self) -> tuple[Skip, ...]:
        """Samples that were left out on the way without a place in any pack, for the list of skips."""
        ...

    def state_after(self, before: Any, skips: Sequence[Skip]) -> DataState:
        """The resume point after this step; `before` is the one before it of the same stream, None = the beginning."""
        ...


class DataStream(Protocol):
    """The training data of one data-parallel rank."""

    @property
    def meets_ranks(self) -> bool:
        """Whether every step is agreed on with the other ranks, on a group that the trainer uses, too: only the thread that
        talks to that group may then ask for steps."""
        ...

    def restore(self, data: Mapping[str, Any]) -> DataState:
        """The state that `DataState.to_dict` gave. Raises CheckpointError when it belongs to other data."""
        ...

    def steps(self, state: Any = None) -> Generator[DataStep, None, None]:
        """Steps from `state` (None = the beginning) on; close the generator to end what it has started."""
        ...
