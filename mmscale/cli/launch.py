"""`mmscale launch`: the agent of one node. Signals are held back first, so that none is lost or fatal before the ranks stand."""

from __future__ import annotations

import secrets
import signal
import socket
import sys

from mmscale.errors import ConfigError
from mmscale.train.signals import STOP_SIGNALS


def run(
    config_path: str, overrides: list[str], nnodes: int, node_rank: int, nproc_per_node: int, address: str | None, port: int | None
) -> None:  # fmt: skip
    """Starts this node's ranks and watches them to their end; exits as the command's help says."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    from mmscale import logging
    from mmscale.cluster.agent import Agent, Node
    from mmscale.config.env import job_limits_from_env
    from mmscale.config.load import load_config

    logging.setup(node_rank)
    if not 0 <= node_rank < nnodes:
        raise ConfigError(
            f"expected 0 <= --node-rank < --nnodes, found {node_rank} of {nnodes}; number the nodes from 0"
        )
    if nnodes > 1 and (address is None or port is None):
        raise ConfigError(
            f"expected --master-addr and --master-port with --nnodes {nnodes}, found {address} and {port}; give an address of "
            "node 0 that all nodes can reach, and a port that is free there"
        )
    config = load_config(config_path, overrides)
    node = Node(node_rank, nnodes, nproc_per_node, address or "127.0.0.1", port or _free_port())
    sys.exit(Agent(config, node, [config_path, *overrides], job_limits_from_env().attempt).run())


def _free_port() -> int:
    """A port that no one uses now, below those that the kernel hands out to connections before rank 0 takes it."""
    while True:
        port = 15_000 + secrets.randbelow(15_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
