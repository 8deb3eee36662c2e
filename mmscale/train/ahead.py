"""The next step's packs, fetched and divided while this step computes.

This is the work of a thread: splitting a pack of 131,072 tokens and sending its parts takes 0.1 to 0.3 s of host time. Only a
stream whose steps are agreed on with all ranks (stream mode) makes each step when it is asked for, as two threads cannot talk to
one group.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from dataclasses import replace
from types import TracebackType

from mmscale.parallel.share import Shared, Sharing, share_packs
from mmscale.streaming.protocol import DataStep

GIVE_UP_S = 5.0
"""How long a failing rank waits for its thread, which may wait for the other ranks, and those for this rank's end."""

Step = tuple[DataStep, Shared]


class Ahead:
    """The steps of a stream with this rank's part of each, one ahead.

    `take` gives the next one; `begin` starts to make the one after it, and is called when the main thread has no more to say to
    the group of the replica, which the thread then uses alone until `settle` or `take` has returned. A step that has not begun,
    as the first, is made by the caller of `take`: so the main thread starts the loader's processes, and the kernel ends them
    with it.

    Args:
        meets_ranks: see `DataStream`.

    Distributed: every rank of a replica calls the same methods in the same order.
    """

    def __init__(self, steps: Generator[DataStep, None, None], sharing: Sharing, *, meets_ranks: bool = False) -> None:
        self._steps = steps
        self._sharing = sharing
        self._is_making = False
        self._orders: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._made: queue.SimpleQueue[Step | BaseException] = queue.SimpleQueue()
        self._next: Step | BaseException | None = None
        self._thread: threading.Thread | None = None
        if not meets_ranks:
            self._thread = threading.Thread(target=self._work, name="ahead", daemon=True)
            self._thread.start()

    def take(self) -> Step:
        """The next step. Raises what the stream raises, and what `share_packs` does."""
        self.settle()
        if self._next is None:
            return self._make()
        step, self._next = self._next, None
        if isinstance(step, BaseException):
            raise step
        return step

    def begin(self) -> None:
        """Starts to make the next step, unless it has begun or has no thread to make it."""
        if self._thread is not None and self._next is None and not self._is_making:
            self._is_making = True
            self._orders.put(True)

    def settle(self) -> None:
        """Returns when nothing is being made: the group of the replica is free."""
        if self._is_making:
            self._next = self._made.get()
            self._is_making = False

    def __enter__(self) -> Ahead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            self._steps.close()
            return
        self._orders.put(False)
        self._thread.join(None if kind is None else GIVE_UP_S)

    def _make(self) -> Step:
        batch = next(self._steps)
        shared = share_packs(self._sharing, batch.packs, batch.places, batch.num_packs)
        if self._sharing.mesh.device.type == "cuda":
            shared = replace(shared, batches=tuple(part.pinned() for part in shared.batches))
        return batch, shared

    def _work(self) -> None:
        try:
            while self._orders.get():
                try:
                    self._made.put(self._make())
                except BaseException as error:  # raised again by whoever takes it
                    self._made.put(error)
        finally:
            self._steps.close()
