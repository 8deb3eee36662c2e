"""Gloo ranks for tests: started once per world size, then reused for any number of functions.

The processes are forked from a server that has imported torch and deepspeed once, so starting them costs little.
"""

from __future__ import annotations

import gc
import importlib.util
import multiprocessing
import os
import secrets
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

TIMEOUT_S = 240  # a hang, and not a machine with other work
PRELOAD = [
    "mmscale.train.loop",
    "megatron.core.parallel_state",
    "megatron.core.tensor_parallel",
    # what deepspeed imports only when it builds an engine
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
]
_modules: dict[str, ModuleType] = {}


class Ranks:
    """`world_size` processes with one gloo group; `run(function, *args)` runs `function(mesh, *args)` on all of them."""

    def __init__(self, world_size: int) -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ["OMP_NUM_THREADS"] = "1"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        port = _free_port()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, world_size, port), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What the function returned, by rank. `function` is a top-level function of a test file; arguments are plain."""
        for pipe in self._pipes:
            pipe.send((function.__code__.co_filename, function.__name__, args))
        results = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT_S):
                self.close()
                raise TimeoutError(f"rank {rank} did not answer within {TIMEOUT_S} s in {function.__name__}{args}")
            is_good, value = pipe.recv()
            if not is_good:
                self.close()
                raise AssertionError(f"rank {rank} of {len(self._pipes)}, {function.__name__}{args}:\n{value}")
            results.append(value)
        return results

    @property
    def is_closed(self) -> bool:
        return not self._processes

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes = []


def _free_port() -> int:
    """A port below those that the kernel hands out to connections, one of which could take it before rank 0 does."""
    while True:
        port = 15_000 + secrets.randbelow(15_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def _serve(pipe: Connection, rank: int, world_size: int, port: int) -> None:
    import torch

    from mmscale.config.env import Launch
    from mmscale.config.schema import ParallelConfig
    from mmscale.parallel.mesh import init_mesh

    torch.set_num_threads(1)
    gc.freeze()  # deepspeed collects garbage many times per engine; what was preloaded need not be walked
    launch = Launch(rank, rank, world_size, "127.0.0.1", port)
    mesh = init_mesh(ParallelConfig(engine="deepspeed", timeout_s=TIMEOUT_S), "cpu", launch)
    while True:
        try:
            path, name, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, getattr(_load(path), name)(mesh, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def _load(path: str) -> ModuleType:
    if path not in _modules:
        name = os.path.splitext(os.path.basename(path))[0]
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None, path
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        _modules[path] = module
    return _modules[path]
