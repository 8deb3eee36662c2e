"""Datasets on disk: written, opened, read at random, damaged in every way; indexed = delivered + skipped always holds."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import random
import tarfile
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from mmscale.data_tools.writer import ShardWriter
from mmscale.errors import BadSampleError, DataError, RefusedInputError
from mmscale.streaming import shards as shards_module
from mmscale.streaming.index import index_path
from mmscale.streaming.manifest import read_manifest
from mmscale.streaming.rows import encode_row
from mmscale.streaming.shards import ShardSet
from mmscale.streaming.storage import source as source_module
from mmscale.streaming.tar import BLOCK, scan_tar
from mmscale.types import Turn


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = png(3, 2)


def row(i: int) -> bytes:
    return encode_row([Turn("user", f"question {i}"), Turn("assistant", f"answer {i}")])


def write(folder: Path, num: int = 10, per_shard: int = 4) -> Path:
    """Good samples, every third one with two images."""
    with ShardWriter(folder, max_samples=per_shard) as writer:
        for i in range(num):
            media = {"0.png": PNG, "1.png": PNG + bytes(i)} if i % 3 == 0 else {}
            writer.write(f"{i:05d}", {"json": row(i), **media})
    return folder


def open_files() -> list[Path]:
    found = []
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found.append(fd.readlink())
    return found


def deliver(data: ShardSet) -> tuple[list[str], Counter[str]]:
    """Reads everything; checks the invariant."""
    delivered, skipped = [], Counter(data.skipped)
    for i in range(len(data)):
        try:
            delivered.append(data.read(i).id)
        except BadSampleError as e:
            skipped[e.reason] += 1
    assert data.indexed == len(delivered) + sum(skipped.values())
    assert len(set(delivered)) == len(delivered)
    return delivered, skipped


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_samples_come_back_by_row(tmp_path: Path) -> None:
    data = ShardSet.open(write(tmp_path / "d"), "src")
    assert (len(data), data.indexed, data.quarantined, sum(data.skipped.values())) == (10, 10, {}, 0)
    order = random.Random(0).sample(range(10), 10)
    for i in order:
        sample = data.read(i)
        assert sample.id == data.id(i) == f"src/{i // 4:06d}.tar:{i:05d}"
        assert sample.turns[1].text == f"answer {i}"
        assert [m.data for m in sample.media] == ([PNG, PNG + bytes(i)] if i % 3 == 0 else [])
        with (tmp_path / "d" / f"{i // 4:06d}.tar").open("rb") as file:
            file.seek(sample.offset - BLOCK)
            assert file.read(5).decode() == f"{i:05d}"


def test_written_tars_equal_what_webdataset_reads(tmp_path: Path) -> None:
    import webdataset

    folder = write(tmp_path / "d", 7, 3)
    data = ShardSet.open(folder, "src")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = [
            s for tar in sorted(folder.glob("*.tar")) for s in webdataset.WebDataset(str(tar), shardshuffle=False)
        ]
    assert [s["__key__"] for s in theirs] == [data.id(i).partition(":")[2] for i in range(7)]
    assert [{k: v for k, v in s.items() if not k.startswith("__")} for s in theirs] == [
        dict(data.members(i)) for i in range(7)
    ]


def test_columns_line_up_with_the_media_of_each_sample(tmp_path: Path) -> None:
    data = ShardSet.open(write(tmp_path / "d"), "src")
    columns = data.columns
    assert columns.first.tolist() == [0, 3, 4, 5, 8, 9, 10, 13, 14, 15, 18]
    for i in range(10):
        rows = slice(columns.first[i], columns.first[i + 1])
        sample = data.read(i)
        media = columns.modality[rows] >= 0
        assert columns.modality[rows].tolist() == [0] * len(sample.media) + [-1]
        assert columns.size[rows][media].tolist() == [len(m.data) for m in sample.media]
        assert columns.width[rows].tolist() == [3] * len(sample.media) + [0]
        assert columns.height[rows].tolist() == [2] * len(sample.media) + [0]
        assert columns.text_bytes[rows].tolist() == [0] * len(sample.media) + [len(row(i))]


def test_only_wanted_members_are_read(tmp_path: Path) -> None:
    data = ShardSet.open(write(tmp_path / "d"), "src")
    assert data.members(0, lambda ext: ext == "json") == [("json", row(0))]


def _read_all(data: ShardSet, out: multiprocessing.SimpleQueue) -> None:
    out.put([data.read(i).turns[1].text for i in range(len(data))])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_read_the_same(tmp_path: Path, method: str) -> None:
    data = ShardSet.open(write(tmp_path / "d", 300, 100), "src")
    data.read(5)
    data.columns  # noqa: B018
    assert len(pickle.dumps(data)) < 2000
    if method == "spawn":  # what spawn does to it, without the seconds that a fresh interpreter takes
        data = pickle.loads(pickle.dumps(data))
        assert data.read(299).turns[1].text == "answer 299" and len(data.columns.first) == 301
        return
    context = multiprocessing.get_context(method)
    out = context.SimpleQueue()
    process = context.Process(target=_read_all, args=(data, out))
    process.start()
    assert out.get() == [f"answer {i}" for i in range(300)]
    process.join(10)
    assert process.exitcode == 0


def test_open_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "MAX_OPEN_SHARDS", 2)
    data = ShardSet.open(write(tmp_path / "d", 10, 1), "src")
    for i in [*range(10), *range(10)]:
        data.read(i)
        assert sum(shard._index is not None for shard in data.shards) <= 2
        assert sum("/d/0" in str(link) for link in open_files()) <= 4  # each a tar and its mapped index


def test_opening_keeps_no_index_and_no_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "d")
    before = set(open_files())
    data = ShardSet.open(folder, "src")
    assert all(shard._index is None for shard in data.shards) and not set(open_files()) - before
    assert [data.id(0), len(data)] == ["src/000000.tar:00000", 10]
    data.shards[0].close()
    (folder / "000000.idx").write_bytes((folder / "000001.idx").read_bytes())  # after it was checked
    with pytest.raises(DataError, match=r"000000\.idx: not the index that the manifest names"):
        data.id(0)


def test_rows_are_read_together_in_the_order_asked_for(tmp_path: Path, seed: int) -> None:
    data = ShardSet.open(write(tmp_path / "d", 30, 7), "src")
    rows = random.Random(seed).choices(range(30), k=50)
    assert data.read_many(rows) == [data.read(i) for i in rows] and data.read_many([]) == []


def test_two_folders_with_equal_samples_have_equal_bytes_and_fingerprints(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one"), write(tmp_path / "two")
    assert tree(one) == tree(two)
    assert ShardSet.open(one, "a").fingerprint == ShardSet.open(two, "b").fingerprint
    assert ShardSet.open(write(tmp_path / "three", 11), "a").fingerprint != ShardSet.open(one, "a").fingerprint


class Killed(BaseException):
    pass


def test_a_killed_build_gives_the_same_bytes_when_it_is_run_again(tmp_path: Path) -> None:
    whole = tree(write(tmp_path / "whole"))
    names = {"build_index", "write_atomic", "write_manifest"}
    for stop in range(12):
        folder = tmp_path / f"stop{stop}"
        # Killed before its n-th visible effect: no clean-up of ours runs.
        with pytest.MonkeyPatch.context() as patch:
            calls = iter(range(1000))

            def hooked(real, calls=calls, stop=stop):
                def call(*args):
                    if next(calls) == stop:
                        raise Killed
                    return real(*args)

                return call

            from mmscale.data_tools import writer as module

            for name in names:
                patch.setattr(module, name, hooked(getattr(module, name)))
            patch.setattr(os, "replace", hooked(os.replace))
            patch.setattr(module._NewShard, "abandon", lambda self: None)
            try:
                write(folder)
                killed = False
            except Killed:
                killed = True
        assert killed or stop >= 10
        assert not killed or tree(folder) != whole
        assert tree(write(folder)) == whole


def test_paths_are_not_read_again_on_resume(tmp_path: Path) -> None:
    source = tmp_path / "a.png"
    source.write_bytes(PNG)

    def build() -> None:
        with ShardWriter(tmp_path / "d") as writer:
            writer.write("a", {"png": source, "txt": b"caption"})

    build()
    before = tree(tmp_path / "d")
    source.write_bytes(PNG[::-1])  # same size: only its size is looked at
    build()
    assert tree(tmp_path / "d") == before


def test_other_data_in_the_folder_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "d")
    before = tree(folder)
    for num, per_shard in ((10, 5), (9, 4), (4, 4)):
        with pytest.raises(RefusedInputError, match=r"another build|larger build"):
            write(folder, num, per_shard)
    with pytest.raises(RefusedInputError, match="another build"), ShardWriter(folder) as writer:
        writer.write("00000", {"json": row(0)[:-2] + b"}}", "0.png": PNG, "1.png": PNG})
    assert tree(folder) == before


@pytest.mark.parametrize(
    ("key", "ext"),
    [("a.b", "txt"), ("../a", "txt"), ("a", "TXT"), ("/a", "txt"), ("x" * 600, "txt"), ("a", ""), ("a", "_x.json")],
)
def test_names_that_no_reader_takes_are_not_written(tmp_path: Path, key: str, ext: str) -> None:
    with pytest.raises(DataError, match="cannot be written"), ShardWriter(tmp_path / "d") as writer:
        writer.write(key, {ext: b"x"})
    assert tree(tmp_path / "d") == {}


def test_a_key_written_twice_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=r"two samples have the key|duplicate_member"),
        ShardWriter(tmp_path / "d") as writer,
    ):
        writer.write("a", {"txt": b"x"})
        writer.write("a", {"txt": b"x"})


def test_shards_are_cut_by_bytes(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "d", max_bytes=8 * BLOCK) as writer:
        for i in range(6):
            writer.write(f"{i}", {"txt": bytes(100), "png": bytes(600 if i == 2 else 3 * BLOCK if i == 4 else 10)})
        writer.write("huge", {"png": bytes(20 * BLOCK)})
        writer.write("z", {"txt": b"x"})
    assert [entry.samples for entry in read_manifest(tmp_path / "d").shards] == [2, 1, 1, 1, 1, 1, 1]
    for entry in read_manifest(tmp_path / "d").shards:
        payload = scan_tar(tmp_path / "d" / entry.name).members
        used = sum(BLOCK + -(-m.size // BLOCK) * BLOCK for m in payload)
        assert used <= 8 * BLOCK or entry.samples == 1


def damage_truncate(tar: Path) -> None:
    os.truncate(tar, tar.stat().st_size - 3000)


def damage_header(tar: Path) -> None:
    data = bytearray(tar.read_bytes())
    data[scan_tar(tar).members[2].offset - BLOCK + 3] ^= 1
    tar.write_bytes(data)


def damage_same_size(tar: Path) -> None:
    data = bytearray(tar.read_bytes())
    data[scan_tar(tar).members[0].offset] ^= 1
    tar.write_bytes(data)


DAMAGE = {
    "cut off (A6)": damage_truncate,
    "header byte flipped (A7)": damage_header,
    "0 bytes (A8)": lambda tar: tar.write_bytes(b""),
    "modified, same size (A15)": damage_same_size,
    "not a tar": lambda tar: tar.write_bytes(b"hello"),
    "missing": Path.unlink,
    "index missing": lambda tar: index_path(tar).unlink(),
    "index of another shard": lambda tar: index_path(tar).write_bytes(
        index_path(tar.with_name("000000.tar")).read_bytes()
    ),
    "index damaged": lambda tar: index_path(tar).write_bytes(index_path(tar).read_bytes()[:-1] + b"x"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_shard_that_is_not_the_indexed_one_is_put_aside(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path / "d", 12)
    clean = ShardSet.open(folder, "src").fingerprint
    DAMAGE[kind](folder / "000001.tar")
    with caplog.at_level("WARNING", logger="mmscale"):
        data = ShardSet.open(folder, "src")
    assert list(data.quarantined) == ["000001.tar"]
    assert "000001" in data.quarantined["000001.tar"] and "mmscale-data index" in data.quarantined["000001.tar"]
    assert "000001.tar is put aside" in caplog.text
    delivered, skipped = deliver(data)
    assert delivered == [f"src/{i // 4:06d}.tar:{i:05d}" for i in (*range(4), *range(8, 12))]
    assert skipped == {"quarantined": 4} and data.indexed == 12
    assert data.fingerprint != clean


def test_an_old_shard_is_not_hashed_and_a_touched_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "d", 12)
    hashed: list[str] = []
    real = shards_module.file_sha256
    monkeypatch.setattr(shards_module, "file_sha256", lambda path: hashed.append(path.name) or real(path))
    listed = (folder / "manifest.json").stat().st_mtime_ns
    for i, shift in enumerate((-1, 1, -1)):
        os.utime(folder / f"{i:06d}.tar", ns=(listed, listed + shift))
    assert len(ShardSet.open(folder, "src")) == 12
    assert hashed == ["000001.tar"]


def test_a_tar_that_is_not_in_the_manifest_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "d")
    (folder / "new.tar").write_bytes((folder / "000000.tar").read_bytes())
    data = ShardSet.open(folder, "src")
    assert len(data) == 10 and "mmscale-data index" in data.quarantined["new.tar"]


def test_nothing_usable_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", 3)
    (folder / "000000.tar").write_bytes(b"")
    with pytest.raises(RefusedInputError, match=r"no usable sample.*0 bytes"):
        ShardSet.open(folder, "src")
    with ShardWriter(tmp_path / "empty"):
        pass
    with pytest.raises(RefusedInputError, match="no usable sample"):
        ShardSet.open(tmp_path / "empty", "src")


def edit_manifest(folder: Path, change) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


BAD_MANIFESTS = {
    "listed twice (A14)": (lambda m: m["shards"].append(m["shards"][0]), "listed twice"),
    "a command (A3)": (lambda m: m["shards"][0].update(name="pipe:touch X; cat s.tar"), "plain name"),
    "a parent folder": (lambda m: m["shards"][0].update(name="../a.tar"), "plain name"),
    "a URL": (lambda m: m["shards"][0].update(name="http://127.0.0.1/a.tar"), "plain name"),
    "a wrong type": (lambda m: m["shards"][0].update(samples="4"), "expected exactly"),
    "a boolean count": (lambda m: m["shards"][0].update(samples=True), "expected exactly"),
    "a missing field": (lambda m: m["shards"][0].pop("sha256"), "expected exactly"),
    "an unknown field": (lambda m: m["shards"][0].update(x=1), "expected exactly"),
    "a wrong sum": (lambda m: m.update(samples=11), "samples"),
    "a changed entry": (lambda m: m["shards"][0].update(sha256="0" * 64), "fingerprint"),
    "another version": (lambda m: m.update(version=2), "version"),
}


@pytest.mark.parametrize("kind", BAD_MANIFESTS)
def test_bad_manifests_are_refused(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "d")
    change, found = BAD_MANIFESTS[kind]
    edit_manifest(folder, change)
    with pytest.raises(RefusedInputError, match=found) as caught:
        ShardSet.open(folder, "src")
    assert "manifest.json" in str(caught.value) and "mmscale-data index" in str(caught.value)
    assert not (tmp_path / "X").exists()


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{", b'{"version": 1, "version": 1}', b"\xff"])
def test_a_manifest_that_is_none(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(RefusedInputError, match="mmscale-data index"):
        read_manifest(tmp_path)


def test_a_shard_that_changes_after_opening_stops_with_shard_and_offset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "RETRY_DELAYS_S", (0.0, 0.0))
    folder = write(tmp_path / "d", 8)
    data = ShardSet.open(folder, "src")
    assert [data.read(i).id for i in range(5)] == [data.id(i) for i in range(5)]
    offset = data.offset(6)
    os.truncate(folder / "000001.tar", offset + 10)  # while it is open
    with pytest.raises(DataError, match=rf"000001\.tar: .* offset {offset}, found 10; .*sample '00006'"):
        data.read(6)
    data = pickle.loads(pickle.dumps(data))  # and when it is opened afresh
    with pytest.raises(DataError, match=r"000001\.tar: \d+ bytes, \d+ when it was indexed"):
        data.read(6)
    (folder / "000001.tar").unlink()
    with pytest.raises(DataError, match="after 3 tries"):
        data.read(6)
    assert data.read(0).turns


def test_a_shard_of_the_same_size_put_in_its_place_is_noticed(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", 8)
    data = ShardSet.open(folder, "src")
    path = folder / "000001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"answer 5", b"ANSWER 5"))
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match=r"000001\.tar: changed since it was opened first \(its sha256 differs\)"):
        pickle.loads(pickle.dumps(data)).read(5)  # as a loader process opens it
    path.write_bytes(whole)  # copied back: another time, the same bytes
    assert pickle.loads(pickle.dumps(data)).read(5).turns == ShardSet.open(folder, "src").read(5).turns


def test_an_unreadable_shard_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "RETRY_DELAYS_S", (0.0, 0.0))
    data = ShardSet.open(write(tmp_path / "d", 8), "src")
    left = 2
    real = os.pread

    def flaky(*args):
        nonlocal left
        if left:
            left -= 1
            raise OSError(5, "Input/output error")
        return real(*args)

    monkeypatch.setattr(os, "pread", flaky)
    assert data.read(0).turns
    left = 3
    with pytest.raises(DataError, match=r"after 3 tries \(Input/output error\)"):
        data.read(0)


def test_bad_samples_are_counted_between_good_ones(tmp_path: Path) -> None:
    from mmscale.data_tools.indexing import index_folder

    good = [(f"g{i}", {"json": row(i)}) for i in range(6)]
    bad = [
        ("a13", {"jpg": PNG}),
        ("c1json", {"json": b'{"conversations": "\xff"}'}),
        ("c1txt", {"png": PNG, "txt": b"\xff"}),
        ("c2", {"json": b'{"conversations": [], "x": NaN}'}),
        ("c3more", {"json": encode_row([Turn("user", "<image><image>"), Turn("assistant", "x")]), "png": PNG}),
        (
            "c3fewer",
            {"json": encode_row([Turn("user", "<image>"), Turn("assistant", "x")]), "0.png": PNG, "1.png": PNG},
        ),
    ]
    folder = tmp_path / "d"
    folder.mkdir()
    with tarfile.open(folder / "x.tar", "w") as tar:
        for (good_key, good_members), (bad_key, bad_members) in zip(good, bad, strict=True):
            for key, members in ((good_key, good_members), (bad_key, bad_members)):
                for ext, content in members.items():
                    info = tarfile.TarInfo(f"{key}.{ext}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
            info = tarfile.TarInfo(f"../{bad_key}.txt")
            tar.addfile(info)
    index_folder(folder)
    delivered, skipped = deliver(ShardSet.open(folder, "s"))
    assert delivered == [f"s/x.tar:g{i}" for i in range(6)]
    assert skipped == {
        "missing_text": 1,
        "json_utf8": 1,
        "text_utf8": 1,
        "json_number": 1,
        "media_count": 2,
        "name_parent_folder": 6,
    }
