"""The command `mmscale-data`: builds from LLaVA rows and folders, and what it says about bad input."""

from __future__ import annotations

import io
import json
import os
import random
import sys
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmscale.data_tools import cli
from mmscale.data_tools.build import BuildOptions, BuildReport, OnRow, build
from mmscale.data_tools.indexing import index_folder
from mmscale.data_tools.inspection.preview import write_preview
from mmscale.data_tools.inspection.stats import count_tokens, dataset_stats
from mmscale.data_tools.inspection.verify import verify_folder
from mmscale.data_tools.kinds import Kind
from mmscale.data_tools.readers import json_rows
from mmscale.data_tools.readers.items import Source
from mmscale.data_tools.readers.json_rows import iter_rows
from mmscale.data_tools.writer import ShardWriter
from mmscale.errors import DataError, RefusedInputError
from mmscale.streaming import shards as shards_module
from mmscale.streaming.shards import ShardSet
from mmscale.streaming.tokenizer import TextTokenizer

OPTIONS = BuildOptions(max_samples=3)


def build_llava(rows: Path, media: Path, out: Path, options: BuildOptions, on_row: OnRow | None = None) -> BuildReport:
    return build(Kind.llava, Source((rows,), media), out, options, on_row)


def build_folder(source: Path, out: Path, options: BuildOptions) -> BuildReport:
    return build(Kind.folder, Source((source,)), out, options)


def picture(path: Path, size: tuple[int, int] = (6, 4), format: str = "PNG") -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (size[0], size[1], 9)).save(path, format)
    return path.read_bytes()


