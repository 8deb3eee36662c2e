"""Grids of a test pool: created once per layout, because groups are never given back."""

from __future__ import annotations

from dataclasses import replace

from mmscale.config.schema import ParallelConfig
from mmscale.parallel.mesh import Mesh, make_mesh
from mmscale.parallel.meter import CommMeter

_meshes: dict[tuple[int, int, int], Mesh] = {}


def grid(mesh: Mesh, tensor: int = 1, ulysses: int = 1, ring: int = 1) -> Mesh:
    """The mesh of these degrees over the ranks of a pool, with a fresh meter; every rank calls it."""
    key = (tensor, ulysses, ring)
    if key not in _meshes:
        parallel = ParallelConfig(tensor=tensor, ulysses=ulysses, ring=ring, engine="deepspeed", timeout_s=240)
        _meshes[key] = make_mesh(parallel, mesh.device)
    return replace(_meshes[key], meter=CommMeter())
