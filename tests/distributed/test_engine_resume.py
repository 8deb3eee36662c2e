"""A run that resumes from a checkpoint goes on like the uninterrupted one, for every engine, stage and number of ranks.

The loss of the first step after the resume is the test: it shows live weights that do not match their masters.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import FSDP, TinyModel, build, documents, micro_batches, train_config, train_steps, whole_state

from mmscale.errors import CheckpointError, MissingExtraError
from mmscale.parallel.engines.deepspeed import _import_deepspeed
from mmscale.parallel.mesh import Mesh
from mmscale.train.checkpoint import find_checkpoint, open_checkpoint, save_checkpoint, verify_checkpoint

SAVE_AT, STEPS = 2, 4


def save_and_go_on(mesh: Mesh, root: str, stage: int, dtype: str, seed: int, external: tuple[str, ...] = ()) -> Any:
    train = train_config(dtype=dtype)
    engine = build(mesh, stage, train, seed, external=external)
    train_steps(engine, mesh, train, range(SAVE_AT), 2, seed)
    saved = save_checkpoint(Path(root), SAVE_AT, engine, {"note": 0.1}, mesh, keep_last=2)
    rest = train_steps(engine, mesh, train, range(SAVE_AT, STEPS), 2, seed)
    engine.close()
    return saved.name, rest


def resume(mesh: Mesh, root: str, stage: int, dtype: str, seed: int, external: tuple[str, ...] = ()) -> Any:
    train = train_config(dtype=dtype)
    reader = find_checkpoint(Path(root), mesh)
    assert reader is not None and reader.step == SAVE_AT and reader.trainer == {"note": 0.1}
    # Another seed: every weight that the checkpoint does not restore is wrong.
    engine = build(mesh, stage, train, seed + 1 if not external else seed, resume=reader, external=external)
    state = whole_state(engine, mesh)
    rest = train_steps(engine, mesh, train, range(SAVE_AT, STEPS), 2, seed)
    engine.close()
    return state, rest


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3, FSDP])
def test_same_layout_goes_on_bit_by_bit(ranks, tmp_path, seed, stage, dtype) -> None:
    seed %= 1000
    saved = ranks(2).run(save_and_go_on, str(tmp_path), stage, dtype, seed)
    resumed = ranks(2).run(resume, str(tmp_path), stage, dtype, seed)
    assert [rest for _, rest in saved] == [rest for _, rest in resumed]
    torch.manual_seed(seed)
    tower = TinyModel().tower.weight  # frozen, and stored as it was, whatever type the engine computes in
    assert torch.equal(open_checkpoint(tmp_path / saved[0][0]).read("model.tower.weight"), tower)


# test_layout_resume.py has all pairs of layouts on 4 ranks; here other numbers of ranks, where partitions come out otherwise
@pytest.mark.parametrize(
    ("written_by", "read_by"),
    [((2, 1), (4, 2)), ((2, 3), (1, 3)), ((1, 0), (2, 3)), ((4, 2), (2, 3)), ((2, 2), (1, 0))],
    ids=lambda layout: f"{layout[0]}ranks-zero{layout[1]}",
)
def test_another_layout_goes_on(ranks, tmp_path, seed, written_by, read_by) -> None:
    seed %= 1000
    saved = ranks(written_by[0]).run(save_and_go_on, str(tmp_path), written_by[1], "fp32", seed)
    resumed = ranks(read_by[0]).run(resume, str(tmp_path), read_by[1], "fp32", seed)
    for (loss, norm), (want_loss, want_norm) in zip(resumed[0][1], saved[0][1], strict=True):
        assert loss == pytest.approx(want_loss, rel=1e-6) and norm == pytest.approx(want_norm, rel=1e-5)
    reader = open_checkpoint(tmp_path / saved[0][0])
    loaded = {name: value for state, _ in resumed for name, value in state.items()}
    assert frozenset(loaded) == reader.names
    assert any(name.endswith("exp_avg_sq") for name in loaded)
    for name, value in loaded.items():
        assert torch.equal(value, reader.read(name)), name


@pytest.mark.parametrize("stage", [0, 3])
def test_external_parts_are_named_and_not_stored(ranks, tmp_path, seed, stage) -> None:
    seed %= 1000
    world_size = 2 if stage else 1
    saved = ranks(world_size).run(save_and_go_on, str(tmp_path), stage, "fp32", seed, ("vision",))
    reader = open_checkpoint(tmp_path / saved[0][0])
    assert not any(name.startswith("model.tower") for name in reader.names)
    assert "model.connector.weight" in reader.names
    resumed = ranks(world_size).run(resume, str(tmp_path), stage, "fp32", seed, ("vision",))
    assert resumed[0][1] == saved[0][1]


def load_strictly(mesh: Mesh, root: str, seed: int) -> str:
    reader = find_checkpoint(Path(root), mesh)
    try:
        build(mesh, 1, train_config("sgd"), seed, resume=reader)
    except CheckpointError as error:
        return str(error)
    return "accepted"


def test_moments_that_nobody_asked_for_are_refused(ranks, tmp_path, seed) -> None:
    ranks(2).run(save_and_go_on, str(tmp_path), 1, "fp32", seed % 1000)
    for message in ranks(2).run(load_strictly, str(tmp_path), seed % 1000):
        assert "unknown" in message and "optim.state" in message


def save_on_a_bad_disk(mesh: Mesh, root: str, seed: int) -> str:
    engine = build(mesh, 1, train_config(), seed)
    try:
        save_checkpoint(Path(root) / "file" / "checkpoints", 1, engine, {}, mesh, keep_last=1)
    except CheckpointError as error:
        return str(error)
    finally:
        engine.close()
    return "saved"


def test_a_disk_error_on_rank_0_reaches_every_rank(ranks, tmp_path, seed) -> None:
    (tmp_path / "file").write_text("not a folder")
    for message in ranks(2).run(save_on_a_bad_disk, str(tmp_path), seed % 1000):
        assert "make room or fix the permissions" in message


def choose(mesh: Mesh, root: str) -> Any:
    try:
        reader = find_checkpoint(Path(root), mesh)
    except CheckpointError as error:
        return str(error)
    return None if reader is None else reader.step


def test_all_ranks_agree_on_the_checkpoint(ranks, tmp_path, seed) -> None:
    root = tmp_path / "checkpoints"
    assert ranks(2).run(choose, str(root)) == [None, None]
    name, _ = ranks(2).run(save_and_go_on, str(root), 2, "fp32", seed % 1000)[0]
    files = {path.name for path in (root / name).iterdir()}
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "trainer.json", "manifest.json"} == files
    assert set(json.loads((root / name / "manifest.json").read_text())["files"]) == files - {"manifest.json"}
    assert verify_checkpoint(root / name) == []
    (root / name / "__1_0.distcp").unlink()
    for message in ranks(2).run(choose, str(root)):
        assert "never" not in message and "start again from step 0" in message


def poisoned_step(mesh: Mesh, stage: int, dtype: str, seed: int) -> Any:
    """A step in which the last rank has a NaN, then a healthy one; returns what both did, and evaluation around them."""
    train = train_config(clip=0.2, dtype=dtype)
    engine = build(mesh, stage, train, seed)
    (share,) = micro_batches(documents(0, seed), mesh, 1)
    before = engine.evaluate(share)
    if mesh.rank == mesh.world_size - 1:
        share.pixels[-1, 0] = float("nan")
    engine.forward_backward([share], 50)
    skipped = engine.step([1e-2] * 4)
    share.pixels.nan_to_num_(0.5)
    (clean,) = micro_batches(documents(0, seed), mesh, 1)
    after = engine.evaluate(clean)
    healthy = train_steps(engine, mesh, train, range(1), 1, seed)
    updates = [int(chunk.value) for name, chunk in engine.state_views() if name == "optim.num_updates"]
    changed = engine.evaluate(clean)
    engine.close()
    return skipped.skipped, before, after, healthy, updates, changed


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
)
def test_a_step_with_a_nan_is_skipped_on_all_ranks(ranks, seed, stage, dtype) -> None:
    results = ranks(2 if stage else 1).run(poisoned_step, stage, dtype, seed % 1000)
    for skipped, before, after, healthy, _, _ in results:
        assert skipped and before == after, "the weights must be as before"
        assert healthy == results[0][3] and healthy[0][1] > 0
    assert [updates for *_, updates, _ in results if updates] == [[1]]
    assert any(changed != after for *_, after, _, _, changed in results)


def bf16_losses(mesh: Mesh, stage: int, seed: int) -> Any:
    train = train_config("sgd", dtype="bf16")
    engine = build(mesh, stage, train, seed)
    losses = train_steps(engine, mesh, train, range(3), 4, seed)
    names = {name: chunk.value.dtype for name, chunk in engine.state_views()}
    model = engine._spec.model
    frequencies = model.frequencies.clone()
    engine.close()
    return losses, names, frequencies


def test_bf16_stays_close_to_fp32_and_keeps_fp32_buffers_and_masters(ranks, seed) -> None:
    seed %= 1000
    single, names, frequencies = ranks(1).run(bf16_losses, 0, seed)[0]
    for stage in (1, 2, 3):
        losses, zero_names, zero_frequencies = ranks(2).run(bf16_losses, stage, seed)[0]
        for (loss, norm), (want_loss, want_norm) in zip(losses, single, strict=True):
            assert loss == pytest.approx(want_loss, rel=2e-2) and norm == pytest.approx(want_norm, rel=5e-2)
        assert {zero_names[name] for name in zero_names if name.startswith("model.")} == {torch.float32}
        assert torch.equal(zero_frequencies, frequencies) and zero_frequencies.dtype == torch.float32
    assert names["model.connector.weight"] == torch.float32


def build_and_listen(mesh: Mesh, stage: int, seed: int) -> Any:
    said = io.StringIO()
    with (
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        warnings.catch_warnings(record=True) as warned,
    ):
        engine = build(mesh, stage, train_config(dtype="bf16"), seed)
        train_steps(engine, mesh, train_config(dtype="bf16"), range(1), 2, seed)
        engine.close()
    from deepspeed.comm import comm

    return said.getvalue(), [str(w.message) for w in warned], comm.cdb.shm_comm_op is None


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_is_quiet_and_compiles_nothing(ranks, seed, stage) -> None:
    for said, warned, no_shm_op in ranks(2).run(build_and_listen, stage, seed % 1000):
        assert said == "" and no_shm_op and not [text for text in warned if "deprecated" in text]


def test_a_missing_deepspeed_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(MissingExtraError, match=r"pip install 'mmscale\[deepspeed\]'"):
        _import_deepspeed(torch.device("cpu"))
