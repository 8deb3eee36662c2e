"""A checkpoint of any layout goes on in any other: tp2 x dp2, sp2 x dp2, dp4 and one process, DeepSpeed and FSDP2, each to each.

Every layout saves once; a layout then resumes the checkpoints of all of them. Compared are the bits of the loaded state and the
next losses of the run that was not interrupted.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import pytest
import torch
from grids import grid
from tiny_run import FSDP, build, train_config, train_steps, whole_state

from mmscale.errors import CheckpointError
from mmscale.parallel.engines.base import Engine
from mmscale.parallel.layout import Chunk
from mmscale.parallel.mesh import Mesh
from mmscale.train.checkpoint import find_checkpoint, open_checkpoint, save_checkpoint, verify_checkpoint

SAVE_AT, STEPS = 2, 7
GRIDS = {"tp2-dp2": (4, {"tensor": 2}), "sp2-dp2": (4, {"ulysses": 2}), "dp4": (4, {}), "one": (1, {})}
ENGINES = {"zero3": 3, "fsdp": FSDP}
"""ZeRO-3 shards everything that ZeRO-1 and 2 shard; test_engine_resume.py has all stages."""
LAYOUTS = [(name, engine) for name in GRIDS for engine in ENGINES]
READERS = [*LAYOUTS, ("one", "single")]
LOSS = 1e-6
CLIP = 0.2


def save_all(mesh: Mesh, root: str, layouts: list[tuple[str, str]], seed: int) -> Any:
    """Saves with each layout; the losses that follow without an interruption."""
    train = train_config(clip=CLIP)
    followed = {}
    for name, engine_name in layouts:
        own = grid(mesh, **GRIDS[name][1])
        engine = build(own, ENGINES[engine_name], train, seed)
        train_steps(engine, own, train, range(SAVE_AT), 2, seed)
        save_checkpoint(folder(root, name, engine_name), SAVE_AT, engine, {"note": 1}, own, keep_last=1)
        followed[name, engine_name] = train_steps(engine, own, train, range(SAVE_AT, STEPS), 2, seed)
        engine.close()
    return followed


def folder(root: str, name: str, engine: str) -> Path:
    return Path(root) / f"{name}-{engine}"


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory) -> tuple[str, dict[tuple[str, str], Any], int]:
    """The folder of all checkpoints, and per layout what followed."""
    seed = int(os.environ.get("MMSCALE_TEST_SEED") or secrets.randbelow(2**31)) % 10**6
    print(f"\nMMSCALE_TEST_SEED={seed}")
    root = str(tmp_path_factory.mktemp("layouts"))
    followed: dict[tuple[str, str], Any] = {}
    for name, (world_size, _) in GRIDS.items():
        followed |= ranks(world_size).run(save_all, root, [own for own in LAYOUTS if own[0] == name], seed)[0]
    return root, followed, seed


def resume_all(mesh: Mesh, root: str, reader: tuple[str, str], seed: int) -> Any:
    """Per checkpoint: the state names whose bits changed on the way, and the next losses."""
    train = train_config(clip=CLIP)
    own = grid(mesh, **GRIDS[reader[0]][1])
    results = {}
    for layout in LAYOUTS:
        checkpoint = find_checkpoint(folder(root, *layout), own)
        assert checkpoint is not None and checkpoint.step == SAVE_AT
        # Another seed: every weight that the checkpoint does not restore is wrong.
        engine = build(own, ENGINES.get(reader[1], 0), train, seed + 1, resume=checkpoint)
        loaded = whole_state(engine, own)
        changed = [name for name, value in loaded.items() if not torch.equal(value, checkpoint.read(name))]
        missing = sorted(checkpoint.names - loaded.keys()) if own.is_main else []
        losses = train_steps(engine, own, train, range(SAVE_AT, STEPS), 2, seed)
        engine.close()
        results[layout] = (changed + missing, losses)
    return results


@pytest.mark.parametrize("reader", READERS, ids="-".join)
def test_every_checkpoint_goes_on_in(ranks, saved, reader) -> None:
    root, followed, seed = saved
    world_size = GRIDS[reader[0]][0]
    for layout, (changed, losses) in ranks(world_size).run(resume_all, root, reader, seed)[0].items():
        assert changed == [], layout
        apart = [abs(a - b) / b for (a, _), (b, _) in zip(losses, followed[layout], strict=True)]
        assert len(apart) == STEPS - SAVE_AT and max(apart) <= LOSS, (layout, apart)


def test_the_layouts_wrote_chunks_and_the_files_verify(saved) -> None:
    root, _, _ = saved
    counts = {}
    for name, engine in LAYOUTS:
        reader = open_checkpoint(folder(root, name, engine) / "step_00000002")
        entries = reader._metadata.state_dict_metadata
        counts[name, engine] = max(len(entry.chunks) for entry in entries.values())
        layout = (reader.path / "trainer.json").read_text()
        assert (
            f'"tensor": {2 if name == "tp2-dp2" else 1}' in layout
            and f'"ulysses": {2 if name == "sp2-dp2" else 1}' in layout
        )
        assert verify_checkpoint(reader.path) == []
    assert counts["one", "fsdp"] == counts["one", "zero3"] == 1
    assert counts["dp4", "fsdp"] == 4 and counts["tp2-dp2", "fsdp"] == 4 and counts["tp2-dp2", "zero3"] >= 2


def resume_without_moments(mesh: Mesh, root: str, seed: int) -> Any:
    """The negative control: a reader whose second moments are doubled goes on elsewhere."""
    train = train_config(clip=CLIP)
    own = grid(mesh, tensor=2)
    checkpoint = find_checkpoint(folder(root, "dp4", "fsdp"), own)
    assert checkpoint is not None

    class Wrong:
        names = checkpoint.names

        def read(self, name: str) -> torch.Tensor:
            return checkpoint.read(name) * (2 if name.endswith("exp_avg_sq") else 1)

    engine = build(own, FSDP, train, seed + 1, resume=Wrong())
    losses = train_steps(engine, own, train, range(SAVE_AT, STEPS), 2, seed)
    engine.close()
    return losses


def test_wrong_moments_show_in_the_losses(ranks, saved) -> None:
    root, followed, seed = saved
    losses = ranks(4).run(resume_without_moments, root, seed)[0]
    assert max(abs(a - b) / b for (a, _), (b, _) in zip(losses, followed["dp4", "fsdp"], strict=True)) > 10 * LOSS


class Spoiled:
    """An engine whose layout is wrong on the last rank: it loses a chunk, or writes one that another rank writes too."""

    def __init__(self, engine: Engine, mesh: Mesh, kind: str) -> None:
        self._engine, self._mesh, self._kind = engine, mesh, kind
        self.state_names = engine.state_names

    def state_views(self) -> Any:
        is_last = self._mesh.rank == self._mesh.world_size - 1
        for name, chunk in self._engine.state_views():
            if not (is_last and self._kind == "gap" and name == "model.layer.1.weight"):
                yield name, chunk
        if is_last and self._kind == "overlap":
            yield "model.layer.1.weight", Chunk(torch.ones(1, 13), (0, 0), torch.Size((40, 13)))


def save_spoiled(mesh: Mesh, root: str, kind: str, seed: int) -> str:
    own = grid(mesh, tensor=2)
    engine = build(own, FSDP, train_config(), seed)
    try:
        save_checkpoint(Path(root), 1, Spoiled(engine, own, kind), {}, own, keep_last=1)  # type: ignore[arg-type]
    except CheckpointError as error:
        return str(error)
    finally:
        engine.close()
    return "saved"


@pytest.mark.parametrize("kind", ["gap", "overlap"])
def test_a_wrong_layout_on_one_rank_is_refused_on_every_rank(ranks, tmp_path, seed, kind) -> None:
    for message in ranks(4).run(save_spoiled, str(tmp_path), kind, seed % 10**6):
        assert message.startswith("model.layer.1.weight: expected chunks of all ranks"), message
    assert not list(tmp_path.glob("step_????????"))
