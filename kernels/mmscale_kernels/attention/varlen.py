"""Segments for kernels that take the borders of consecutive sequences (`cu_seqlens`), in as few launches as possible.

The sequences of one launch follow each other without gap or overlap, in the queries and in the keys. So segments with
overlapping keys go to several launches, rows that a launch does not use become sequences without partners (queries without
keys, keys without queries), and what a kernel writes for those is overwritten here.

Shapes: Q query rows, K key rows, H query heads, G key/value heads, D head size, N sequences of a launch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from mmscale.kernels.attention.base import Segment, Segments
from mmscale.kernels.dtypes import accumulate_dtype


@dataclass(frozen=True, slots=True, eq=False)
class Launch:
    """One kernel call: the sequences of query rows `q_start:q_end` and of key rows `k_start:k_end`.

    cu_q, cu_k        int32 [N + 1] on the device, first rows of the sequences, from 0, and the end
    max_q, max_k      the longest sequences; at least 2 queries, because flash attention takes another path for 1 which
                      cannot skip rows
    causal, window    as in `Segments`
    unused_q          bool [q_end - q_start] on the device, rows without keys; None = none
    unused_k          likewise, keys without queries
    """

    q_start: int
    q_end: int
    k_start: int
    k_end: int
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    causal: bool
    window: int | None
    unused_q: Tensor | None
    unused_k: Tensor | None

    @property
    def window_left(self) -> int:
        """Keys before the query's own that it sees, -1 = all; the name is flash attention's."""
        return -1 if self.window is None else self.window - 1

    @property
    def window_right(self) -> int:
        """Keys after the query's own that it sees, -1 = all."""
        return 0 if self.causal else -1


