"""A checkpoint is either complete and verified, or it does not exist."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import time
from enum import Enum
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata

from mmscale.config.env import Launch
from mmscale.config.schema import ParallelConfig, TrainConfig
from mmscale.errors import CheckpointError
from mmscale.parallel.apply import make_engine
from mmscale.parallel.engines.base import Engine
from mmscale.parallel.mesh import init_mesh
from mmscale.train.checkpoint import (
    find_checkpoint,
    newest_checkpoint,
    open_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from mmscale.train.manifest import file_record, manifest_text, read_manifest
from mmscale.train.optim import build_optimizer, param_groups

MESH = init_mesh(ParallelConfig(), "cpu", Launch())
STATE = {"data": {"seed": 3, "carry": ["a:1", "b:2"]}, "loss": 0.1 + 0.2}


class Net(nn.Module):
    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.llm = nn.Linear(3, width)
        self.empty = nn.Parameter(torch.zeros(0, 3))

    def parts(self) -> dict[str, nn.Module]:
        return {"llm": self}


def make(width: int = 5) -> Engine:
    train = TrainConfig(steps=1, global_batch=1, lr=1e-3, parts={"llm": {"tune": "full"}}, dtype="fp32")
    model = Net(width)
    return make_engine(model, build_optimizer(param_groups(model, train), train), ParallelConfig(), train, MESH)


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "checkpoints"


def save(root: Path, *steps: int, keep_last: int = 10) -> Engine:
    engine = make()
    for step in steps:
        save_checkpoint(root, step, engine, {**STATE, "at": step}, MESH, keep_last)
    return engine


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def test_what_was_saved_is_read_back(root) -> None:
    engine = save(root, 7)
    assert folders(root) == ["step_00000007"] and (root / "latest").read_text() == "step_00000007\n"
    reader = find_checkpoint(root, MESH)
    assert reader is not None and reader.step == 7 and reader.trainer == {**STATE, "at": 7}
    state = dict(engine.state_views())
    assert reader.names == frozenset(state)
    for name, chunk in state.items():
        got = reader.read(name)
        assert got.dtype == chunk.value.dtype and torch.equal(got, chunk.value) and reader.shape(name) == chunk.whole
    with pytest.raises(CheckpointError, match=r"expected a tensor model\.lm"):
        reader.read("model.lm")
    assert read_manifest(reader.path)["attempt"] is None
    save_checkpoint(root, 8, engine, {}, MESH, 2, token="7.0")
    assert read_manifest(root / "step_00000008")["attempt"] == "7.0"


def test_no_checkpoint_yet_is_no_error(root) -> None:
    assert find_checkpoint(root, MESH) is None
    root.mkdir()
    assert find_checkpoint(root, MESH) is None
    with pytest.raises(CheckpointError, match="let the run save once"):
        newest_checkpoint(root)


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def change_byte(path: Path, place: float) -> None:
    """Inverts the byte at `place` of the file: 0 is the first, 1 the last."""
    data = bytearray(path.read_bytes())
    data[round(place * (len(data) - 1))] ^= 0xFF
    path.write_bytes(data)


def cut(path: Path, place: float) -> None:
    """Leaves the part of the file before `place`."""
    os.truncate(path, round(place * (path.stat().st_size - 1)))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


DAMAGES = {
    "flip": flip_bit,
    **{f"byte_at_{place}": partial(change_byte, place=place) for place in (0, 0.1, 0.5, 0.9, 1)},
    **{f"cut_at_{place}": partial(cut, place=place) for place in (0, 0.5)},
    "truncate": truncate,
    "append": append,
    "remove": Path.unlink,
    "extra": lambda path: (path.parent / "extra.distcp").write_bytes(b"x"),
    "link": lambda path: (path.rename(path.parent.parent / path.name), path.symlink_to(path.parent.parent / path.name)),
}


FILES = ("__0_0.distcp", ".metadata", "trainer.json", "manifest.json")
CASES = [(damage, name) for damage in DAMAGES for name in FILES]
# a manifest with a changed byte may still say the same (`test_every_changed_byte_...`), and nothing lists it
CASES = [
    case for case in CASES if case not in {(damage, "manifest.json") for damage in ("flip", "append", "link", "extra")}
]


@pytest.mark.parametrize(("damage", "name"), CASES)
def test_any_damage_falls_back_to_the_one_before(root, damage, name, seed) -> None:
    random.seed(seed)
    save(root, 10, 20)
    newest = root / "step_00000020"
    DAMAGES[damage](newest / name)
    assert verify_checkpoint(newest) != []
    with pytest.raises(CheckpointError):
        open_checkpoint(newest)
    reader = find_checkpoint(root, MESH)
    assert reader is not None and reader.step == 10
    assert folders(root) == [".bad-step_00000020-0", "step_00000010"]
    save(root, 20)  # the step that is done again does not collide
    assert find_checkpoint(root, MESH).step == 20


def test_every_changed_byte_of_a_manifest_is_seen_or_harmless(root, seed) -> None:
    random.seed(seed)
    save(root, 1)
    path = root / "step_00000001" / "manifest.json"
    good = path.read_bytes()
    for _ in range(200):
        path.write_bytes(good)
        flip_bit(path)
        if not verify_checkpoint(path.parent):
            assert json.loads(path.read_bytes()) == json.loads(good)


def test_none_whole_is_refused_also_at_the_second_start(root) -> None:
    save(root, 1, 2)
    for path in root.glob("step_*"):
        truncate(path / "__0_0.distcp")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="start again from step 0") as refusal:
            find_checkpoint(root, MESH)
        assert refusal.value.exit_code == 2
    shutil.rmtree(root)
    assert find_checkpoint(root, MESH) is None


def test_deleted_folders_are_no_reason_to_start_from_zero(root) -> None:
    save(root, 1)
    shutil.rmtree(root / "step_00000001")
    with pytest.raises(CheckpointError, match="the folders are gone"):
        find_checkpoint(root, MESH)


def test_a_folder_under_another_step_number_is_rejected(root) -> None:
    save(root, 1)
    (root / "step_00000001").rename(root / "step_00000009")
    save(root, 2)
    assert find_checkpoint(root, MESH).step == 2
    assert ".bad-step_00000009-0" in folders(root)


def test_left_overs_of_a_killed_save_are_removed(root) -> None:
    save(root, 1, 2)
    whole = root / "step_00000002"
    whole.rename(root / "step_00000002.tmp")  # killed after the manifest, before the rename
    half = root / "step_00000003.7.0.tmp"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half")
    (root / "latest.tmp").write_text("step_0000")
    assert find_checkpoint(root, MESH).step == 1
    assert folders(root) == ["step_00000001"] and not (root / "latest.tmp").exists()


def test_consolidation_while_a_run_is_saving_touches_nothing(root) -> None:
    save(root, 1, 2)
    (root / "step_00000003.tmp").mkdir()
    truncate(root / "step_00000002" / "trainer.json")
    assert newest_checkpoint(root).step == 1
    assert folders(root) == ["step_00000001", "step_00000002", "step_00000003.tmp"]


def test_pruning_keeps_the_newest_verified(root) -> None:
    save(root, 1, 2, 3, 4)
    (root / "step_00000005").mkdir()  # half-written folders do not count as kept
    shutil.rmtree(root / "step_00000003")
    (root / "step_00000003").mkdir()
    flip_bit(root / "step_00000004" / "__0_0.distcp")
    save(root, 6, keep_last=2)
    assert folders(root) == [f"step_0000000{step}" for step in (2, 3, 4, 5, 6)]
    save(root, 7, keep_last=1)
    assert folders(root) == ["step_00000007"]


def test_the_last_good_one_is_never_deleted(root) -> None:
    save(root, 1)
    for step in (2, 3):
        save(root, step)
        truncate(root / f"step_0000000{step}" / "trainer.json")
    save_again = root / "step_00000001"
    assert save_again.exists() and find_checkpoint(root, MESH).step == 1


def test_a_step_that_is_there_already_is_left_alone_or_replaced_when_damaged(root) -> None:
    engine = save(root, 5)
    before = (root / "step_00000005" / "manifest.json").stat().st_mtime_ns
    save_checkpoint(root, 5, engine, {"other": 1}, MESH, 2)
    assert (root / "step_00000005" / "manifest.json").stat().st_mtime_ns == before
    truncate(root / "step_00000005" / "__0_0.distcp")
    save_checkpoint(root, 5, engine, {"other": 1}, MESH, 2)
    assert find_checkpoint(root, MESH).trainer == {"other": 1}


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def forge(folder: Path, name: str) -> None:
    """Makes the manifest agree with a changed file, as someone who wants to be loaded would."""
    manifest = read_manifest(folder)
    manifest["files"][name] = file_record(folder / name)
    (folder / "manifest.json").write_text(manifest_text(manifest["step"], manifest["attempt"], manifest["files"]))


def test_an_evil_metadata_pickle_runs_nothing(root, tmp_path) -> None:
    save(root, 1)
    folder, marker = root / "step_00000001", tmp_path / "marker"
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(marker)))
    forge(folder, ".metadata")
    with pytest.raises(CheckpointError, match="mkdir"):
        _ = open_checkpoint(folder).names
    assert not marker.exists()
    pickle.loads((folder / ".metadata").read_bytes())  # the negative control: it would have run
    assert marker.exists()


class OldPickler(pickle.Pickler):
    """Writes members of enumerations as Python 3.11.0 to 3.11.3 does."""

    def reducer_override(self, value: object) -> object:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


class Reach:
    """Asks for an attribute of something that metadata may name."""

    def __reduce__(self):
        return getattr, (Metadata, "__init__")


def test_metadata_of_another_python_is_read_and_getattr_reaches_nothing_else(root) -> None:
    save(root, 1)
    folder = root / "step_00000001"
    want = open_checkpoint(folder).read("model.llm.weight")
    old = io.BytesIO()
    OldPickler(old).dump(pickle.loads((folder / ".metadata").read_bytes()))
    assert b"getattr" in old.getvalue()
    (folder / ".metadata").write_bytes(old.getvalue())
    forge(folder, ".metadata")
    assert torch.equal(open_checkpoint(folder).read("model.llm.weight"), want)
    (folder / ".metadata").write_bytes(pickle.dumps(Reach()))
    forge(folder, ".metadata")
    with pytest.raises(CheckpointError, match="asks for '__init__'"):
        _ = open_checkpoint(folder).names


def test_an_evil_tensor_pickle_runs_nothing(root, tmp_path) -> None:
    save(root, 1)
    folder, marker = root / "step_00000001", tmp_path / "marker"
    torch.save(Evil(marker), folder / "__0_0.distcp")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, (folder / "__0_0.distcp").stat().st_size
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    forge(folder, "__0_0.distcp")
    forge(folder, ".metadata")
    reader = open_checkpoint(folder)
    with pytest.raises(CheckpointError):
        reader.read("model.llm.weight")
    assert not marker.exists()


def test_a_path_in_the_metadata_cannot_leave_the_folder(root) -> None:
    save(root, 1)
    folder = root / "step_00000001"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../step_00000001/__0_0.distcp"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    forge(folder, ".metadata")
    with pytest.raises(CheckpointError, match="file name"):
        open_checkpoint(folder).read("model.llm.weight")


def test_another_model_is_refused_in_both_directions(root) -> None:
    save(root, 1)
    reader = find_checkpoint(root, MESH)
    wider = make(width=6)
    with pytest.raises(CheckpointError, match=r"shape \[6, 3\], found \[5, 3\]"):
        wider.load_state(reader)

    class Fewer:
        names = reader.names - {"model.llm.bias"}
        read = reader.read

    class More:
        names = reader.names | {"model.llm.extra"}
        read = reader.read

    with pytest.raises(CheckpointError, match=r"1 names missing \['model.llm.bias'\]"):
        make().load_state(Fewer())
    with pytest.raises(CheckpointError, match=r"1 unknown \['model.llm.extra'\]"):
        make().load_state(More())


def in_child(work) -> int:
    """Exit status of a forked process that runs `work`; negative is the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_full_disk_is_a_clear_error_and_loses_nothing(root) -> None:
    save(root, 1)

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        try:
            save(root, 2)
        except CheckpointError as error:
            os._exit(42 if os.strerror(errno.EFBIG) in str(error) and "make room" in str(error) else 43)

    assert in_child(fill) == 42
    assert find_checkpoint(root, MESH).step == 1 and folders(root) == ["step_00000001"]


def test_kill_9_at_any_moment_leaves_a_whole_checkpoint(root, seed) -> None:
    random.seed(seed)
    save(root, 1)
    best = 1
    for attempt in range(60):
        if attempt >= 6 and best > 1:  # on a busy machine the first children are killed before they have saved
            break
        child = os.fork()
        if child == 0:
            for step in range(best + 1, best + 500):
                save(root, step, keep_last=2)
            os._exit(0)
        deadline = time.monotonic() + random.uniform(0.02, 0.12)
        while time.monotonic() < deadline:
            os.sched_yield()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        reader = find_checkpoint(root, MESH)
        assert reader is not None and reader.step >= best and reader.trainer["at"] == reader.step
        assert verify_checkpoint(reader.path) == [] and not list(root.glob(".bad-*"))
        best = reader.step
    assert best > 1
