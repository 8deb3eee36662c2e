"""Foreign data to samples: rows in every container, several media, frames, inline bytes, tars of others, sidecars."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import subprocess
import sys
import tarfile
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from mmscale.data_tools.build import BuildOptions, BuildReport, build
from mmscale.data_tools.indexing import index_folder
from mmscale.data_tools.kinds import Kind, Placement
from mmscale.data_tools.readers.captions import wids_key
from mmscale.data_tools.readers.decompress import plain_tar
from mmscale.data_tools.readers.items import Source
from mmscale.data_tools.readers.media_refs import natural
from mmscale.errors import ConfigError, DataError, RefusedInputError
from mmscale.streaming.decode.video import FRAMES_EXT, mux_frames
from mmscale.streaming.shards import ShardSet
from mmscale.types import Sample


def picture(shade: int, format: str = "PNG") -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (6, 4), (shade, 7, 9)).save(buffer, format)
    return buffer.getvalue()


def tone() -> bytes:
    buffer = BytesIO()
    soundfile.write(buffer, np.zeros(800, np.float32), 16000, format="WAV")
    return buffer.getvalue()


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def url(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


@pytest.fixture
def media(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    (folder / "frames").mkdir(parents=True)
    for i in range(4):
        (folder / f"{i}.png").write_bytes(picture(i))
    (folder / "t.wav").write_bytes(tone())
    for i in (1, 2, 10):
        (folder / "frames" / f"f{i}.jpeg").write_bytes(picture(i, "JPEG"))
    (folder / "clip.mp4").write_bytes(mux_frames([picture(i, "JPEG") for i in range(3)]))
    return folder


def convert(kind: Kind, source: Source, out: Path, **options: Any) -> tuple[BuildReport, list[Sample]]:
    report = build(kind, source, out, BuildOptions(**options))
    data = ShardSet.open(out, "s")
    assert data.indexed == report.samples
    return report, [data.read(i) for i in range(len(data))]


def content_hash(samples: list[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr((sample.turns, sample.media)).encode())
    return digest.hexdigest()


LLAVA = [
    {"id": "1", "image": "0.png", "conversations": turns("<image>\nWhat?", "A cat."), "score": 0.5},
    {
        "id": "2",
        "images": ["1.png", "2.png"],
        "conversations": turns("<image>\nthis or<image>?", "b", "And <image>?".replace("<image>", "it"), "c"),
    },
    {"id": "3", "conversations": turns("Hello", "Hi")},
    {"id": "4", "image": "3.png", "audio": "t.wav", "conversations": turns("<image>\n<audio>\nCompare", "same")},
    {"id": "5", "video": "clip.mp4", "conversations": turns("<video>\nLeft?", "no")},
    {
        "id": "6",
        "images": ["0.png", "1.png", "2.png"],
        "conversations": turns("See <image> and", "ok", "then <image><image>", "fine"),
    },
]


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def image(name: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": name}}


def messages(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def openai_rows(media: Path) -> list[dict[str, Any]]:
    sound = {"type": "input_audio", "input_audio": {"data": base64.b64encode(tone()).decode(), "format": "wav"}}
    clip = {"type": "video_url", "video_url": {"url": "clip.mp4"}}
    return [
        {"id": "1", "messages": messages([image("0.png"), text("What?")], [text("A cat.")]), "score": 0.5},
        {
            "id": "2",
            "messages": messages(
                [image(url(picture(1))), text("this or"), image("file:2.png"), text("?")], "b", "And it?", "c"
            ),
        },
        {"id": "3", "messages": messages("Hello", "Hi")},
        {"id": "4", "messages": messages([image(f"file://{media}/3.png"), sound, text("Compare")], "same")},
        {"id": "5", "messages": messages([clip, text("Left?")], "no")},
        {
            "id": "6",
            "messages": messages(
                [text("See "), image("0.png"), text(" and")],
                "ok",
                [text("then "), image("1.png"), image("2.png")],
                "fine",
            ),
        },
    ]


def test_every_container_gives_the_same_samples(tmp_path: Path, media: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(LLAVA, indent=2))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LLAVA))
    names = dict.fromkeys(name for row in LLAVA for name in row)  # every row names all columns
    table = pa.Table.from_pylist([{**names, **row} for row in LLAVA])
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    (tmp_path / "o.jsonl").write_text("".join(json.dumps(row) + "\n" for row in openai_rows(media)))
    aliases = {"human": "user", "gpt": "chatgpt"}
    shared = [
        {**row, "conversations": [{**t, "from": aliases[t["from"]]} for t in row["conversations"]]} for row in LLAVA
    ]
    (tmp_path / "s.json").write_text(json.dumps(shared))
    cases = {
        (Kind.llava, "a.json"),
        (Kind.jsonl, "a.jsonl"),
        (Kind.parquet, "a.parquet"),
        (Kind.openai, "o.jsonl"),
        (Kind.sharegpt, "s.json"),
    }
    hashes = {}
    for kind, name in cases:
        report, samples = convert(kind, Source((tmp_path / name,), media), tmp_path / f"out-{kind}")
        assert (report.rows, report.skipped) == (6, {}), name
        hashes[name] = content_hash(samples)
    assert len(set(hashes.values())) == 1, hashes
    read = ShardSet.open(tmp_path / "out-openai", "s")
    kept = json.loads(dict(read.members(0))["json"])
    assert kept["score"] == 0.5 and "messages" not in kept
    assert b"base64" not in dict(read.members(1))["json"]


def test_positions_over_turns(tmp_path: Path, media: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(LLAVA))
    _, samples = convert(Kind.llava, Source((tmp_path / "a.json",), media), tmp_path / "out")
    assert [t.text for t in samples[5].turns] == ["See <image> and", "ok", "then <image><image>", "fine"]
    assert [m.data for m in samples[5].media] == [picture(i) for i in range(3)]
    assert [m.modality for m in samples[3].media] == ["image", "audio"]


def test_vila_texts_captions_documents_and_inline_bytes(tmp_path: Path) -> None:
    rows = [
        {
            "texts": [{"user": "<image>\nQ1", "assistant": "A1"}, {"user": "Q2", "assistant": "A2"}],
            "image": {"bytes": picture(1), "path": None},
        },
        {
            "caption": "A <image> is here",
            "image": {"bytes": picture(2, "JPEG"), "path": "x/y.bin"},
            "weight": float("nan"),
        },
        {"text": "Words <image> and words", "image": {"bytes": picture(3, "WEBP"), "path": "z.webp"}},
        {"text": "Only words", "when": None},
        {"caption": "no picture in it", "image": {"bytes": b"BM junk", "path": "a.bmp"}},
    ]
    pq.write_table(
        pa.Table.from_pylist(
            [{**dict.fromkeys(("texts", "caption", "text", "image", "weight")), **row} for row in rows]
        ),
        tmp_path / "a.parquet",
    )
    report, samples = convert(Kind.parquet, Source((tmp_path / "a.parquet",)), tmp_path / "out")
    assert report.skipped == {"media_type": 1}
    assert [[t.text for t in s.turns] for s in samples] == [
        ["<image>\nQ1", "A1", "Q2", "A2"],
        ["<image>\n", "A <image> is here"],
        ["Words <image> and words"],
        ["Only words"],
    ]
    assert [[(m.ext, m.data) for m in s.media] for s in samples] == [
        [("png", picture(1))], [("jpg", picture(2, "JPEG"))], [("webp", picture(3, "WEBP"))], [],
    ]  # fmt: skip


def test_videos_of_frames(tmp_path: Path, media: Path) -> None:
    rows = [
        {"video": "frames", "conversations": turns("<video>\nq", "folder")},
        {"frames": ["frames/f2.jpeg", "frames/f1.jpeg"], "conversations": turns("<video>\nq", "list")},
        {"frames": ["3.png", "0.png"], "conversations": turns("q", "list of png")},
        {"video": "clip", "conversations": turns("q", "without its .mp4")},
        {"frames": ["frames/f9.jpeg"], "conversations": turns("q", "missing")},
        {"frames": ["../x.jpeg"], "conversations": turns("q", "outside")},
        {"frames": [], "conversations": turns("q", "none")},
        {"video": "nowhere", "conversations": turns("q", "missing")},
        {"video": "../media/frames", "conversations": turns("q", "outside")},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    report, samples = convert(Kind.llava, Source((tmp_path / "a.json",), media), tmp_path / "out")
    assert report.skipped == {"media_missing": 2, "media_path": 2, "media_type": 1}
    jpegs = {i: picture(i, "JPEG") for i in (1, 2, 10)}
    assert [s.media[0].data for s in samples] == [
        mux_frames([jpegs[1], jpegs[2], jpegs[10]]),
        mux_frames([jpegs[2], jpegs[1]]),
        mux_frames([picture(3), picture(0)]),
        (media / "clip.mp4").read_bytes(),
    ]
    assert {m.ext for s in samples for m in s.media} == {FRAMES_EXT}
    columns = ShardSet.open(tmp_path / "out", "s").columns
    assert columns.frames[columns.frames > 0].tolist() == [3, 2, 2, 3]
    assert natural(["f10.jpg", "f2.jpg", "f1.jpg"]) == ["f1.jpg", "f2.jpg", "f10.jpg"]


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([image("http://127.0.0.1/x.png")], "media_path"),
        ([image("file:///etc/hostname")], "media_path"),
        ([image("file://host/0.png")], "media_path"),
        ([image("../0.png")], "media_path"),
        ([image(url(b"GIF89a", "image/gif"))], "media_type"),
        ([image("data:image/png;base64,%%%")], "media_type"),
        ([image(url(b""))], "media_empty"),
        ([{"type": "image_url", "image_url": 5}], "json_fields"),
        ([{"type": "sound", "text": "x"}], "json_fields"),
        ([image("0.png"), text("a literal <image>")], "media_count"),
        (5, "json_fields"),
    ],
)
def test_openai_rows_that_cannot_be_used(tmp_path: Path, media: Path, parts: Any, reason: str) -> None:
    good = {"messages": messages("q", "a")}
    rows = [good, {"messages": messages(parts, "a")}, good]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    report, samples = convert(Kind.openai, Source((tmp_path / "a.json",), media), tmp_path / "out")
    assert (len(samples), report.skipped) == (2, {reason: 1})
    listed = json.loads((tmp_path / "out" / "skipped.jsonl").read_text())
    assert (listed["file"], listed["row"]) == ("a.json", 1)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": [image("0.png")]}]},
        {"messages": [{"role": "tool", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": "q"}]},
    ],
)
def test_openai_roles(tmp_path: Path, media: Path, row: dict[str, Any]) -> None:
    (tmp_path / "a.json").write_text(
        json.dumps([row, {"messages": [{"role": "developer", "content": "s"}, *messages("q", "a")]}])
    )
    report, samples = convert(Kind.openai, Source((tmp_path / "a.json",), media), tmp_path / "out")
    assert report.skipped == {"roles": 1} and samples[0].turns[0].role == "system"


def test_tags_in_front(tmp_path: Path, media: Path) -> None:
    rows = [{"images": ["0.png", "1.png"], "conversations": turns("Is <image> this?\n", "<image>", "or <image>", "b")}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    _, samples = convert(Kind.llava, Source((tmp_path / "a.json",), media, placement=Placement.front), tmp_path / "out")
    assert [t.text for t in samples[0].turns] == ["<image>\nIs  this?", "<image>", "<image>\nor", "b"]


def test_a_folder_of_texts_is_a_folder_of_documents(tmp_path: Path) -> None:
    source = tmp_path / "src"
    source.mkdir()
    for i in range(3):
        (source / f"{i}.txt").write_text(f"Document {i}")
    (source / "empty.txt").write_text(" ")
    (source / "away.txt").symlink_to("/etc/hostname")
    report, samples = convert(Kind.folder, Source((source,)), tmp_path / "out")
    assert report.skipped == {"empty_text": 1, "media_path": 1}
    assert [(t.role, t.text) for s in samples for t in s.turns] == [("document", f"Document {i}") for i in range(3)]


def test_links_out_of_a_folder_are_counted(tmp_path: Path) -> None:
    source = tmp_path / "src"
    source.mkdir()
    (tmp_path / "secret.png").write_bytes(picture(1))
    for name in ("in", "linked", "out"):
        (source / f"{name}.txt").write_text(name)
    (source / "in.png").write_bytes(picture(0))
    (source / "linked.png").symlink_to("in.png")
    (source / "out.png").symlink_to("../secret.png")
    report, samples = convert(Kind.folder, Source((source,)), tmp_path / "out")
    assert report.skipped == {"media_path": 1}
    assert [s.turns[1].text for s in samples] == ["in", "linked"]


def test_pipes_and_linked_folders_in_a_folder_are_counted(tmp_path: Path) -> None:
    source = tmp_path / "src"
    source.mkdir()
    (source / "a.txt").write_text("a document")
    os.mkfifo(source / "b.txt")
    (source / "c.txt").symlink_to("nowhere")
    (tmp_path / "more").mkdir()
    (source / "more").symlink_to("../more")
    report, samples = convert(Kind.folder, Source((source,)), tmp_path / "out")
    assert (len(samples), report.skipped) == (1, {"media_missing": 2, "media_path": 1})


def test_parquet_cells_that_python_cannot_hold_are_skipped_rows(tmp_path: Path) -> None:
    when = pa.array([1, 10**18, 2], pa.timestamp("us"))
    pq.write_table(pa.table({"text": ["a", "b", "c"], "when": when}), tmp_path / "a.parquet")
    report, samples = convert(Kind.parquet, Source((tmp_path / "a.parquet",)), tmp_path / "out")
    assert ([s.turns[0].text for s in samples], report.skipped) == (["a", "c"], {"json_fields": 1})


def test_damaged_parquet_is_refused_by_name(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"text {i}" * 20 for i in range(200)]}), path)
    data = path.read_bytes()
    for _ in range(40):
        broken = bytearray(data)
        for _ in range(3):
            broken[rng.randrange(4, len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        try:
            build(Kind.parquet, Source((path,)), tmp_path / f"out{rng.random()}", BuildOptions())
        except RefusedInputError as error:
            assert "a.parquet" in str(error)


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = "w:gz" if path.suffix in (".gz", ".tgz") else "w"
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def compress_zstd(path: Path) -> Path:
    import zstandard

    target = path.with_name(path.name + ".zst")
    target.write_bytes(zstandard.ZstdCompressor(level=3).compress(path.read_bytes()))
    path.unlink()
    return target


def captioned(*keys: str, url: bool = True) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    for i, key in enumerate(keys):
        members |= {f"{key}.jpg": picture(i, "JPEG"), f"{key}.txt": f"caption {key}".encode()}
        if url:
            members[f"{key}.json"] = json.dumps({"url": f"http://x/{key}", "width": 6}).encode()
    return members


def test_tars_of_every_compression_give_the_same_samples(tmp_path: Path) -> None:
    members = {
        **captioned("a", "b"),
        "c.txt": b"no image",
        "c.json": b"{}",
        "d.jpg": b"",
        "e.mp4": mux_frames([picture(1)]),
        "e.json": b'{"caption": "a clip"}',
        "f.0.png": picture(3),
        "f.1.png": picture(4),
        "f.json": json.dumps({"conversations": turns("<image><image>", "two")}).encode(),
    }
    results = []
    for suffix in (".tar", ".tar.gz", ".tgz", ".tar.zst"):
        folder = tmp_path / f"src{suffix}"
        path = write_tar(folder / ("0.tar" if suffix == ".tar.zst" else f"0{suffix}"), members)
        if suffix == ".tar.zst":
            path = compress_zstd(path)
        report, samples = convert(Kind.webdataset, Source((folder,)), tmp_path / f"out{suffix}")
        assert report.skipped == {"missing_media": 1, "missing_text": 1}
        results.append(content_hash(samples))
        assert [s.id.rpartition(":")[2] for s in samples] == ["a", "b", "e", "f"]
        assert sorted(p.name for p in (tmp_path / f"out{suffix}").iterdir()) == [
            "000000.idx",
            "000000.tar",
            "manifest.json",
            "skipped.jsonl",
        ]
    assert len(set(results)) == 1
    renamed, _ = convert(Kind.webdataset, Source((tmp_path / "src.tar",), rename=True), tmp_path / "renamed")
    assert renamed.samples == 4


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_bombs_are_refused_at_the_cap(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "src" / f"bomb.tar{suffix}"
    path.parent.mkdir()
    if suffix == ".gz":
        import gzip

        with gzip.open(path, "wb", compresslevel=9) as file:
            for _ in range(300):
                file.write(bytes(1 << 20))
    else:
        import zstandard

        with path.open("wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as file:
            for _ in range(300):
                file.write(bytes(1 << 20))
    with pytest.raises(DataError, match="bytes came out of"), plain_tar(path, tmp_path):
        pass
    write_tar(tmp_path / "src" / "good.tar", captioned("a"))
    report, samples = convert(Kind.webdataset, Source((tmp_path / "src",)), tmp_path / "out")
    assert (len(samples), report.skipped) == (1, {"damaged_shard": 1})
    with pytest.raises(DataError, match="strict"):
        build(Kind.webdataset, Source((tmp_path / "src",)), tmp_path / "out2", BuildOptions(strict=True))
    assert not list(tmp_path.glob("out*/*decompressed*"))


@pytest.mark.parametrize("cut", [0.5, 0.9])
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.zst"])
def test_damaged_tars_are_named(tmp_path: Path, suffix: str, cut: float) -> None:
    good = captioned(*(f"k{i}" for i in range(40)))
    path = write_tar(tmp_path / "src" / ("b.tar" if suffix == ".tar.zst" else f"b{suffix}"), good)
    path = compress_zstd(path) if suffix == ".tar.zst" else path
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * cut)])
    write_tar(tmp_path / "src" / "a.tar", captioned("x"))
    write_tar(tmp_path / "src" / "c.tar", captioned("y"))
    report, samples = convert(Kind.webdataset, Source((tmp_path / "src",)), tmp_path / "out")
    assert ([s.turns[1].text for s in samples], report.skipped) == (["caption x", "caption y"], {"damaged_shard": 1})


def test_evil_tars_put_nothing_anywhere(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    write_tar(tmp_path / "src" / "a.tar", {**captioned("a"), "../../x.txt": b"out", "b.txt": b"t"})
    write_tar(
        tmp_path / "src" / "b.tar",
        {**captioned("b"), "c.pyd": b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."},
    )
    report, samples = convert(Kind.webdataset, Source((tmp_path / "src",)), tmp_path / "out")
    assert [s.id.rpartition(":")[2] for s in samples] == ["a", "b"][:1] + ["b"] * (len(samples) - 1)
    assert report.skipped == {"damaged_shard": 1, "name_parent_folder": 1}
    assert not marker.exists() and not (tmp_path.parent / "x.txt").exists()


def img2dataset(folder: Path, number: int, keys: list[str], successes: int | None = None) -> None:
    write_tar(folder / f"{number:05d}.tar", captioned(*keys))
    pq.write_table(
        pa.Table.from_pylist([{"key": key, "status": "success"} for key in keys]), folder / f"{number:05d}.parquet"
    )
    stats = {"count": 9, "successes": len(keys) if successes is None else successes, "status_dict": {}}
    (folder / f"{number:05d}_stats.json").write_text(json.dumps(stats))


def test_img2dataset_output(tmp_path: Path) -> None:
    source = tmp_path / "src"
    img2dataset(source, 0, ["000000000", "000000001"])
    img2dataset(source, 1, ["000010000"])
    report, samples = convert(Kind.img2dataset, Source((source,)), tmp_path / "out")
    assert [s.turns[1].text for s in samples] == ["caption 000000000", "caption 000000001", "caption 000010000"]
    index_folder(source)  # used in place: the parquet and stats files beside the tars are no concern of the stream
    data = ShardSet.open(source, "s")
    assert [data.read(i).turns for i in range(len(data))] == [s.turns for s in samples]
    (source / "00001_stats.json").unlink()
    with pytest.raises(RefusedInputError, match="--unfinished"):
        build(Kind.img2dataset, Source((source,)), tmp_path / "out2", BuildOptions())
    report, _ = convert(Kind.img2dataset, Source((source,), unfinished=True), tmp_path / "out3")
    assert report.samples == 3
    img2dataset(source, 1, ["000010000"], successes=2)
    with pytest.raises(RefusedInputError, match=r"1 samples, 00001_stats\.json says 2"):
        build(Kind.img2dataset, Source((source,)), tmp_path / "out4", BuildOptions())


def wids(folder: Path, shards: list[dict[str, Any]], **fields: Any) -> None:
    (folder / "wids-meta.json").write_text(
        json.dumps({"__kind__": "VILA-WebDataset", "wids_version": 1, "shardlist": shards, **fields})
    )


def test_wids_folders(tmp_path: Path) -> None:
    source = tmp_path / "src"
    sizes = [
        write_tar(source / name, captioned(key)).stat().st_size for name, key in (("sub/b.tar", "b"), ("a.tar", "a"))
    ]
    good = [
        {"url": "sub/b.tar", "nsamples": 1, "filesize": sizes[0]},
        {"url": "a.tar", "nsamples": 1, "filesize": sizes[1]},
    ]
    wids(source, good)
    _, samples = convert(Kind.wids, Source((source,)), tmp_path / "out")
    assert [s.turns[1].text for s in samples] == ["caption b", "caption a"]
    upstream = {"__kind__": "wids-shard-index-v1", "datasets": [{"shardlist": good[:1]}, {"shardlist": good[1:]}]}
    (source / "wids-meta.json").write_text(json.dumps(upstream))
    assert convert(Kind.wids, Source((source,)), tmp_path / "out1")[0].samples == 2
    for i, (shard, found) in enumerate(
        [
            ({**good[0], "nsamples": 2}, "1 samples, wids-meta.json says 2"),
            ({**good[0], "filesize": 5}, "wids-meta.json says 5"),
            ({**good[0], "url": "http://x/b.tar"}, "not a tar in this folder"),
            ({**good[0], "url": "pipe:cat b.tar"}, "not a tar in this folder"),
            ({**good[0], "url": "../b.tar"}, "not a tar in this folder"),
            ({**good[0], "url": "c.tar"}, "missing"),
            ({"url": "sub/b.tar"}, "not a usable wids index"),
        ]
    ):
        wids(source, [shard])
        with pytest.raises(RefusedInputError, match=found):
            build(Kind.wids, Source((source,)), tmp_path / f"bad{i}", BuildOptions())


def test_caption_sidecars_by_url_and_by_key(tmp_path: Path) -> None:
    source, captions = tmp_path / "src", tmp_path / "captions"
    write_tar(source / "sub/0.tar", captioned("a", "b", "c"))
    write_tar(
        source / "v.tar",
        {
            "k1.mp4": mux_frames([picture(1)]),
            "k1.txt": b"old",
            "d/k2.mp4": mux_frames([picture(2)]),
            "d/k2.txt": b"old",
        },
    )
    (captions / "sub").mkdir(parents=True)
    (captions / "sub/0.tar.json").write_text(
        json.dumps({"http://x/a": {"output": "new a"}, "http://x/c": {"output": 5}})
    )
    (captions / "v.json").write_text(
        json.dumps({"/k1": {"summary": {"output": "clip 1"}}, "d/k2": {"summary": {"output": "clip 2"}}})
    )
    report, samples = convert(Kind.webdataset, Source((source,), captions=(captions,)), tmp_path / "out")
    assert [s.turns[1].text for s in samples] == ["new a", "clip 1", "clip 2"]
    # A miss is never the old caption.
    assert report.skipped == {"missing_caption": 1, "json_fields": 1}
    with pytest.raises(DataError, match="missing_caption"):
        build(Kind.webdataset, Source((source,), captions=(captions,)), tmp_path / "out2", BuildOptions(strict=True))
    assert [wids_key(k) for k in ("a", "d/a", "./sa_1")] == ["/a", "d/a", "./sa_1"]


def test_sam_takes_captions_by_place(tmp_path: Path) -> None:
    source, short, long = (tmp_path / name for name in ("src", "short", "long"))
    members = {}
    for i in range(4):
        members |= {
            f"./sa_{i}.jpg": picture(i, "JPEG"),
            f"./sa_{i}.json": json.dumps({"image": {"width": 6}, "annotations": [{"area": 1}]}).encode(),
        }
    members["./sa_1.txt.jpg"] = b""
    del members["./sa_1.jpg"]  # a sample without its picture keeps its number
    write_tar(source / "sa_000000.tar", members)
    with pytest.raises(RefusedInputError, match="--captions"):
        build(Kind.sam, Source((source,)), tmp_path / "none", BuildOptions())
    for folder, word in ((short, "short"), (long, "long")):
        folder.mkdir()
        table = {f"/elsewhere/sam/sa_000000.tar/{i}": {"output": f"{word} {i}"} for i in (0, 2, 3)}
        (folder / "sa_000000.tar.json").write_text(json.dumps(table))
    report, samples = convert(Kind.sam, Source((source,), captions=(short,)), tmp_path / "out")
    assert [(s.id.rpartition(":")[2], s.turns[1].text) for s in samples] == [
        ("sa_0", "short 0"),
        ("sa_2", "short 2"),
        ("sa_3", "short 3"),
    ]
    assert sum(report.skipped.values()) == 1
    _, samples = convert(Kind.sam, Source((source,), captions=(short, long)), tmp_path / "both")
    assert samples[0].turns[1].text == "### Short description: \nshort 0 \n\n### Long description: \nlong 0"
    write_tar(tmp_path / "odd/sa_000000.tar", {f"{i}.jpg": picture(i, "JPEG") for i in (3, 0)})
    _, odd = convert(Kind.sam, Source((tmp_path / "odd",), captions=(short,)), tmp_path / "odd-out")
    assert odd[0].turns[1].text == "short 0"  # the first of the shard, though its key is 3
    table["/other/sa_000000.tar/2"] = {"output": "x"}
    (short / "sa_000000.tar.json").write_text(json.dumps(table))
    with pytest.raises(RefusedInputError, match="two captions for sample 2"):
        build(Kind.sam, Source((source,), captions=(short,)), tmp_path / "twice", BuildOptions())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows", "tars", "pickles"])
def test_a_killed_conversion_continues_to_the_same_bytes(tmp_path: Path, name: str) -> None:
    """Killed with -9 at any moment of a real process, and started again."""
    seed = random.randrange(2**32)
    print("seed", seed)
    source = tmp_path / "src"
    source.mkdir()
    rows = [{"id": i, "text": f"t{i}", "image": base64.b64encode(picture(i % 256)).decode()} for i in range(300)]
    if name == "rows":
        table = [{"caption": f"t{i}", "image": {"bytes": picture(i % 256), "path": None}} for i in range(300)]
        pq.write_table(pa.Table.from_pylist(table), source / "a.parquet")
    elif name == "tars":
        write_tar(source / "a.tar.gz", captioned(*(f"k{i:03d}" for i in range(300)), "bad.x"))
    else:
        (source / "a.pkl").write_bytes(pickle.dumps(rows))
        (source / "a.count").write_text("300")
    kind = {"rows": "parquet", "tars": "webdataset", "pickles": "coyo-pkl"}[name]
    words = [sys.executable, "-c", "from mmscale.data_tools.cli import main; main()", "convert", str(source)]
    words += ["--from", kind, "--shard-samples", "20", "--out"]
    subprocess.run([*words, str(tmp_path / "whole")], check=True, capture_output=True)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len(whole) == 32
    for after in sorted(random.Random(seed).sample(range(1, 14), 2)):
        running = subprocess.Popen([*words, str(tmp_path / "out")], stdout=subprocess.DEVNULL)
        while running.poll() is None and not (tmp_path / f"out/{after:06d}.idx").exists():
            time.sleep(0.001)
        running.kill()
        running.wait()
    subprocess.run([*words, str(tmp_path / "out")], check=True, capture_output=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == whole


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    for kind, source in (
        (Kind.llava, Source((tmp_path,), captions=(tmp_path,))),
        (Kind.webdataset, Source((tmp_path,), tmp_path)),
        (Kind.webdataset, Source((tmp_path,), unfinished=True)),
        (Kind.folder, Source((tmp_path,), placement=Placement.front)),
        (Kind.coyo_pkl, Source((tmp_path,), rename=True)),
    ):
        with pytest.raises(ConfigError, match="has no effect"):
            build(kind, source, tmp_path / "out", BuildOptions())


def test_a_folder_of_row_files(tmp_path: Path) -> None:
    for name, text in (("b.jsonl", '{"text": "second"}'), ("a.json", '[{"text": "first"}]'), ("c.md", "x")):
        (tmp_path / "src").mkdir(exist_ok=True)
        (tmp_path / "src" / name).write_text(text)
    _, samples = convert(Kind.jsonl, Source((tmp_path / "src",)), tmp_path / "out")
    assert [s.turns[0].text for s in samples] == ["first", "second"]
    (tmp_path / "none").mkdir()
    with pytest.raises(RefusedInputError, match="found none"):
        build(Kind.jsonl, Source((tmp_path / "none",)), tmp_path / "out2", BuildOptions())


@pytest.mark.slow
def test_a_list_of_200_000_rows_is_streamed(tmp_path: Path) -> None:
    """60 MB in one JSON list, in a fresh process: memory grows by a few MB (2 MB measured), not by the file's size."""
    filler = "".join(random.Random(0).choices("abcdefghij ", k=150))
    path = tmp_path / "a.json"
    with path.open("w") as whole:
        for i in range(200_000):
            row = json.dumps({"id": i, "conversations": turns(f"question {i} {filler}", "answer")})
            whole.write(("," if i else "[") + row + "\n")
        whole.write("]")
    code = (
        "import sys; from pathlib import Path\n"
        "from mmscale.data_tools.build import READERS\n"
        "from mmscale.data_tools.readers.items import Source; from mmscale.data_tools.kinds import Kind\n"
        "def kb(name): return int(Path('/proc/self/status').read_text().split(name + ':')[1].split()[0])\n"
        "Path('/proc/self/clear_refs').write_text('5')\n"  # the peak starts anew
        "before = kb('VmRSS')\n"
        "n = sum(item.members is not None for item in READERS[Kind.llava](Source((Path(sys.argv[1]),))))\n"
        "print(n, (kb('VmHWM') - before) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    number, grown_mb = done.stdout.split()
    print(f"{path.stat().st_size / 2**20:.0f} MB read, memory grew by {grown_mb} MB")
    assert int(number) == 200_000 and float(grown_mb) < 24


def test_nothing_is_taken_twice(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "w" / "a.tar", captioned("a"))
    wids(tmp_path / "w", [{"url": "a.tar", "nsamples": 1}] * 2)
    for kind, paths in ((Kind.wids, [tmp_path / "w"]), (Kind.webdataset, [tar, tmp_path / "w" / ".." / "w" / "a.tar"])):
        with pytest.raises(RefusedInputError, match=r"a\.tar: given twice"):
            build(kind, Source(tuple(paths), rename=True), tmp_path / "out", BuildOptions())
    with pytest.raises(RefusedInputError, match=r"nowhere: .*check --captions"):
        build(Kind.webdataset, Source((tar,), captions=(tmp_path / "nowhere",)), tmp_path / "out", BuildOptions())
    assert not (tmp_path / "out").exists()


def test_damage_inside_a_compressed_tar_is_told_by_its_own_name(tmp_path: Path) -> None:
    plain = write_tar(tmp_path / "a.tar", captioned("a", "b")).read_bytes()
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "b.tar.gz").write_bytes(gzip.compress(plain[: len(plain) // 2]))
    write_tar(tmp_path / "src" / "c.tar", captioned("c"))
    convert(Kind.webdataset, Source((tmp_path / "src",)), tmp_path / "out")
    listed = json.loads((tmp_path / "out" / "skipped.jsonl").read_text())
    assert listed["detail"].startswith(f"{tmp_path}/src/b.tar.gz: ") and ".tmp" not in listed["detail"]
