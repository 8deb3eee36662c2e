"""All ranks check a checkpoint together: each byte once, and what one finds counts for all."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from mmscale.errors import SaveError
from mmscale.parallel.mesh import Mesh
from mmscale.train import manifest as manifest_module
from mmscale.train.attempt import Attempt
from mmscale.train.checkpoint import find_checkpoint
from mmscale.train.manifest import file_record, folder_name, manifest_text

NAMES = (".metadata", "__0_0.distcp", "__1_0.distcp", "__2_0.distcp", "trainer.json")


def save(run: Path, step: int, token: str) -> Path:
    folder = run / "checkpoints" / folder_name(step)
    folder.mkdir(parents=True)
    for name in NAMES:
        content = json.dumps({"step": step, "trainer": {}, "name": name})
        (folder / name).write_text(content)
    files = {name: file_record(folder / name) for name in NAMES}
    (folder / "manifest.json").write_text(manifest_text(step, token, files))
    return folder


def find(mesh: Mesh, run: str, blind_rank: int | None) -> Any:
    """The step that was found, the files that this rank has hashed, and what was raised."""
    attempt = Attempt(Path(run), "7.0")
    if mesh.is_main:
        attempt.claim()
    hashed: list[str] = []

    def watched(path: Path) -> dict[str, Any]:
        if mesh.rank == blind_rank:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        hashed.append(path.name)
        return file_record(path)

    with patch.object(manifest_module, "file_record", watched):
        try:
            reader = find_checkpoint(Path(run) / "checkpoints", mesh, attempt)
        except SaveError as error:
            return None, hashed, str(error)
    return None if reader is None else reader.step, hashed, ""


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_file_is_hashed_once(ranks, tmp_path, world_size) -> None:
    save(tmp_path, 4, "7.0")
    answers = ranks(world_size).run(find, str(tmp_path), None)
    assert [step for step, _, _ in answers] == [4] * world_size
    assert sorted(name for _, names, _ in answers for name in names) == sorted(NAMES)
    assert all(names for _, names, _ in answers)


@pytest.mark.parametrize("name", NAMES)
def test_damage_in_any_share_falls_back_on_all_ranks(ranks, tmp_path, name) -> None:
    save(tmp_path, 4, "7.0")
    path = save(tmp_path, 8, "7.0") / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert [step for step, _, _ in ranks(2).run(find, str(tmp_path), None)] == [4, 4]
    assert (tmp_path / "checkpoints/.bad-step_00000008-0").is_dir()


@pytest.mark.parametrize("blind_rank", [0, 1])
def test_a_node_with_a_broken_mount_ends_all_ranks_and_rejects_nothing(ranks, tmp_path, blind_rank) -> None:
    save(tmp_path, 4, "7.0")
    answers = ranks(2).run(find, str(tmp_path), blind_rank)
    assert all(step is None and "Stale file handle" in error for step, _, error in answers)
    assert (tmp_path / "checkpoints/step_00000004").is_dir()
