"""Attention over one pack whose tokens are divided over ranks: Ulysses inside, exchange, gather or ring outside.

Shapes: N tokens of one rank, L = U * N tokens of one outer rank, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from mmscale.errors import ParallelError
from mmscale.kernels.attention.attend import attend
from mmscale.model.llm.attention import attention_kernel, document_segments
from mmscale.parallel.mesh import Mesh
from mmscale.parallel.sp.exchange import AllRows, KeyRows, NeededRows, collected_attend
from mmscale.parallel.sp.plan import Kind
from mmscale.parallel.sp.ring import Ring, ring_attend
from mmscale.parallel.sp.routes import exchange_route, gather_route, ring_blocks
from mmscale.parallel.sp.ulysses import own_heads, to_heads, to_rows
from mmscale.types import Spans


@dataclass(frozen=True, slots=True)
class SequenceAttention:
    """Causal attention inside the documents of a pack, for this rank's part of it; a `PackAttention`.

    spans      which tokens each outer rank holds; this rank has the `mesh.ulysses.rank`-th piece of those of
               `mesh.ring.rank`
    lengths    document lengths with the padding document
    kind       how the outer ranks get at each other's keys: `exchange` sends only rows that a query elsewhere sees, `gather`
               sends all rows to all, `ring` holds two ranks' rows at a time
    kernel     see `mmscale.kernels.attention.select`

    Distributed: all ranks of `mesh.sequence` call it, in the same order, and their inputs all need gradients or none does.
    Routes are made once per pack and window, from the spans alone; a call makes no metadata collective, no barrier and waits
    for the device nowhere.
    """

    spans: Spans
    lengths: tuple[int, ...]
    mesh: Mesh
    kind: Kind = "exchange"
    kernel: str = "auto"
    _keys: dict[int | None, KeyRows] = field(default_factory=dict, init=False, repr=False, compare=False)
    _rings: list[Ring] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ranks, parts = self.mesh.ring.size, self.mesh.ring.size * self.mesh.ulysses.size
        if len(self.spans) != ranks or sum(self.lengths) % parts:
            raise ParallelError(
                f"expected a plan for {ranks} outer ranks and tokens that {parts} ranks share evenly, found spans of "
                f"{len(self.spans)} ranks and {sum(self.lengths)} tokens on rank {self.mesh.rank}; plan the padded lengths "
                "of this pack for this mesh"
            )

    @property
    def num_tokens(self) -> int:
        """N, see `PackAttention.num_tokens`."""
        return sum(self.lengths) // (self.mesh.ring.size * self.mesh.ulysses.size)

    def __call__(
        self, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, *, scale: float, window: int | None, sinks: Tensor | None
    ) -> Tensor:
        """[N, H, D], see `PackAttention`.

        Raises:
            ParallelError: heads that the Ulysses ranks cannot share, or a sliding window in a ring.
            ConfigError: a kernel that cannot be used here.
        """
        axis, meter = self.mesh.ulysses, self.mesh.meter
        window = None if window is None or window >= max(self.lengths) else window
        if axis.size == 1:
            return self._outer(q_NHD, k_NGD, v_NGD, scale, window, sinks)
        q, k, v = to_heads(q_NHD, k_NGD, v_NGD, axis, meter)
        out = self._outer(q, k, v, scale, window, None if sinks is None else own_heads(sinks, axis))
        return to_rows(out, axis, meter)

    def _outer(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, sinks: Tensor | None) -> Tensor:
        """Attention of all rows [L, ...] of this outer rank, for this rank's heads."""
        kernel = attention_kernel(self.kernel, q)
        if self.mesh.ring.size == 1:
            return attend(q, k, v, document_segments(self.lengths, window), scale, kernel, sinks)
        if self.kind == "ring":
            return ring_attend(q, k, v, self._ring(window), scale, kernel, sinks)
        return collected_attend(q, k, v, self._key_rows(window, q.device), scale, kernel, sinks)

    def _key_rows(self, window: int | None, device: torch.device) -> KeyRows:
        if window not in self._keys:
            axis, meter = self.mesh.ring, self.mesh.meter
            if self.kind == "exchange":
                route = exchange_route(self.spans, axis.rank, window)
                self._keys[window] = NeededRows.of(route, axis, meter, device)
            else:
                self._keys[window] = AllRows.of(gather_route(self.spans, axis.rank, window), axis, meter, device)
        return self._keys[window]

    def _ring(self, window: int | None) -> Ring:
        if window is not None:
            raise ParallelError(
                f"parallel.sp=ring: attention over whole documents is expected, found a sliding window of {window} tokens "
                f"and a document of {max(self.lengths)}; use parallel.sp=exchange, which sends only the keys inside the window"
            )
        if not self._rings:
            axis = self.mesh.ring
            self._rings.append(Ring.of(ring_blocks(self.spans, axis.rank), axis, self.mesh.meter))
        return self._rings[0]


def check_same_plan(mesh: Mesh, spans: Spans) -> None:
    """Returns when all ranks of the replica have the same plan; ranks with different plans would wait for each other.

    Raises:
        ParallelError: on every rank, with the ranks that differ; or when a rank does not answer within the time-out.

    Distributed: every rank of `mesh.replica` calls it; one small all-gather on host memory.
    """
    group = mesh.replica.group
    if group is None:
        return
    own = torch.tensor(list(hashlib.sha256(repr(spans).encode()).digest()), dtype=torch.uint8)
    everyone = [torch.empty_like(own) for _ in range(mesh.replica.size)]
    try:
        dist.all_gather(everyone, own, group=group)
    except RuntimeError as error:
        raise ParallelError(
            f"expected all ranks of a replica to compare the plan of the pack, rank {mesh.rank} found: {error}; look for the "
            "first rank that failed or hangs"
        ) from error
    ranks = dist.get_process_group_ranks(group)
    odd = [rank for rank, other in zip(ranks, everyone, strict=True) if not torch.equal(other, everyone[0])]
    if odd:
        raise ParallelError(
            f"expected the plan of the pack to be the same on ranks {ranks}, found another one than on rank {ranks[0]} on "
            f"ranks {odd} (this is rank {mesh.rank}); give all of them the same data and code"
        )
