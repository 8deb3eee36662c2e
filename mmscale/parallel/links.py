"""Whether the ranks can add up numbers: asked once, before anything is built on it."""

from __future__ import annotations

import socket

import torch
import torch.distributed as dist

from mmscale.errors import ParallelError
from mmscale.parallel.mesh import Mesh

NUMBERS = 1 << 18
"""1 MiB of them: more than fits the messages that are sent along with a header."""


def check_links(mesh: Mesh, timeout_s: int) -> None:
    """Returns when a sum over all ranks has come out right on this one's device.

    Args:
        timeout_s: `parallel.timeout_s`, for the error.

    Raises:
        ParallelError: the sum is wrong, or the ranks did not come together in time.

    Distributed: every rank calls it; nothing happens on one process without a group.
    """
    if mesh.host_group is None:
        return
    where = f"rank {mesh.rank} on {socket.gethostname()}, {mesh.device}"
    # whole numbers below 2**24, whose sums are exact in any order
    steps = torch.arange(NUMBERS, device=mesh.device, dtype=torch.float32) % 1024
    total = steps + mesh.rank
    try:
        dist.all_reduce(total)
        wrong = int((total != steps * mesh.world_size + sum(range(mesh.world_size))).sum())
    except RuntimeError as error:
        raise ParallelError(
            f"expected a first sum over {mesh.world_size} ranks within parallel.timeout_s={timeout_s}, {where} found: {error}; look "
            "for the rank that failed first, and at the network between the nodes"
        ) from error
    if wrong:
        raise ParallelError(
            f"expected the first sum over {mesh.world_size} ranks to be right, {where} found {wrong} of {NUMBERS} numbers wrong; "
            "start without this node, and have its memory, GPU and network checked"
        )
