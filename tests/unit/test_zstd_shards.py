"""Seekable `.tar.zst` shards: plain zstd, read at random, refused before anything is decompressed when they cannot be."""

from __future__ import annotations

import io
import os
import pickle
import random
import tarfile
from pathlib import Path

import pytest
import zstandard

from mmscale.data_tools.writer import ShardWriter
from mmscale.errors import DataError, RefusedInputError
from mmscale.streaming.index import build_index, encode_index, index_path, write_atomic
from mmscale.streaming.manifest import Manifest, ShardEntry, file_sha256, idx_digest, write_manifest
from mmscale.streaming.rows import encode_row
from mmscale.streaming.shards import ShardSet
from mmscale.streaming.storage import zstd as zstd_module
from mmscale.streaming.storage.local import LocalFile
from mmscale.streaming.storage.zstd import FrameWriter, ZstdFile, read_frame_table
from mmscale.types import Turn


def texts(data: ShardSet, rows: list[int] | None = None) -> list[str]:
    return [sample.turns[1].text for sample in data.read_many(list(range(len(data))) if rows is None else rows)]


def compressed(path: Path, data: bytes) -> Path:
    with path.open("wb") as file:
        writer = FrameWriter(file)
        for start in range(0, len(data), 100_001):
            writer.write(data[start : start + 100_001])
        writer.close()
    return path


TEXT = b"".join(b"line %d of a text that repeats itself\n" % i for i in range(40_000))


def test_frames_are_plain_zstd_and_read_at_random(tmp_path: Path, seed: int) -> None:
    path = compressed(tmp_path / "a.zst", TEXT)
    with path.open("rb") as file:
        assert zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True).read() == TEXT
    table = read_frame_table(path)
    assert (table.content_bytes, table.file_bytes) == (len(TEXT), path.stat().st_size)
    file = ZstdFile(LocalFile(path, table.file_bytes), table, "a")
    rng = random.Random(seed)
    ranges = [(o := rng.randrange(len(TEXT)), rng.randrange(min(700_000, len(TEXT) - o))) for _ in range(40)]
    assert file.read_many([*ranges, (0, 0), (len(TEXT), 0)]) == [*(TEXT[o : o + n] for o, n in ranges), b"", b""]
    assert pickle.loads(pickle.dumps(file)).read(*ranges[0]) == TEXT[ranges[0][0] : sum(ranges[0])]
    with pytest.raises(DataError, match="index it again"):
        file.read(len(TEXT) - 5, 6)


def test_only_the_frames_needed_are_decompressed(tmp_path: Path) -> None:
    path = compressed(tmp_path / "a.zst", TEXT)
    table = read_frame_table(path)
    asked = []

    class Counting(LocalFile):
        def read_many(self, ranges):
            asked.extend(ranges)
            return super().read_many(ranges)

    file = ZstdFile(Counting(path, table.file_bytes), table, "a")
    size = zstd_module.FRAME_BYTES
    file.read(size + 5, 10)
    file.read(size + 50, 10)
    assert len(asked) == 1
    file.read(3 * size - 5, 10)
    assert len(asked) == 3


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def rows(num: int) -> list[tuple[str, bytes]]:
    turns = [[Turn("user", f"question {i}"), Turn("assistant", f"answer {i}")] for i in range(num)]
    return [(f"{i:05d}.json", encode_row(turn)) for i, turn in enumerate(turns)]


def test_a_compressed_shard_is_a_shard(tmp_path: Path) -> None:
    folder = tmp_path / "z"
    folder.mkdir()
    path = compressed(folder / "000000.tar.zst", tar_of(rows(900)))
    index = build_index(path)
    data = encode_index(index)
    write_atomic(index_path(path), data)
    assert index_path(path) == folder / "000000.idx" and index.file_size == path.stat().st_size < index.tar_size
    entry = ShardEntry(path.name, len(index), index.file_size, file_sha256(path), idx_digest(data))
    write_manifest(folder, Manifest((entry,)))
    opened = ShardSet.open(folder, "z")
    assert texts(opened) == [f"answer {i}" for i in range(900)]
    assert opened.id(899) == "z/000000.tar.zst:00899" and opened.read(899).turns[1].text == "answer 899"
    assert texts(opened, [800, 3, 4]) == ["answer 800", "answer 3", "answer 4"]
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    os.utime(path, ns=(0, 0))
    with pytest.raises(DataError, match=r"000000\.tar\.zst: damaged zstd frame at offset \d+"):
        texts(ShardSet.open(folder, "z"))
    write_manifest(folder, Manifest((entry,)))
    os.utime(path)
    with pytest.raises(RefusedInputError, match="sha256 differs"):
        ShardSet.open(folder, "z")