def turns(question: str, answer: str = "a") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture
def media(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    for i in range(3):
        picture(folder / f"coco/{i}.png", (6 + i, 4))
    soundfile.write(folder / "tone.flac", np.zeros(8000, np.float32), 16000)
    (folder / "empty.png").touch()
    (folder / "notes.txt").write_text("x")
    (tmp_path / "outside.png").write_bytes(picture(folder / "coco/3.png"))
    return folder


GOOD = [
    {"id": "1", "image": "coco/0.png", "conversations": turns("<image>\nWhat?"), "extra": [1, 2.5]},
    {"id": 2, "images": ["coco/1.png", "coco/2.png"], "conversations": turns("<image> or <image>?")},
    {"conversations": turns("Hello <image>")},
    {"image": "coco/0.png", "audio": "tone.flac", "conversations": turns("Compare.")},
    {"conversations": [{"from": "gpt", "value": "Hi!"}, *turns("Hello")]},
]
BAD = {
    "media_missing": {"image": "coco/9.png", "conversations": turns("q")},
    "media_path": {"image": "../outside.png", "conversations": turns("q")},
    "media_type": {"image": "notes.txt", "conversations": turns("q")},
    "media_empty": {"image": "empty.png", "conversations": turns("q")},
    "media_count": {"image": "coco/0.png", "conversations": turns("<image><image>")},
    "json_fields": {"image": 5, "conversations": turns("q")},
    "roles": {"conversations": turns("q")[::-1]},
}


def rows_file(tmp_path: Path, rows: list, name: str = "rows.json") -> Path:
    path = tmp_path / name
    if name.endswith("l"):
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    else:
        path.write_text(json.dumps(rows, indent=1))
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Exit code of the command line, run in this process as the entry point does."""
    monkeypatch.setattr(sys, "argv", ["mmscale-data", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_llava_rows_become_samples(tmp_path: Path, media: Path, name: str) -> None:
    report = build_llava(rows_file(tmp_path, GOOD, name), media, tmp_path / "out", OPTIONS)
    assert (report.rows, report.samples, report.skipped, report.dropped_turns) == (5, 5, Counter(), 1)
    data = ShardSet.open(tmp_path / "out", "src")
    assert [len(shard) for shard in data.shards] == [3, 2]
    samples = [data.read(i) for i in range(5)]
    assert [s.turns[0].text for s in samples] == [
        "<image>\nWhat?",
        "<image> or <image>?",
        "Hello <image>",
        "<image>\n<audio>\nCompare.",
        "Hello",
    ]
    files = [["coco/0.png"], ["coco/1.png", "coco/2.png"], [], ["coco/0.png", "tone.flac"], []]
    assert [[m.data for m in s.media] for s in samples] == [
        [(media / f).read_bytes() for f in names] for names in files
    ]
    kept = json.loads(dict(data.members(0))["json"])
    assert kept == GOOD[0]


def test_bad_rows_are_counted_named_and_do_not_touch_their_neighbours(tmp_path: Path, media: Path) -> None:
    rows = [row for bad in BAD.values() for row in (GOOD[0], bad)] + [GOOD[1], 7, [], None, {"image": "coco/0.png"}]
    report = build_llava(rows_file(tmp_path, rows), media, tmp_path / "out", OPTIONS)
    assert report.samples == len(BAD) + 1
    assert report.skipped == Counter({**dict.fromkeys(BAD, 1), "json_fields": 5})
    assert report.rows == len(rows)
    listed = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in listed] == [*BAD, *["json_fields"] * 4]
    assert [line["row"] for line in listed] == [1, 3, 5, 7, 9, 11, 13, 15, 16, 17, 18]
    text = rows_file(tmp_path, rows).read_text().splitlines()
    assert "9.png" not in text[listed[0]["line"] - 1] and "9.png" in text[listed[0]["line"]]
    data = ShardSet.open(tmp_path / "out", "src")
    assert [data.read(i).turns[0].text for i in range(len(data))] == ["<image>\nWhat?"] * len(BAD) + [
        "<image> or <image>?"
    ]


@pytest.mark.parametrize(
    "name",
    [
        "/etc/hostname.png",
        "coco/../../outside.png",
        "file:///x.png",
        "http://127.0.0.1/x.png",
        "C:\\x.png",
        "~/x.png",
        "a\0.png",
        "..\\outside.png",
    ],
)
def test_no_path_leads_outside_the_media_folder(tmp_path: Path, media: Path, name: str) -> None:
    report = build_llava(
        rows_file(tmp_path, [{"image": name, "conversations": turns("q")}]), media, tmp_path / "out", OPTIONS
    )
    assert report.skipped == {"media_path": 1}


def test_no_link_leads_outside_the_media_folder(tmp_path: Path, media: Path) -> None:
    (media / "out.png").symlink_to(tmp_path / "outside.png")
    (media / "away").symlink_to(tmp_path)
    (media / "in.png").symlink_to("coco/0.png")
    (tmp_path / "alias").symlink_to(media)
    names = ("out.png", "away/outside.png", "in.png")
    rows = rows_file(tmp_path, [{"image": name, "conversations": turns("q")} for name in names])
    report = build_llava(rows, tmp_path / "alias", tmp_path / "out", OPTIONS)
    assert (report.samples, report.skipped) == (1, {"media_path": 2})


def test_a_refused_build_leaves_nothing(tmp_path: Path, media: Path) -> None:
    cut = tmp_path / "cut.json"
    cut.write_text("[{")
    with pytest.raises(RefusedInputError, match="line 1"):
        build_llava(cut, media, tmp_path / "new" / "out", OPTIONS)
    assert not (tmp_path / "new").exists()
    (tmp_path / "kept").mkdir()
    with pytest.raises(RefusedInputError, match="line 1"):
        build_llava(cut, media, tmp_path / "kept", OPTIONS)
    assert tree(tmp_path / "kept") == {}
    rows = rows_file(tmp_path, [*GOOD[:4], BAD["roles"]])
    with pytest.raises(DataError, match="roles"):
        build_llava(rows, media, tmp_path / "part", BuildOptions(max_samples=3, strict=True))
    assert list(tree(tmp_path / "part")) == ["000000.idx", "000000.tar"]  # whole shards stay, to be continued


@pytest.mark.parametrize("bad", BAD)
def test_strict_stops_at_the_first_bad_row(tmp_path: Path, media: Path, bad: str) -> None:
    with pytest.raises(DataError, match=rf"file rows.json, row 1, line \d+: {bad}"):
        build_llava(rows_file(tmp_path, [GOOD[0], BAD[bad]]), media, tmp_path / "out", BuildOptions(strict=True))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_killed_build_continues_to_the_same_bytes(
    tmp_path: Path, media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_file(tmp_path, [GOOD[i % 5] if i % 4 else BAD["roles"] for i in range(20)])
    build_llava(rows, media, tmp_path / "whole", OPTIONS)
    whole = tree(tmp_path / "whole")
    seed = random.randrange(2**32)
    print("seed", seed)
    for stop in random.Random(seed).sample(range(1, 20), 4):

        def kill(row: int, stop: int = stop) -> None:
            if row == stop:
                raise KeyboardInterrupt

        out = tmp_path / f"out{stop}"
        with pytest.raises(KeyboardInterrupt):
            build_llava(rows, media, out, OPTIONS, kill)
        assert not (out / "manifest.json").exists()
        read: list[str] = []
        real = Path.read_bytes
        done = len(list(out.glob("*.idx")))
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", lambda self, real=real, read=read: read.append(self.name) or real(self))
            build_llava(rows, media, out, OPTIONS)
        assert tree(out) == whole
        if done == 5:
            assert not any(name.endswith(".png") for name in read)


def test_folder_of_captioned_images(tmp_path: Path) -> None:
    source = tmp_path / "src"
    first = picture(source / "b/x.y.png")
    second = picture(source / "a.jpg", (9, 9), "JPEG")
    (source / "b/x.y.txt").write_text("Ein <image> Bär")
    (source / "a.caption").write_text("A bear")
    picture(source / "lonely.png")
    (source / "nothing.txt").write_text("no image")
    picture(source / "latin.png")
    (source / "latin.txt").write_bytes(b"caf\xe9")
    picture(source / "both.png")
    (source / "both.txt").write_text("one")
    (source / "both.caption").write_text("two")
    (source / "README.md").write_text("ignored")
    report = build_folder(source, tmp_path / "out", OPTIONS)
    assert report.samples == 2
    assert report.skipped == {"missing_text": 2, "missing_media": 1, "text_utf8": 1}
    data = ShardSet.open(tmp_path / "out", "src")
    samples = [data.read(i) for i in range(2)]
    assert [(s.turns[0].text, s.turns[1].text, s.media[0].data) for s in samples] == [
        ("<image>\n", "A bear", second),
        ("<image>\n", "Ein <image> Bär", first),
    ]
    assert json.loads(dict(data.members(1))["json"]) == {"file": "b/x.y.png"}
    with pytest.raises(RefusedInputError, match="inside the source"):
        build_folder(source, source / "out", OPTIONS)
    (tmp_path / "none").mkdir()
    with pytest.raises(RefusedInputError, match="expected images"):
        build_folder(tmp_path / "none", tmp_path / "out2", OPTIONS)


def test_captions_are_found_in_any_case_and_odd_names_are_counted(tmp_path: Path) -> None:
    source = tmp_path / "src"
    image = picture(source / "A.PNG")
    (source / "A.TXT").write_text("upper")
    (source / "B.Caption").write_text("an orphan")
    odd = os.fsencode(source) + b"/caf\xe9"
    Path(os.fsdecode(odd + b".png")).write_bytes(image)
    Path(os.fsdecode(odd + b".txt")).write_text("a caption")
    Path(os.fsdecode(odd + b"2.txt")).write_text("an orphan")
    report = build_folder(source, tmp_path / "out", OPTIONS)
    assert (report.samples, report.skipped) == (1, {"missing_media": 2, "name_not_utf8": 1})
    sample = ShardSet.open(tmp_path / "out", "src").read(0)
    assert (sample.turns[1].text, sample.media[0].data) == ("upper", image)
    listed = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text("utf-8").splitlines()]
    assert {line["file"] for line in listed} == {"B.Caption", "caf\\udce9.png", "caf\\udce92.txt"}


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.json", b"", "line 1: .*nothing"),
        ("a.json", b'{"a": 1}', r"line 1: .*\.jsonl"),
        ("a.json", b"\n\n5", "line 3: .*list should begin"),
        ("a.json", b'[{"a": 1},\n{"a": }]', "line 2: .*Expecting value"),
        ("a.json", b'[{"a": 1}\n{"a": 2}]', "line 2: .*after a row"),
        ("a.json", b'[{"a": 1},\n]', "line 2: .*Expecting value"),
        ("a.json", b'[{"a": 1},\n\n', "line 3: .*Expecting value"),
        ("a.json", b'[{"a": 1}\n', "line 2: .*cut off"),
        ("a.json", b'[{"a": 1}]\nx', "line 2: .*more text"),
        ("a.json", b'[\n{"a": "caf\xe9"}]', "line [12]: .*UTF-8"),
        ("a.json", b"[" + b"[" * 100_000, "nested"),
        ("a.csv", b"", "ends in .json"),
    ],
)
def test_files_that_are_no_rows(tmp_path: Path, name: str, content: bytes, found: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RefusedInputError, match=found):
        list(iter_rows(tmp_path / name))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": ', "json_syntax"),
        (b"{} {}", "json_syntax"),
        (b'{"a": "\xff"}', "json_utf8"),
        (b"[" * 100_000, "json_syntax"),
        (b'"' + b"x" * 900 + b'"', "json_size"),
    ],
)
def test_a_broken_line_is_one_skip(
    tmp_path: Path, media: Path, line: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason == "json_size":
        monkeypatch.setattr(json_rows, "MAX_BYTES", 300)
    good = json.dumps({"conversations": turns("q")}).encode()
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([good, b"", line, good]))
    report = build_llava(path, media, tmp_path / "out", OPTIONS)
    assert (report.samples, report.skipped) == (2, {reason: 1})
    listed = json.loads((tmp_path / "out" / "skipped.jsonl").read_text())
    assert [listed[name] for name in ("file", "row", "line", "reason")] == ["rows.jsonl", 1, 3, reason]
    with pytest.raises(DataError, match=f"file rows.jsonl, row 1, line 3: {reason}"):
        build_llava(path, media, tmp_path / "strict", BuildOptions(strict=True))


@pytest.mark.parametrize("chunk", [1, 1 << 20])
@pytest.mark.parametrize(("name", "text"), [("a.json", '[{"a": 1}]'), ("a.jsonl", '{"a": 1}\n')])
def test_a_byte_order_mark_is_passed_over(
    tmp_path: Path, name: str, text: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", chunk)
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert [(row.value, row.fault, row.line) for row in iter_rows(tmp_path / name)] == [({"a": 1}, None, 1)]


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
def test_rows_do_not_depend_on_the_window(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", chunk)
    values = [{"a": "é😀\n" * 9, "b": [1, {"c": None}]}, 123456, -1.5e3, "x,]", [], {}, True, {"n": "[{"}]
    for indent in (None, 3):
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(values, indent=indent, ensure_ascii=False) + "\n ")
        rows = list(iter_rows(path))
        assert [row.value for row in rows] == values
        assert [row.number for row in rows] == list(range(len(values)))
        lines = path.read_text().split("\n")
        if indent:
            assert all(lines[row.line - 1].strip()[0] == json.dumps(row.value)[0] for row in rows)
    path.write_text("[]")
    assert list(iter_rows(path)) == []


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_row_that_is_not_strict_json_is_one_skip(tmp_path: Path, media: Path, name: str) -> None:
    good = json.dumps({"conversations": turns("q")})
    bad = [
        '{"a": NaN}',
        '{"a": 1, "a": 2}',
        '{"a": 1e999}',
        '{"a": "\\ud800"}',
        '{"a": ' + "9" * 5000 + "}",
        "[" * 60 + "]" * 60,
    ]
    lines = [line for text in bad for line in (good, text)] + [good]
    path = tmp_path / name
    path.write_text("\n".join(lines) if name.endswith("l") else "[" + ",\n".join(lines) + "]")
    report = build_llava(path, media, tmp_path / "out", OPTIONS)
    assert report.samples == 7
    assert report.skipped == {"json_number": 3, "json_duplicate_key": 1, "json_text": 1, "json_depth": 1}
    listed = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [line["line"] for line in listed] == [2, 4, 6, 8, 10, 12]


def test_a_long_list_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    row = json.dumps({"conversations": turns("x" * 500)})
    path.write_text("[" + ",\n".join([row] * 20_000) + "]")
    tracemalloc.start()
    assert sum(1 for _ in iter_rows(path)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 11_000_000
    assert peak < 6_000_000


def foreign_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def img2dataset(folder: Path) -> Path:
    folder.mkdir()
    image = picture(folder.parent / "one.png", (5, 7))
    foreign_tar(folder / "00000.tar", {"0/a.png": image, "0/a.txt": b"one", "0/b.png": image, "0/b.txt": b"two"})
    foreign_tar(folder / "00001.tar", {"x.png": image, "x.txt": b"three", "../y.txt": b"", "z.png": image})
    return folder


def test_index_verify_stats_of_foreign_tars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = img2dataset(tmp_path / "d")
    assert run(monkeypatch, "index", folder) == 0
    out = capsys.readouterr().out
    assert "4 samples in 2 shards" in out and "name_parent_folder" in out
    assert [len(ShardSet.open(folder, "s")), ShardSet.open(folder, "s").id(0)] == [4, "s/00000.tar:0/a"]

    report = verify_folder(folder)
    assert (report.shards, report.indexed, report.samples) == (2, 5, 3)
    assert {(f.shard, f.reason) for f in report.findings} == {
        ("00001.tar", "name_parent_folder"),
        ("00001.tar", "missing_text"),
    }

    stats = dataset_stats(folder)
    assert (stats.samples, stats.media["image"], stats.skipped) == (3, 4, {"name_parent_folder": 1, "missing_text": 1})
    assert stats.spreads["image width, pixels"].median == 5
    assert stats.spreads["text per sample, bytes"].total == len("onetwothree") + 3 * len("<image>\n")
    assert run(monkeypatch, "stats", folder) == 0
    assert "3 samples in 2 shards" in capsys.readouterr().out


def test_verify_exits_1_with_a_table_when_something_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "d"
    with ShardWriter(folder, max_samples=2) as writer:
        for i in range(6):
            writer.write(f"{i}", {"png": picture(tmp_path / "x.png"), "txt": b"caption"})
    assert run(monkeypatch, "verify", folder) == 0
    assert "6 of 6 samples usable in 3 shards" in capsys.readouterr().out
    data = bytearray((folder / "000001.tar").read_bytes())
    data[600] ^= 1
    (folder / "000001.tar").write_bytes(data)
    assert run(monkeypatch, "verify", folder) == 1
    out = capsys.readouterr().out
    assert "4 of 6 samples usable" in out and "000001.tar" in out and "damaged" in out
    (folder / "000001.tar").unlink()
    assert run(monkeypatch, "verify", folder) == 1


def test_verify_names_media_that_cannot_be_read(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "d") as writer:
        writer.write("a", {"png": b"no picture", "txt": b"x"})
        writer.write("b", {"flac": b"no sound", "txt": b"x"})
        writer.write("c", {"png": picture(tmp_path / "x.png"), "txt": b"x"})
    report = verify_folder(tmp_path / "d")
    assert [(f.reason, f.detail[:2]) for f in report.findings] == [("media_header", "a:"), ("media_header", "b:")]
    assert report.samples == 1


def test_verify_spares_later_openings_the_hashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ShardWriter(tmp_path / "d") as writer:
        writer.write("a", {"png": picture(tmp_path / "x.png"), "txt": b"x"})
    os.utime(tmp_path / "d" / "manifest.json", (1, 1))  # as after a copy
    hashed = []
    real = shards_module.file_sha256
    monkeypatch.setattr(shards_module, "file_sha256", lambda path: hashed.append(path) or real(path))
    ShardSet.open(tmp_path / "d", "s")
    assert len(hashed) == 1
    assert not verify_folder(tmp_path / "d").findings
    ShardSet.open(tmp_path / "d", "s")
    assert len(hashed) == 1


def test_index_puts_bad_shards_aside_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    import pickle

    folder = img2dataset(tmp_path / "d")
    foreign_tar(folder / "00002.tar", {"a.txt": b"x", "a.pyd": pickle.dumps(Evil())})
    foreign_tar(folder / "00003.tar", {"a.txt": b"x", "a.pth": pickle.dumps(Evil())})
    (folder / "00004.tar").touch()
    foreign_tar(folder / "00005.tar", {})
    assert run(monkeypatch, "index", folder) == 0
    assert "shards put aside" in capsys.readouterr().out
    data = ShardSet.open(folder, "s")
    assert list(data.quarantined) == ["00002.tar", "00003.tar", "00004.tar", "00005.tar"]
    assert len(data) == 4 and data.indexed == 5
    assert run(monkeypatch, "verify", folder) == 1
    assert not marker.exists()
    (tmp_path / "none").mkdir()
    foreign_tar(tmp_path / "none" / "0.tar", {})
    with pytest.raises(RefusedInputError, match=r"no usable shard: .*without any"):
        index_folder(tmp_path / "none")


def test_preview_shows_pictures_sound_and_faults(tmp_path: Path, media: Path) -> None:
    rows = rows_file(tmp_path, [*GOOD, {"image": "coco/0.png", "conversations": turns("long " * 900)}])
    build_llava(rows, media, tmp_path / "out", OPTIONS)
    assert write_preview(tmp_path / "out", tmp_path / "p" / "preview.png", num=50) == 6
    with Image.open(tmp_path / "p" / "preview.png") as sheet:
        assert sheet.format == "PNG" and sheet.width == 1000
        # Row 0 shows coco/0.png, whose colour is (6, 4, 9), in the middle of its first thumbnail.
        assert sheet.convert("RGB").getpixel((64, 64)) == (6, 4, 9)
    with ShardWriter(tmp_path / "bad") as writer:
        writer.write("a", {"png": b"no picture", "txt": b"x"})
        writer.write("b", {"png": b"x"})
    assert write_preview(tmp_path / "bad", tmp_path / "bad.png") == 2
    with pytest.raises(RefusedInputError, match="--num"):
        write_preview(tmp_path / "out", tmp_path / "x.png", num=0)


def test_preview_counts_text_tokens(tmp_path: Path, media: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.add_special_tokens(["<end>"])
    (tmp_path / "tok").mkdir()
    backend.save(str(tmp_path / "tok/tokenizer.json"))
    (tmp_path / "tok/tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    build_llava(rows_file(tmp_path, GOOD[:1]), media, tmp_path / "out", OPTIONS)
    sample = ShardSet.open(tmp_path / "out", "s").read(0)
    assert count_tokens([sample], TextTokenizer.load(tmp_path / "tok"))[0] == len("\nWhat?") + len("a")
    assert write_preview(tmp_path / "out", tmp_path / "x.png", tokenizer=tmp_path / "tok") == 1


def test_index_of_written_shards_is_what_the_writer_wrote(tmp_path: Path, media: Path) -> None:
    build_llava(rows_file(tmp_path, GOOD), media, tmp_path / "out", OPTIONS)
    before = tree(tmp_path / "out")
    index_folder(tmp_path / "out")
    assert tree(tmp_path / "out") == before


def test_errors_are_one_line_with_the_exit_code(
    tmp_path: Path, media: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    rows, out = rows_file(tmp_path, GOOD), tmp_path / "out"
    bad = rows_file(tmp_path, [BAD["roles"]], "bad.json")
    (tmp_path / "cut.json").write_text("[{")
    (tmp_path / "file").touch()
    cases = [
        (2, "--media", ["build", "--from", "llava", rows, "--out", out]),
        (2, "none.json", ["build", "--from", "llava", tmp_path / "none.json", "--media", media, "--out", out]),
        (2, "nowhere", ["build", "--from", "llava", rows, "--media", tmp_path / "nowhere", "--out", out]),
        (2, "line 1", ["build", "--from", "llava", tmp_path / "cut.json", "--media", media, "--out", out]),
        (1, "row 0", ["build", "--from", "llava", bad, "--media", media, "--out", out, "--strict"]),
        (2, "found a file", ["build", "--from", "llava", rows, "--media", media, "--out", tmp_path / "file"]),
        (2, "found a file", ["build", "--from", "llava", rows, "--media", media, "--out", tmp_path / "file" / "x"]),
        (2, "nowhere", ["index", tmp_path / "nowhere"]),
        (2, "no .tar", ["index", media]),
        (2, "manifest.json", ["verify", media]),
        (2, "manifest.json", ["stats", media]),
        (2, "manifest.json", ["preview", media]),
        (2, "one folder", ["preview", media, media]),
        (2, "ends with .png", ["preview", media, "--out", tmp_path / "x.gif"]),
        (2, "", ["build", "--from", "nothing", rows, "--out", out]),
    ]
    for code, found, words in cases:
        assert run(monkeypatch, *words) == code, words
        error = capsys.readouterr().err
        assert "Traceback" not in error
        if found:
            assert found in error and error.startswith("mmscale-data: ") and error.count("\n") == 1, words
    assert run(monkeypatch, "build", "--from", "llava", rows, "--media", media, "--out", out) == 0
    assert "5 rows = 5 samples + 0 skipped" in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    import subprocess

    code = (
        "import sys; sys.argv = ['mmscale-data', '--help']\n"
        "from mmscale.data_tools.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('numpy', 'torch', 'PIL', 'webdataset', 'soundfile', 'pydantic') if m in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.stderr.strip() == "[]"
    assert all(name in result.stdout for name in ("build", "index", "verify", "stats", "preview", "demo"))