class VarlenBackend(ABC):
    """An `AttentionBackend` that works launch by launch; a subclass gives the two functions of its kernel for one launch.

    All tensors of these hold the launch's rows only; into unused rows they may write anything.
    """

    name: str

    @abstractmethod
    def refuses(self, device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> str | None:
        """See `AttentionBackend.refuses`."""

    @abstractmethod
    def launch_forward(
        self, q_QHD: Tensor, k_KGD: Tensor, v_KGD: Tensor, launch: Launch, scale: float
    ) -> tuple[Tensor, Tensor]:
        """(out [Q, H, D], log-sum-exp fp32 [H, Q])."""

    @abstractmethod
    def launch_backward(
        self, dout_QHD: Tensor, q_QHD: Tensor, k_KGD: Tensor, v_KGD: Tensor, out_QHD: Tensor, lse_HQ: Tensor,
        launch: Launch, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """(dq, dk, dv), given the final out and log-sum-exp."""

    def forward(
        self, q_QHD: Tensor, k_KGD: Tensor, v_KGD: Tensor, segments: Segments, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `AttentionBackend.forward`."""
        q_QHD, k_KGD, v_KGD = (_packed(x) for x in (q_QHD, k_KGD, v_KGD))
        out, lse = None, None
        for launch in launches(segments, q_QHD.device):
            queries, keys = slice(launch.q_start, launch.q_end), slice(launch.k_start, launch.k_end)
            part, part_lse = self.launch_forward(q_QHD[queries], k_KGD[keys], v_KGD[keys], launch, scale)
            if out is None and len(part) == len(q_QHD):  # one launch is the usual case: nothing is copied
                out, lse = _clear(part, launch.unused_q, 0, 0.0), _clear(part_lse, launch.unused_q, 1, -torch.inf)
                continue
            if out is None or lse is None:
                out, lse = _nothing(q_QHD)
            _put(out[queries], part, launch.unused_q, 0)
            _put(lse[:, queries], part_lse, launch.unused_q, 1)
        return _nothing(q_QHD) if out is None or lse is None else (out, lse)

    def backward(
        self, dout_QHD: Tensor, q_QHD: Tensor, k_KGD: Tensor, v_KGD: Tensor, out_QHD: Tensor, lse_HQ: Tensor,
        segments: Segments, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """See `AttentionBackend.backward`; the gradients of the keys are fp32 when several launches add to them."""
        dout_QHD, q_QHD, k_KGD, v_KGD, out_QHD = (_packed(x) for x in (dout_QHD, q_QHD, k_KGD, v_KGD, out_QHD))
        calls = launches(segments, q_QHD.device)
        dq = torch.zeros_like(q_QHD)
        dtype = accumulate_dtype(k_KGD.dtype) if len(calls) > 1 else k_KGD.dtype
        dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (k_KGD, v_KGD))
        for launch in calls:
            queries, keys = slice(launch.q_start, launch.q_end), slice(launch.k_start, launch.k_end)
            by_query = (dout_QHD[queries], q_QHD[queries])
            final = (out_QHD[queries], lse_HQ[:, queries].contiguous())
            parts = self.launch_backward(*by_query, k_KGD[keys], v_KGD[keys], *final, launch, scale)
            part_q = _clear(parts[0], launch.unused_q, 0, 0.0)
            part_k, part_v = (_clear(x, launch.unused_k, 0, 0.0) for x in parts[1:])
            if len(calls) == 1 and len(part_q) == len(dq) and len(part_k) == len(dk):
                return part_q, part_k, part_v
            dq[queries] += part_q  # rows of other launches are 0 here
            dk[keys] += part_k
            dv[keys] += part_v
        return dq, dk, dv


@lru_cache(maxsize=256)
def launches(segments: Segments, device: torch.device) -> tuple[Launch, ...]:
    """The kernel calls that compute `segments`; their tensors are on the device once, for all layers of a step."""
    return tuple(_launch(rows, segments, device) for rows in group_by_keys(segments.rows))


def group_by_keys(rows: Sequence[Segment]) -> list[list[Segment]]:
    """The rows in as few groups as possible in each of which the key ranges, too, are ascending and disjoint."""
    groups: list[list[Segment]] = []
    for row in rows:
        fitting = [group for group in groups if group[-1].k_end <= row.k_start]
        if fitting:  # the tightest fit leaves the most room for later rows
            max(fitting, key=lambda group: group[-1].k_end).append(row)
        else:
            groups.append([row])
    return groups


def _launch(rows: Sequence[Segment], segments: Segments, device: torch.device) -> Launch:
    q_start, k_start = rows[0].q_start, rows[0].k_start
    sizes = list(_sequences(rows))
    nums_q, nums_k = [q for q, _ in sizes], [k for _, k in sizes]
    return Launch(
        q_start=q_start,
        q_end=rows[-1].q_end,
        k_start=k_start,
        k_end=rows[-1].k_end,
        cu_q=_on(device, [0, *accumulate(nums_q)]),
        cu_k=_on(device, [0, *accumulate(nums_k)]),
        max_q=max(2, *(row.q_end - row.q_start for row in rows)),
        max_k=max(row.k_end - row.k_start for row in rows),
        causal=segments.causal,
        window=segments.window,
        unused_q=_unused(nums_q, nums_k, device),
        unused_k=_unused(nums_k, nums_q, device),
    )


def _sequences(rows: Sequence[Segment]) -> Iterator[tuple[int, int]]:
    """(queries, keys) of every sequence of a launch: the rows, and what lies between them."""
    q_at, k_at = rows[0].q_start, rows[0].k_start
    for row in rows:
        if row.q_start > q_at:
            yield row.q_start - q_at, 0
        if row.k_start > k_at:
            yield 0, row.k_start - k_at
        yield row.q_end - row.q_start, row.k_end - row.k_start
        q_at, k_at = row.q_end, row.k_end


def _unused(own: Sequence[int], partners: Sequence[int], device: torch.device) -> Tensor | None:
    """Which rows are in sequences without partners; None = none."""
    alone = torch.tensor([size == 0 for size in partners])
    rows = alone.repeat_interleave(torch.tensor(own))
    return _move(rows, device) if rows.any() else None


def _on(device: torch.device, values: Sequence[int]) -> Tensor:
    return _move(torch.tensor(values, dtype=torch.int32), device)


def _move(x: Tensor, device: torch.device) -> Tensor:
    # from pinned memory the copy needs no wait for the device
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def _nothing(q_QHD: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of queries that see no key."""
    lse_HQ = q_QHD.new_full((q_QHD.shape[1], len(q_QHD)), -torch.inf, dtype=torch.float32)
    return torch.zeros_like(q_QHD), lse_HQ


def _packed(x_nHD: Tensor) -> Tensor:
    """With the values of a head side by side, as the kernels want them; gradients of sums, for one, come expanded."""
    return x_nHD if x_nHD.stride(-1) == 1 else x_nHD.contiguous()


def _along(unused: Tensor, like: Tensor, dim: int) -> Tensor:
    return unused.view([-1 if i == dim else 1 for i in range(like.dim())])


def _clear(x: Tensor, unused: Tensor | None, dim: int, value: float) -> Tensor:
    """`x` with `value` in the unused rows along `dim`, in place."""
    return x if unused is None else x.masked_fill_(_along(unused, x, dim), value)


def _put(x: Tensor, part: Tensor, unused: Tensor | None, dim: int) -> None:
    """Writes the used rows of `part` along `dim` into `x`."""
    if unused is None:
        x.copy_(part)
    else:
        torch.where(_along(unused, x, dim), x, part, out=x)
