"""New shards out of old ones: sizes, order, compression, conditions, duplicates; the samples' bytes never change."""

from __future__ import annotations

import gzip
import io
import json
import random
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import zstandard
from PIL import Image

from mmscale.data_tools import cli
from mmscale.data_tools.build import BuildOptions
from mmscale.data_tools.filtering import Selection, filter_samples
from mmscale.data_tools.indexing import JOURNAL_NAME, index_folder
from mmscale.data_tools.predicate import parse_condition
from mmscale.data_tools.reshard import reshard
from mmscale.data_tools.writer import ShardWriter
from mmscale.errors import ConfigError, DataError, RefusedInputError
from mmscale.streaming.manifest import read_manifest
from mmscale.streaming.shards import ShardSet

SMALL = BuildOptions(max_samples=4)


def picture(width: int, height: int) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (width, height), (width % 256, height % 256, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def row(answer: str, **fields: Any) -> bytes:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": answer}]
    return json.dumps({"conversations": turns, **fields}).encode()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten samples: pictures of rising size, two of them alike, two texts."""
    with ShardWriter(tmp_path / "data", max_samples=3) as writer:
        for i in range(7):
            writer.write(
                f"s{i}", {"png": picture(10 * (i + 1), 8), "json": row(f"a{i}", lang="en" if i % 2 else "de", n=i)}
            )
        writer.write("twin", {"png": picture(30, 8), "json": row("a2", id="another row")})
        writer.write("t0", {"json": row("text only", lang=None)})
        writer.write("t1", {"txt": b"a document", "seg.cls": b"kept"})
    return tmp_path / "data"


def content(folder: Path) -> dict[str, dict[str, bytes]]:
    data = ShardSet.open(folder, "s")
    return {data.id(i).rpartition(":")[2]: dict(data.members(i)) for i in range(len(data))}


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_new_sizes_keep_order_keys_and_bytes(tmp_path: Path, data: Path) -> None:
    report = reshard([data], tmp_path / "out", SMALL)
    assert (report.samples, report.skipped) == (10, {})
    assert [entry.samples for entry in read_manifest(tmp_path / "out").shards] == [4, 4, 2]
    assert content(tmp_path / "out") == content(data)
    assert list(content(tmp_path / "out")) == list(content(data))
    # Foreign members stay, and tars without an index give the same as the dataset.
    assert content(tmp_path / "out")["t1"]["seg.cls"] == b"kept"
    (data / "manifest.json").unlink()
    reshard([data], tmp_path / "raw", SMALL)
    assert tree(tmp_path / "raw") == tree(tmp_path / "out")


def test_a_shuffle_is_a_permutation_that_its_seed_decides(tmp_path: Path, data: Path) -> None:
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        reshard([data], tmp_path / name, SMALL, shuffle=seed)
    assert content(tmp_path / "a") == content(data)
    assert list(content(tmp_path / "a")) != list(content(data))
    assert tree(tmp_path / "a") == tree(tmp_path / "b") != tree(tmp_path / "c")
    (data / "manifest.json").unlink()
    with pytest.raises(RefusedInputError, match="mmscale-data index"):
        reshard([data], tmp_path / "d", SMALL, shuffle=1)


def test_equal_keys_need_new_ones(tmp_path: Path, data: Path) -> None:
    other = shutil.copytree(data, tmp_path / "other")
    with pytest.raises(DataError, match="--rename"):
        reshard([data, other], tmp_path / "out", BuildOptions())
    report = reshard([data, other], tmp_path / "new", BuildOptions(), rename=True)
    assert report.samples == 20
    assert list(content(tmp_path / "new"))[-1] == "000000019"
    with pytest.raises(RefusedInputError, match="lies inside"):
        reshard([data], data / "out", BuildOptions())
    with pytest.raises(RefusedInputError, match="given twice"):
        reshard([data, data], tmp_path / "twice", BuildOptions(), rename=True)


def test_what_was_refused_is_counted_on(tmp_path: Path, data: Path) -> None:
    with tarfile.open(data / "000000.tar", "a") as tar:
        info = tarfile.TarInfo("../evil.txt")
        tar.addfile(info, io.BytesIO())
    index_folder(data)
    report = reshard([data], tmp_path / "out", SMALL)
    assert (report.samples, report.skipped) == (10, {"name_parent_folder": 1})


def test_shards_put_aside_for_their_compression_are_written_anew(tmp_path: Path, data: Path) -> None:
    """What `index` says of a `.tar.gz` and of a `.tar.zst` of one frame is true: reshard takes them."""
    before = content(data)
    (data / "000001.idx").unlink()
    (data / "000001.tar.gz").write_bytes(gzip.compress((data / "000001.tar").read_bytes()))
    (data / "000002.tar.zst").write_bytes(zstandard.compress((data / "000002.tar").read_bytes() + bytes(2 << 20)))
    for name in ("000001.tar", "000002.tar"):
        (data / name).unlink()
    report = index_folder(data)
    assert report.manifest.samples == 4 and all("reshard" in why for why in report.manifest.quarantined.values())
    assert reshard([data], tmp_path / "out", BuildOptions()).samples == 10
    assert content(tmp_path / "out") == before


def test_a_killed_reshard_continues_to_the_same_bytes(tmp_path: Path, data: Path) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    reshard([data], tmp_path / "whole", SMALL, shuffle=3)
    for stop in random.Random(seed).sample(range(1, 11), 3):

        def kill(done: int, stop: int = stop) -> None:
            if done == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            reshard([data], tmp_path / f"out{stop}", SMALL, shuffle=3, on_row=kill)
        reshard([data], tmp_path / f"out{stop}", SMALL, shuffle=3)
        assert tree(tmp_path / f"out{stop}") == tree(tmp_path / "whole")


def texts(folder: Path, count: int, **options: Any) -> None:
    rng = random.Random(5)
    with ShardWriter(folder, **options) as writer:
        for i in range(count):
            words = " ".join(rng.choices(["to", "be", "or", "not", "that", "is", "the", "question"], k=150))
            writer.write(f"{i:06d}", {"json": row(words, n=i)})


def test_text_in_zstd_frames(tmp_path: Path) -> None:
    texts(tmp_path / "plain", 1500)
    texts(tmp_path / "zstd", 1500, zstd=True)
    texts(tmp_path / "again", 1500, zstd=True)
    assert tree(tmp_path / "zstd") == tree(tmp_path / "again")
    assert content(tmp_path / "zstd") == content(tmp_path / "plain")
    shard = tmp_path / "zstd/000000.tar.zst"
    plain = (tmp_path / "plain/000000.tar").read_bytes()
    assert shard.stat().st_size < 0.3 * len(plain)
    # Any reader of zstd gets the tar, whole or as a stream.
    with zstandard.open(shard, "rb") as file:
        assert file.read() == plain
    with tarfile.open(fileobj=zstandard.open(shard, "rb"), mode="r|") as tar:
        assert sum(1 for _ in tar) == 1500
    frames, data = 0, shard.read_bytes()
    while data:
        unit = zstandard.ZstdDecompressor().decompressobj()
        unit.decompress(data)
        data, frames = unit.unused_data, frames + 1
    assert frames == -(-len(plain) // (256 << 10)) > 4
    # A finished shard is recognised, a changed one refused.
    texts(tmp_path / "zstd", 1500, zstd=True)
    with pytest.raises(RefusedInputError, match="another build"):
        texts(tmp_path / "zstd", 1499, zstd=True)


@pytest.mark.skipif(shutil.which("zstd") is None, reason="the program zstd is not installed")
def test_the_programs_zstd_and_tar_read_it(tmp_path: Path) -> None:
    texts(tmp_path / "zstd", 300, zstd=True)
    zstd = subprocess.run(["zstd", "-dc", tmp_path / "zstd/000000.tar.zst"], capture_output=True, check=True)
    listed = subprocess.run(["tar", "-t"], input=zstd.stdout, capture_output=True, check=True)
    assert listed.stdout.decode().split() == [f"{i:06d}.json" for i in range(300)]


def test_reshard_to_zstd_and_back(tmp_path: Path, data: Path) -> None:
    texts(tmp_path / "plain", 20)
    reshard([tmp_path / "plain"], tmp_path / "zstd", BuildOptions(zstd=True))
    reshard([tmp_path / "zstd"], tmp_path / "back", BuildOptions())
    assert tree(tmp_path / "back")["000000.tar"] == tree(tmp_path / "plain")["000000.tar"]
    (tmp_path / "zstd/manifest.json").unlink()
    reshard([tmp_path / "zstd"], tmp_path / "raw", BuildOptions())
    assert tree(tmp_path / "raw") == tree(tmp_path / "back")
    with pytest.raises(RefusedInputError, match=r"--zstd is for text"):
        reshard([data], tmp_path / "media", BuildOptions(zstd=True))
    reshard([data], tmp_path / "forced", BuildOptions(zstd=True, force=True))
    assert content(tmp_path / "forced") == content(data)


def kept(tmp_path: Path, data: Path, **options: Any) -> tuple[list[str], Counter[str]]:
    out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    report = filter_samples([data], out, Selection(**options), BuildOptions())
    assert report.rows == 10
    return list(content(out)) if report.samples else [], report.skipped


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("width >= 50 and height >= 8", "s4 s5 s6 t0 t1"),
        ("images == 1 and width >= 50", "s4 s5 s6"),
        ("20 < width <= 40", "s2 s3 twin t0 t1"),
        ("pixels < 100", "s0 t0 t1"),
        ("images == 0", "t0 t1"),
        ("not images", "t0 t1"),
        ("json.lang == 'en'", "s1 s3 s5"),
        ("json.lang in ['en', 'fr'] or json.n in (0, 6)", "s0 s1 s3 s5 s6"),
        ("json.n > 4", "s5 s6"),
        ("json.id != None", "twin"),
        ("json.conversations.x == None and json.lang is None", "twin t0 t1"),
        ("'tw' in key", "twin"),
        ("shard == '000000.tar'", "s0 s1 s2"),
        ("text_bytes < 20", "t1"),
        ("-5 < json.n < 1", "s0"),
        ("width < 0", "t0 t1"),
        ("audio_s > 1 and bytes > 0 and fps > 0 and videos == 0", "s0 s1 s2 s3 s4 s5 s6 twin t0 t1"),
    ],
)
def test_conditions(tmp_path: Path, data: Path, where: str, expected: str) -> None:
    keys, skipped = kept(tmp_path, data, where=parse_condition(where))
    assert keys == expected.split()
    assert skipped["where"] == 10 - len(keys)


@pytest.mark.parametrize(
    "where",
    [
        "__import__('os').system('touch marker')",
        "json.__class__()",
        "().__class__.__bases__[0]",
        "[x for x in (1,)]",
        "(lambda: 1)()",
        "open('x')",
        "key.upper() == 'A'",
        "f'{key}'",
        "width * height > 5",
        "9 ** 9 ** 9 ** 9",
        "width if height else 3",
        "json",
        "json[0]",
        "widht > 3",
        "(a := 5)",
        "width >",
        "",
        "import os",
        "b'x' == key",
        "...",
        "(" * 500 + "1" + ")" * 500,
        "not " * 3000 + "1",
        "1" + " " * 20_000,
        "\0",
    ],
)
def test_what_is_no_condition(where: str) -> None:
    with pytest.raises(ConfigError, match="--where"):
        parse_condition(where)


def test_keys_and_duplicates(tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys, skipped = kept(tmp_path, data, keep=frozenset({"s1", "data/000002.tar:s6", "nowhere"}))
    assert (keys, skipped) == (["s1", "s6"], {"keys": 8})
    assert "1 listed keys are in none of the folders, such as 'nowhere'" in caplog.text
    keys, skipped = kept(tmp_path, data, drop=frozenset({"s1", "t0"}))
    assert (len(keys), skipped) == (8, {"keys": 2})
    keys, skipped = kept(tmp_path, data, dedup=True)
    assert "twin" not in keys and skipped == {"duplicate": 1}
    listed = [
        json.loads(line) for path in tmp_path.glob("out*/skipped.jsonl") for line in path.read_text().splitlines()
    ]
    assert {
        "id": "data/000002.tar:twin",
        "reason": "duplicate",
        "detail": "media and text of data/000000.tar:s2",
    } in listed


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["mmscale-data", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_the_commands(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "keys").write_text("s1\n\ns2\n")
    cases: list[tuple[int, str, list[object]]] = [
        (
            0,
            "10 rows = 10 samples + 0 skipped",
            ["reshard", data, "--out", tmp_path / "r", "--shuffle", 7, "--shard-samples", 2],
        ),
        (0, "10 rows = 2 samples + 8 skipped", ["filter", data, "--out", tmp_path / "f", "--keys", tmp_path / "keys"]),
        (0, "10 rows = 3 samples", ["filter", data, "--out", tmp_path / "w", "--where", 'json.lang == "en"']),
        (0, "10 rows = 9 samples", ["convert", data, "--from", "webdataset", "--out", tmp_path / "c"]),
        (2, "nothing to filter by", ["filter", data, "--out", tmp_path / "n"]),
        (2, "at least one usable row", ["filter", data, "--out", tmp_path / "e", "--where", "1 == 2"]),
        (2, "no keys", ["filter", data, "--out", tmp_path / "k", "--keys", tmp_path / "no keys"]),
        (2, "nowhere", ["reshard", tmp_path / "nowhere", "--out", tmp_path / "x"]),
    ]
    for code, found, words in cases:
        if "webdataset" in words:  # a bare key in the fixture is no sample for a training run
            with tarfile.open(data / "000000.tar", "a") as tar:
                tar.addfile(tarfile.TarInfo("only.cls"), io.BytesIO())
            found = "11 rows = 10 samples + 1 skipped"
        assert run(monkeypatch, *words) == code, words
        printed = capsys.readouterr()
        assert found in (printed.err if code else printed.out), words
        assert "Traceback" not in printed.err


def test_index_goes_on_where_it_was(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmscale.data_tools import indexing

    (data / "manifest.json").unlink()
    read: list[str] = []
    real = indexing.build_index
    monkeypatch.setattr(indexing, "build_index", lambda tar: read.append(tar.name) or real(tar))

    def kill(done: int, total: int, name: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_folder(data, kill)
    assert read == ["000000.tar", "000001.tar"]
    report = index_folder(data)
    assert (read, report.kept) == ([f"00000{i}.tar" for i in range(4)], 2)
    assert not (data / JOURNAL_NAME).exists()
    (data / "000001.tar").touch()
    (data / "000002.idx").write_bytes(b"damaged")
    (data / JOURNAL_NAME).write_text('{"entry": {"na')
    read.clear()
    again = index_folder(data)
    assert (read, again.manifest) == (["000001.tar", "000002.tar"], report.manifest)
    (data / "manifest.json").write_text("damaged")
    assert index_folder(data).manifest == report.manifest
    read.clear()
    assert index_folder(data, again=True).kept == 0 and len(read) == 4


def test_index_writes_wids_and_names_what_it_cannot_read(tmp_path: Path, data: Path) -> None:
    (data / "old.tar.gz").write_bytes(b"")
    report = index_folder(data, wids=True)
    assert "mmscale-data reshard" in report.manifest.quarantined["old.tar.gz"]
    meta = json.loads((data / "wids-meta.json").read_text())
    assert [shard["nsamples"] for shard in meta["shardlist"]] == [3, 3, 3, 1]
    assert index_folder(data).findings == ()
    meta["shardlist"][0]["nsamples"] = 5
    (data / "wids-meta.json").write_text(json.dumps(meta))
    assert "nsamples of 000000.tar is 5, found 3" in index_folder(data).findings[0]
    (data / "000000.tar.zst").write_bytes(b"")
    with pytest.raises(RefusedInputError, match="share one index file"):
        index_folder(data)


def test_help_is_quick(tmp_path: Path) -> None:
    code = "import sys; from mmscale.data_tools import cli; print([m for m in ('torch', 'numpy', 'webdataset', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_equal_samples_of_folders_with_one_name_are_duplicates(tmp_path: Path, data: Path) -> None:
    (tmp_path / "b").mkdir()
    shutil.copytree(data, tmp_path / "b" / "data")
    report = filter_samples(
        [data, tmp_path / "b" / "data"], tmp_path / "out", Selection(dedup=True), BuildOptions(), rename=True
    )
    assert (report.samples, report.skipped) == (9, {"duplicate": 11})


def test_one_folder_is_written_by_one_command_at_a_time(tmp_path: Path, data: Path) -> None:
    refused: list[str] = []

    def other(rows: int) -> None:
        for command in (
            lambda: reshard([data], tmp_path / "out", BuildOptions(max_samples=5)),
            lambda: index_folder(tmp_path / "out"),
        ):
            with pytest.raises(RefusedInputError, match="another command writes here"):
                command()
            refused.append("yes")

    assert reshard([data], tmp_path / "out", SMALL, on_row=other).samples == 10
    assert len(refused) == 20
    assert content(tmp_path / "out") == content(data)
    assert index_folder(tmp_path / "out").manifest.samples == 10


def test_a_build_of_the_other_compression_leaves_old_shards_alone(tmp_path: Path) -> None:
    texts(tmp_path / "d", 3)
    before = tree(tmp_path / "d")
    with pytest.raises(RefusedInputError, match=r"000000\.tar: left over from another build"):
        texts(tmp_path / "d", 3, zstd=True)
    assert tree(tmp_path / "d") == before


def test_index_puts_aside_what_is_no_file(tmp_path: Path, data: Path) -> None:
    (data / "a.tar").mkdir()
    (data / "b.tar").symlink_to("nowhere")
    report = index_folder(data)
    assert (report.manifest.samples, sorted(report.manifest.quarantined)) == (10, ["a.tar", "b.tar"])
    (data / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError):  # to leave it out in silence would lose its samples
        reshard([data], tmp_path / "out", SMALL)
