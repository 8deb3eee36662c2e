"""Tar scanning and the index: equal to tarfile and webdataset on good tars, never silent on bad ones."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import tarfile
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmscale.errors import DataError
from mmscale.streaming.foreign_index import foreign_index_findings, write_wids
from mmscale.streaming.index import _View, build_index, encode_index, index_path, map_index, read_index, write_index
from mmscale.streaming.manifest import Manifest, ShardEntry
from mmscale.streaming.tar import BLOCK, MAX_MEMBER_BYTES, name_fault, scan_tar, split_name


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            add(tar, name, data)
    return path


def pairs(first: int, last: int) -> list[tuple[str, bytes]]:
    """Members of good samples."""
    return [(f"s{i}.{ext}", f"{i}{ext}".encode()) for i in range(first, last) for ext in ("png", "txt")]


FORMATS = {
    "ustar": (tarfile.USTAR_FORMAT, "p"),
    "ustar prefix": (tarfile.USTAR_FORMAT, "dir.a/" * 18 + "p"),
    "gnu long": (tarfile.GNU_FORMAT, "x" * 130 + "/p"),
    "gnu long utf8": (tarfile.GNU_FORMAT, "bild-ü" * 25 + "/p"),
    "pax long utf8": (tarfile.PAX_FORMAT, "bild-ü" + "y" * 150 + "/p"),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_members_equal_tarfile(tmp_path: Path, kind: str) -> None:
    format, stem = FORMATS[kind]
    rng = random.Random(kind)
    members = [
        (f"{stem}{i:04d}.{ext}", rng.randbytes(rng.choice([0, 1, 511, 512, 513, 2000])))
        for i in range(9)
        for ext in ("jpg", "seg.json")
    ]
    path = write_tar(tmp_path / "a.tar", members, format)
    scan = scan_tar(path)
    with tarfile.open(path) as tar:
        assert [(m.name, m.offset, m.size, m.fault) for m in scan.members] == [
            (m.name, m.offset_data, m.size, "") for m in tar
        ]
    assert len({m.name for m in scan.members}) == 18
    index = build_index(path)
    assert index.keys == [f"{stem}{i:04d}" for i in range(9)] == [index.key(i) for i in range(9)]


def test_pax_size_and_base_256_size(tmp_path: Path) -> None:
    plain = write_tar(tmp_path / "a.tar", [("a.txt", b"x" * 700), ("b.txt", b"y" * 3)])
    data = bytearray(plain.read_bytes())
    data[124:136] = b"\x80" + (700).to_bytes(11, "big")
    fix_checksum(data, 0)
    (tmp_path / "b.tar").write_bytes(data)
    assert [(m.name, m.size) for m in scan_tar(tmp_path / "b.tar").members] == [("a.txt", 700), ("b.txt", 3)]

    with tarfile.open(tmp_path / "c.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "a.txt", b"x" * 700, pax_headers={"size": "700", "comment": "ü"})
        add(tar, "b.txt", b"y" * 3)
    data = bytearray((tmp_path / "c.tar").read_bytes())
    header = data.index(b"a.txt")
    data[header + 124 : header + 136] = b"00000000000\0"  # what writers put there when the PAX size counts
    fix_checksum(data, header)
    (tmp_path / "c.tar").write_bytes(data)
    assert [(m.name, m.size) for m in scan_tar(tmp_path / "c.tar").members] == [("a.txt", 700), ("b.txt", 3)]


def fix_checksum(data: bytearray, header: int) -> None:
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = f"{sum(data[header : header + BLOCK]):06o}\0 ".encode()


@pytest.mark.parametrize("byte", [0, 5, 100, 125, 150, 156, 257, 345, 511])
def test_a_flipped_header_byte_is_never_a_silent_stop(tmp_path: Path, byte: int) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(0, 10))
    data = bytearray(path.read_bytes())
    header = scan_tar(path).members[9].offset - BLOCK
    data[header + byte] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"offset {header}"):
        scan_tar(path)


def test_no_flipped_bit_changes_what_is_found_in_silence(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(0, 8))
    data, members = path.read_bytes(), scan_tar(path).members
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    refused = 0
    for _ in range(300):
        bad = bytearray(data)
        bad[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        try:
            assert scan_tar(path).members == members
        except DataError:
            refused += 1
    assert refused > 100


def test_a_zeroed_header_does_not_end_the_shard(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(0, 10))
    data = bytearray(path.read_bytes())
    header = scan_tar(path).members[9].offset - BLOCK
    data[header : header + BLOCK] = bytes(BLOCK)
    path.write_bytes(data)
    with pytest.raises(DataError, match="data follows the end marker"):
        scan_tar(path)


def test_every_truncation_is_refused_and_padding_is_not(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(0, 3))
    data = path.read_bytes()
    end = scan_tar(path).members[-1].offset + BLOCK
    for size in [0, 1, 511, 512, 513, 700, 1024, end - 1, end, end + 1, end + 511]:
        path.write_bytes(data[:size])
        with pytest.raises(DataError):
            scan_tar(path)
    path.write_bytes(data[: end + BLOCK])
    assert len(scan_tar(path).members) == 6
    path.write_bytes(data + bytes(4 * BLOCK))
    assert len(scan_tar(path).members) == 6
    path.write_bytes(data + data)
    with pytest.raises(DataError, match="joined"):
        scan_tar(path)


def test_not_a_tar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    compressed = gzip.compress(write_tar(path, [("a.txt", bytes(1 << 22))]).read_bytes())  # never expanded
    for content in (b"", compressed, b"hello", random.Random(1).randbytes(5000), b"\x1f\x8b" + bytes(600)):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.tar"):
            scan_tar(path)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("a.txt", ""),
        ("./sa_1.jpg", ""),
        ("d.1/a_b.0.png", ""),
        ("ü/é.txt", ""),
        ("../../x.txt", "name_parent_folder"),
        ("a/../x.txt", "name_parent_folder"),
        ("a\\..\\x.txt", "name_parent_folder"),
        ("/etc/x.txt", "name_absolute"),
        ("C:\\x.txt", "name_absolute"),
        ("a\nb.txt", "name_control_character"),
        ("a\x00b.txt", "name_control_character"),
        ("README", "name_without_extension"),
        ("a/.hidden", "name_without_extension"),
        ("a.", "name_without_extension"),
        ("__key__.txt", "name_reserved"),
        ("a.__key__", "name_reserved"),
        ("__MACOSX__/a.txt", "name_reserved"),
        ("x" * 508 + ".txt", ""),
        ("x" * 509 + ".txt", "name_too_long"),
        ("ü" * 255 + ".txt", "name_too_long"),
    ],
)
def test_name_rules(name: str, fault: str) -> None:
    assert name_fault(name) == fault


def test_split_name_equals_webdataset() -> None:
    from webdataset.tariterators import base_plus_ext

    for name in ("a.jpg", "d/a.0.JPG", "./sa_1.jpg", "d.1/x.tar.gz", "a/b/c.d.e.f", "./a/b.c", "ü.txt"):
        key, ext = base_plus_ext(name)
        assert split_name(name) == (key, ext.lower())
    for name in ("README", ".hidden"):
        assert base_plus_ext(name) == (None, None)
        assert split_name(name)[1] == ""


def test_refused_members_take_their_sample_out_and_are_counted_once(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"never read")
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in pairs(0, 2):
            add(tar, name, data)
        add(tar, "folder", type=tarfile.DIRTYPE)
        add(tar, "../../x.txt", b"x")
        add(tar, "link.txt", type=tarfile.SYMTYPE, linkname=str(secret))
        add(tar, "hard.png", type=tarfile.LNKTYPE, linkname="s0.png")
        add(tar, "hard.txt", b"its partner is refused")
        add(tar, "twice.txt", b"1")
        add(tar, "twice.txt", b"2")
        add(tar, "split.png", b"1")
        for name, data in pairs(2, 4):
            add(tar, name, data)
        add(tar, "split.txt", b"2")
        add(tar, "README", b"no extension")
        for name, data in pairs(4, 5):
            add(tar, name, data)
    index = build_index(path)
    assert index.keys == [f"s{i}" for i in range(5)]
    assert dict(index.skipped) == {
        "name_parent_folder": 1,
        "not_regular": 2,
        "duplicate_member": 1,
        "split_sample": 1,
        "name_without_extension": 1,
    }


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_name_of_20_megabytes_is_skipped(tmp_path: Path, format: int) -> None:
    path = write_tar(tmp_path / "a.tar", [*pairs(0, 2), ("x" * 20_000_000 + ".txt", b"x"), *pairs(2, 4)], format)
    index = build_index(path)
    assert index.keys == ["s0", "s1", "s2", "s3"]
    assert dict(index.skipped) == {"name_too_long": 1}


def test_a_member_beyond_the_cap_is_skipped_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    huge = tarfile.TarInfo("huge.png")
    huge.size = MAX_MEMBER_BYTES + 1
    small = write_tar(tmp_path / "small.tar", pairs(0, 2)).read_bytes()
    with path.open("wb") as file:
        file.write(huge.tobuf(tarfile.USTAR_FORMAT))
        file.seek(-(-huge.size // BLOCK) * BLOCK, os.SEEK_CUR)  # a hole: no bytes on disk
        file.write(small)
    index = build_index(path)
    assert index.keys == ["s0", "s1"] and dict(index.skipped) == {"member_too_large": 1}


def test_a_name_that_is_not_utf8_is_skipped(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [*pairs(0, 1), ("q_.txt", b"x"), *pairs(1, 2)])
    data = bytearray(path.read_bytes())
    header = data.index(b"q_.txt")
    data[header + 1] = 0xFF
    fix_checksum(data, header)
    path.write_bytes(data)
    index = build_index(path)
    assert index.keys == ["s0", "s1"]
    assert dict(index.skipped) == {"name_not_utf8": 1}


@pytest.mark.parametrize("ext", ["pyd", "pkl", "PICKLE", "pth", "pt", "x.pt", "pkl.gz", "npy"])
def test_formats_that_run_code_put_the_shard_aside(tmp_path: Path, ext: str) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    path = write_tar(tmp_path / "a.tar", [*pairs(0, 2), (f"e.{ext}", buffer.getvalue()), *pairs(2, 3)])
    with pytest.raises(DataError, match="runs code"):
        build_index(path)


def test_plain_arrays_and_language_codes_are_no_reason(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.arange(5))
    path = write_tar(tmp_path / "a.tar", [("a.npy", buffer.getvalue()), ("a.pt.txt", b"ola"), ("b.txt", b"x")])
    assert build_index(path).keys == ["a", "b"]


def test_length_columns_and_member_order(tmp_path: Path) -> None:
    def image(size: tuple[int, int], format: str, **options: object) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", size).save(buffer, format, **options)
        return buffer.getvalue()

    def clip(format: str, rate: int, samples: int) -> bytes:
        buffer = io.BytesIO()
        soundfile.write(buffer, np.zeros((samples, 2), np.float32), rate, format=format)
        return buffer.getvalue()

    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    members = {
        "json": b"{}" * 7,
        "10.png": image((3, 5), "PNG"),
        "2.jpg": image((40, 20), "JPEG", exif=exif.tobytes()),
        "1.webp": image((8, 9), "WEBP"),
        "3.flac": clip("FLAC", 16000, 777),
        "4.wav": clip("WAV", 8000, 33),
        "5.ogg": clip("OGG", 44100, 1000),
        "6.mp3": clip("MP3", 22050, 5000),
        "7.jpg": image((40, 20), "JPEG")[:30],
        "8.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        "9.mp4": b"any",
    }
    path = write_tar(tmp_path / "a.tar", [(f"k.{ext}", data) for ext, data in members.items()])
    index = build_index(path)
    exts = [index.exts[code] for code in index.columns["ext"]]
    assert exts == ["1.webp", "2.jpg", "3.flac", "4.wav", "5.ogg", "6.mp3", "7.jpg", "8.jpg", "9.mp4", "10.png", "json"]
    column = {name: values.tolist() for name, values in index.columns.items()}
    assert list(zip(column["width"], column["height"], strict=True)) == [
        (8, 9),
        (20, 40),
        *[(0, 0)] * 7,
        (3, 5),
        (0, 0),
    ]
    assert column["rate_hz"] == [0, 0, 16000, 8000, 44100, 22050, 0, 0, 0, 0, 0]
    decoded = len(soundfile.read(io.BytesIO(members["6.mp3"]))[0])
    assert column["audio_samples"] == [0, 0, 777, 33, 1000, decoded, 0, 0, 0, 0, 0]
    assert column["text_bytes"] == [0] * 10 + [14]
    assert column["frames"] == [1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0]


def test_a_wav_header_that_claims_too_much_is_not_believed(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16000)
        out.writeframes(bytes(200))
    data = bytearray(buffer.getvalue())
    data[40:44] = (2**32 - 2).to_bytes(4, "little")
    index = build_index(write_tar(tmp_path / "a.tar", [("a.wav", bytes(data)), ("a.txt", b"x")]))
    assert index.columns["audio_samples"].max() <= 100


def test_index_round_trip_and_damage(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [*pairs(0, 3), ("../x.txt", b"")])
    index = build_index(path)
    sidecar = index_path(path)
    assert sidecar.name == "a.idx"
    write_index(index, sidecar)
    again = read_index(sidecar)
    assert encode_index(again) == encode_index(index) == sidecar.read_bytes()
    assert again.keys == index.keys and dict(again.skipped) == {"name_parent_folder": 1}
    assert all((again.columns[name] == index.columns[name]).all() for name in index.columns)
    assert set(tmp_path.iterdir()) == {path, sidecar}

    data = sidecar.read_bytes()
    seed = random.randrange(2**32)
    print("seed", seed)
    cut = random.Random(seed).randrange(len(data))
    for bad in (
        data[:cut],
        b"",
        data + b"x",
        b"MMIDX\x00\x03\n" + data[8:],
        data[:-1] + b"\xff",
        data.replace(b'"members":6', b'"members":5'),
    ):
        sidecar.write_bytes(bad)
        with pytest.raises(DataError, match="mmscale-data index"):
            read_index(sidecar)
    offset = index.columns["offset"].copy()
    offset[3] = path.stat().st_size
    sidecar.write_bytes(data.replace(index.columns["offset"].tobytes(), offset.tobytes()))
    with pytest.raises(DataError, match="beyond the end"):
        read_index(sidecar)
    sidecar.unlink()
    with pytest.raises(DataError, match="no index"):
        read_index(sidecar)


def test_a_tar_without_files_is_refused_and_one_without_usable_files_has_no_samples(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a tar without any"):
        build_index(write_tar(tmp_path / "empty.tar", []))
    path = write_tar(tmp_path / "a.tar", [("../a.txt", b"x")])
    index = build_index(path)
    write_index(index, index_path(path))
    assert len(read_index(index_path(path))) == 0 and index.keys == []


def test_energons_index_is_held_against_ours(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "000000.tar", [*pairs(0, 4), ("bad", b"x")])
    index = build_index(path)
    assert foreign_index_findings(path, index) == []
    with tarfile.open(path) as tar:
        starts = [m.offset for m in tar.getmembers() if not m.name.endswith(".txt")]
        end = tar.offset
    sidecar = tmp_path / "000000.tar.idx"

    def findings(offsets: list[int]) -> str:
        sidecar.write_bytes(np.array(offsets, "<u8").tobytes())
        return "; ".join(foreign_index_findings(path, index))

    assert findings([*starts, end]) == ""  # what we skip (`bad`) counts there too
    assert "3 samples, the tar has 5" in findings([*starts[:3], end])
    assert "not those of the samples" in findings([*(s + 4096 for s in starts), end])
    assert "not those of the samples" in findings([0, 1, 2, 3, 4, end])
    sidecar.write_bytes(b"abc")
    assert "3 bytes" in foreign_index_findings(path, index)[0]


def test_wids_meta_is_written_and_held_against_ours(tmp_path: Path) -> None:
    manifest = Manifest(())
    for name, num in (("000000.tar", 3), ("000001.tar", 2)):
        path = write_tar(tmp_path / name, pairs(0, num))
        entry = ShardEntry(name, num, path.stat().st_size, "0" * 64, "0" * 32)
        manifest = Manifest((*manifest.shards, entry))
    zipped = Manifest((*manifest.shards, ShardEntry("000002.tar.zst", 1, 1, "0" * 64, "0" * 32)))
    meta = write_wids(tmp_path, zipped)
    content = json.loads(meta.read_text())
    assert (content["__kind__"], content["wids_version"], content["name"]) == ("VILA-WebDataset", 1, tmp_path.name)
    assert content["shardlist"] == [
        {"url": e.name, "nsamples": e.samples, "filesize": (tmp_path / e.name).stat().st_size} for e in manifest.shards
    ]
    path = tmp_path / "000001.tar"
    index = build_index(path)
    assert foreign_index_findings(path, index) == []
    content["shardlist"][1].update(nsamples=7, filesize=1)
    meta.write_text(json.dumps(content))
    assert [f.partition(": ")[2].split()[0] for f in foreign_index_findings(path, index)] == ["filesize", "nsamples"]
    content["shardlist"].pop()
    meta.write_text(json.dumps(content))
    assert "does not list 000001.tar" in foreign_index_findings(path, index)[0]
    for bad in ("[]", "{", '{"shardlist": [1]}'):
        meta.write_text(bad)
        assert len(foreign_index_findings(path, index)) == 1


def test_a_large_member_is_indexed_by_its_head_or_as_a_whole(tmp_path: Path) -> None:
    """Headers that lie beyond the first bytes are found too; video is handed over as a file."""
    picture = io.BytesIO()
    Image.new("RGB", (33, 21)).save(picture, "JPEG", icc_profile=bytes(40_000))
    webp = io.BytesIO()
    noise = np.random.default_rng(3).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(webp, "WEBP", quality=100)
    assert min(len(picture.getvalue()), len(webp.getvalue())) > 16_384
    members = [("a.jpg", picture.getvalue()), ("a.txt", b"x"), ("b.webp", webp.getvalue()), ("b.txt", b"x")]
    index = build_index(write_tar(tmp_path / "a.tar", members))
    assert index.columns["width"].tolist() == [33, 0, 200, 0] and index.columns["height"].tolist() == [21, 0, 200, 0]


def test_a_member_is_a_file_to_read() -> None:
    data = bytes(range(256)) * 40
    file = io.BufferedReader(_View(data, 100, 5000))
    assert file.read(10) == data[100:110] and file.tell() == 10
    assert file.seek(-5, io.SEEK_END) == 4995 and file.read() == data[5095:5100] and file.read(1) == b""
    assert file.seek(0) == 0 and file.read() == data[100:5100]
    assert file.seek(9000) == 9000 and file.read(1) == b""
    with pytest.raises(ValueError, match="seek"):
        file.seek(-1)


def test_an_index_opens_without_its_content_and_equals_the_whole(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"k\u00fc{i}.txt", b"x" * i) for i in range(50)])
    index = build_index(path)
    write_index(index, index_path(path))
    mapped, read = map_index(index_path(path)), read_index(index_path(path))
    assert mapped.keys == read.keys == index.keys == [mapped.key(i) for i in range(50)]
    assert encode_index(mapped) == encode_index(read) == index_path(path).read_bytes()
    index_path(path).write_bytes(b"")
    with pytest.raises(DataError, match="mmscale-data index"):
        map_index(index_path(path))