def test_two_shards_with_one_index_are_refused(tmp_path: Path) -> None:
    entries = [ShardEntry(f"0.tar{end}", 1, 1, "0" * 64, "0" * 32) for end in ("", ".zst")]
    write_manifest(tmp_path, Manifest(tuple(entries)))
    with pytest.raises(RefusedInputError, match="share one index"):
        ShardSet.open(tmp_path, "x")


def test_media_in_a_compressed_shard_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="mmscale"):
        build_index(compressed(tmp_path / "a.tar.zst", tar_of(rows(3))))
        assert not caplog.text
        index = build_index(
            compressed(tmp_path / "b.tar.zst", tar_of([("a.jpg", b"x"), ("a.txt", b"y"), ("b.jpg", b"x")]))
        )
    assert len(index) == 2 and caplog.text.count("b.tar.zst: media in a compressed shard") == 1


def refusals(tar: bytes) -> dict[str, tuple[bytes, str]]:
    small = zstandard.ZstdCompressor().compress(tar)
    stream = zstandard.ZstdCompressor().compressobj()
    unsized = stream.compress(tar) + stream.flush()
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 20)) * 80
    lying = bytearray(zstandard.ZstdCompressor(write_content_size=True).compress(bytes(200_000)))
    lying[6:10] = (5_000).to_bytes(4, "little")
    return {
        "one frame of unknown size": (unsized, "of unknown size .*mmscale-data reshard"),
        "one large frame": (
            zstandard.ZstdCompressor().compress(bytes(2 << 20)),
            r"of 2097152 bytes .*mmscale-data reshard",
        ),
        "a bomb (A9)": (bomb, "more than 200 times"),
        "no zstd": (tar, "no zstd frame at offset 0"),
        "empty (A8)": (b"", "0 bytes"),
        "cut off (A6)": (small[:-20], "cut off"),
        "rubbish behind": (small + b"abcd", "no zstd frame at offset"),
        "cut in the tar": (zstandard.ZstdCompressor().compress(tar[:-12_000]), "cut off"),
    }


@pytest.mark.parametrize("kind", refusals(tar_of(rows(20))))
def test_zstd_that_is_no_shard_is_refused_without_decompressing_it(tmp_path: Path, kind: str) -> None:
    content, found = refusals(tar_of(rows(20)))[kind]
    (tmp_path / "a.tar.zst").write_bytes(content)
    with pytest.raises(DataError, match=found):
        build_index(tmp_path / "a.tar.zst")


def test_a_frame_that_grows_beyond_its_word_is_refused(tmp_path: Path) -> None:
    path = compressed(tmp_path / "a.zst", bytes(100_000))
    table = read_frame_table(path)
    lying = bytearray(path.read_bytes())
    size_at = 5  # one-segment frames: magic, descriptor, then the content size
    assert int.from_bytes(lying[size_at : size_at + 4], "little") == 100_000
    for claim in (5_000, 1 << 31):
        lying[size_at : size_at + 4] = claim.to_bytes(4, "little")
        path.write_bytes(lying)
        with pytest.raises(DataError, match="damaged zstd frame"):
            ZstdFile(LocalFile(path, table.file_bytes), table, "a").read(0, 5_000)


def test_other_compressions_are_named_with_the_way_out(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    with ShardWriter(folder) as writer:
        for name, data in rows(12):
            writer.write(name.partition(".")[0], {"json": data})
    (folder / "x.tar.gz").write_bytes(b"\x1f\x8b")
    (folder / "y.tgz").write_bytes(b"\x1f\x8b")
    data = ShardSet.open(folder, "d")
    assert sorted(data.quarantined) == ["x.tar.gz", "y.tgz"] and len(data) == 12
    assert all("mmscale-data reshard" in reason for reason in data.quarantined.values())
