"""Pickles are read without being loaded: plain lists come out whole, everything else is refused and nothing runs."""

from __future__ import annotations

import base64
import os
import pickle
import random
import struct
import subprocess
import sys
import tracemalloc
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmscale.data_tools.build import BuildOptions, build
from mmscale.data_tools.kinds import Kind
from mmscale.data_tools.readers import pickles
from mmscale.data_tools.readers.items import Source
from mmscale.data_tools.readers.pickles import iter_pickled_list
from mmscale.data_tools.readers.read_pickles import interleave
from mmscale.errors import RefusedInputError
from mmscale.streaming.shards import ShardSet


def picture(shade: int) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (4, 3), (shade, 0, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def saved(tmp_path: Path, data: bytes, name: str = "part-00000.pkl") -> Path:
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


def plain_value(rng: random.Random, depth: int = 0) -> Any:
    """Any value that a sample may hold; texts repeat, so that the pickler refers back to them."""
    kind = rng.randrange(9 if depth < 4 else 7)
    texts = ["", "url", "é漢😀\n", "a'b\\", "x" * 300]
    simple = (
        None,
        True,
        False,
        rng.randrange(-(2**70), 2**70),
        rng.random() * 1e9,
        rng.choice(texts),
        rng.randbytes(rng.randrange(300)),
    )
    if kind < 7:
        return simple[kind]
    if kind == 7:
        return [plain_value(rng, depth + 1) for _ in range(rng.randrange(5))]
    return {text: plain_value(rng, depth + 1) for text in rng.sample(texts, rng.randrange(5))}


@pytest.mark.parametrize("protocol", range(6))
def test_plain_lists_of_every_protocol(tmp_path: Path, protocol: int) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for size in (0, 1, 3, 2500):
        value = [plain_value(rng) for _ in range(size)]
        if protocol < 3:  # bytes are made by a function call there
            value = [
                None if b"bytes" in (data := pickle.dumps(item, protocol)) or b"codecs" in data else item
                for item in value
            ]
        assert list(iter_pickled_list(saved(tmp_path, pickle.dumps(value, protocol)))) == value


class Evil:
    def __init__(self, function: object, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


def evil_pickles(marker: Path) -> dict[str, bytes]:
    command = f"touch {marker}"
    good = pickle.dumps([{"a": 1}], 4)
    return {
        "os.system": pickle.dumps([Evil(os.system, command)]),
        "subprocess": pickle.dumps([Evil(subprocess.call, ["touch", str(marker)])]),
        "eval, protocol 0": pickle.dumps([Evil(eval, f"__import__('os').system({command!r})")], 0),
        "after good rows": pickle.dumps([*({"a": i} for i in range(3)), Evil(os.system, command)], 2),
        "global": b"cos\nsystem\n(S'" + command.encode() + b"'\ntR.",
        "inst": b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        "persistent": b"(lp0\nPx\na.",
        "extension": b"\x80\x04]\x82\x01a.",
        "tuple": pickle.dumps([(1, 2)]),
        "set": pickle.dumps([{1, 2}], 4),
        "bytearray": pickle.dumps([bytearray(b"x")], 5),
        "numbers as keys": pickle.dumps([{1: 2}]),
        "not a list": pickle.dumps({"a": 1}),
        "cut off": good[:-4],
        "empty": b"",
        "junk": b"\x89PNG" * 40,
        "itself": b"\x80\x04]\x94h\x00a.",
        "bytes of 2^62": b"\x80\x04]B" + struct.pack("<I", 2**31) + b"x.",
        "bytes8 of 2^62": b"\x80\x04]\x8e" + struct.pack("<Q", 2**62) + b"x.",
        "frame, text of 2^60": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"]\x8d" + struct.pack("<Q", 2**60) + b"x.",
        "a number of 2^31 bytes": b"\x80\x04]\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
        "a negative size": b"\x80\x04]\x8b" + struct.pack("<i", -5) + b"x.",
        "no mark": b"\x80\x04]e.",
        "an empty stack": b"\x80\x04a.",
        "nothing remembered": b"\x80\x04]h\x07a.",
    }


def laughs() -> bytes:
    """Lists of ten references to the list before: 10^9 numbers in 200 bytes."""
    data = b"\x80\x04](]\x94(" + b"K\x01" * 10 + b"e"
    for level in range(9):
        data += b"]\x94(" + bytes([ord("h"), level]) * 10 + b"e"
    return data + b"e."


@pytest.mark.parametrize("name", [*evil_pickles(Path("x")), "laughs"])
def test_anything_else_is_refused_and_nothing_runs(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "marker"
    data = laughs() if name == "laughs" else evil_pickles(marker)[name]
    monkeypatch.setattr(pickles, "MAX_WORK", 200_000)
    tracemalloc.start()
    with pytest.raises(RefusedInputError, match=r"part-00000\.pkl"):
        list(iter_pickled_list(saved(tmp_path, data)))
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    assert not marker.exists()


def test_what_stands_in_two_places(tmp_path: Path) -> None:
    text, turns = "x" * 9000, [{"a": [1, "b"]}]
    rows = [{"text": text, "turns": turns, "again": turns} for _ in range(20)]
    read = list(iter_pickled_list(saved(tmp_path, pickle.dumps(rows))))
    assert read == rows
    read[0]["turns"][0]["a"].append("only here")
    assert read[1:] == rows[1:]


def test_the_evil_pickles_are_evil(tmp_path: Path) -> None:
    """Negative control: loaded, the first one does run."""
    marker = tmp_path / "marker"
    pickle.loads(evil_pickles(marker)["os.system"])
    assert marker.exists()


@pytest.mark.parametrize(
    "unit",
    [b"]", b"(", b"N", b"]\x94", b"N\x94", b"\x8c\xff" + b"x" * 255 + b"\x94" + b"h\x01" * 400, b"h\x00"],
    ids=["lists", "marks", "values", "kept lists", "kept values", "kept text", "texts again"],
)
def test_small_files_take_no_large_memory(tmp_path: Path, unit: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, limit in (("MAX_WORK", 20_000), ("MAX_STACK", 10_000), ("MAX_MEMO", 10_000)):
        monkeypatch.setattr(pickles, name, limit)
    path = saved(tmp_path, b"\x80\x04](\x8c\xff" + b"y" * 255 + b"\x94" + unit * 60_000 + b"e.")
    tracemalloc.start()
    with pytest.raises(RefusedInputError, match="more operations"):
        list(iter_pickled_list(path))
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_deep_rows_are_one_skip(tmp_path: Path) -> None:
    data = b"\x80\x04](" + b"}\x8c\x04text" * 1 + b"]" * 5000 + b"a" * 4999 + b"s" + b"e."
    saved(tmp_path, data)
    (tmp_path / "part-00000.count").write_text("1")
    report = build(Kind.coyo_pkl, Source((tmp_path / "part-00000.pkl",)), tmp_path / "out", BuildOptions())
    assert report.skipped == {"json_fields": 1}


def test_a_large_pickle_is_streamed(tmp_path: Path) -> None:
    """60 MB of pictures: a row at a time and nothing kept, where loading takes all of them."""
    rows = [{"id": i, "image": base64.b64encode(random.Random(i).randbytes(45_000)).decode()} for i in range(1000)]
    path = saved(tmp_path, pickle.dumps(rows, 4))
    del rows
    tracemalloc.start()
    assert sum(len(row["image"]) for row in iter_pickled_list(path)) == 60_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The pickler gives up to 1,000 elements at once; only they are held.
    assert peak < 1.2 * path.stat().st_size


def coyo(i: int, **fields: object) -> dict[str, object]:
    return {
        "id": i,
        "url": f"http://x/{i}",
        "text": f"caption {i} <image>",
        "clip_sim": 0.3,
        "image": base64.b64encode(picture(i)).decode(),
        **fields,
    }


def build_pickles(tmp_path: Path, kind: Kind, rows: list, count: object = None) -> tuple[ShardSet, dict[str, int]]:
    source = tmp_path / "src"
    source.mkdir()
    saved(source, pickle.dumps(rows))
    (source / "part-00000.count").write_text(str(len(rows) if count is None else count))
    report = build(kind, Source((source,)), tmp_path / "out", BuildOptions())
    assert report.rows == len(rows)
    return ShardSet.open(tmp_path / "out", "s"), dict(report.skipped)


def test_coyo_rows(tmp_path: Path) -> None:
    raw = {k: v for k, v in coyo(3).items() if k not in ("image", "text")}
    rows = [
        coyo(1),
        {**raw, "rawbytes": picture(3), "caption": "by bytes"},
        coyo(4, text=None),
        coyo(5, image="%%%"),
        coyo(6, image="QUJD"),
        7,
        coyo(8),
    ]
    data, skipped = build_pickles(tmp_path, Kind.coyo_pkl, rows)
    assert skipped == {"json_fields": 2, "media_type": 2}
    samples = [data.read(i) for i in range(len(data))]
    # A literal `<image>` in a caption is plain text.
    assert [(s.turns[0].text, s.turns[1].text, s.media[0].data) for s in samples] == [
        ("<image>\n", "caption 1 <image>", picture(1)),
        ("<image>\n", "by bytes", picture(3)),
        ("<image>\n", "caption 8 <image>", picture(8)),
    ]
    about = dict(data.members(0))["json"]
    assert b'"url":"http://x/1"' in about and b"clip_sim" in about and b'"image"' not in about


def image_info(shade: int, place: object) -> dict[str, object]:
    return {
        "image_name": f"{shade}.png",
        "matched_text_index": place,
        "matched_sim": 0.2,
        "image_base64": base64.b64encode(picture(shade)).decode(),
    }


def test_mmc4_documents(tmp_path: Path) -> None:
    sentences = ["One.", "Two <image>.", "Three."]
    rows = [
        {
            "text_list": sentences,
            "image_info": [image_info(1, 2), image_info(2, 0), image_info(3, 2)],
            "similarity_matrix": [[0.1]],
            "url": "u",
        },
        {"text_list": sentences, "image_info": []},
        {"text_list": sentences, "image_info": [image_info(i, 0) for i in range(8)]},
        {"text_list": sentences, "image_info": [image_info(1, 3)]},
        {"text_list": [5], "image_info": []},
        {"text_list": [], "image_info": []},
    ]
    data, skipped = build_pickles(tmp_path, Kind.mmc4_pkl, rows)
    assert skipped == {"json_fields": 2, "empty_text": 1}
    first, text_only, many = (data.read(i) for i in range(3))
    assert first.turns[0].role == "document"
    # Images in the order of their sentences, an image of the last sentence is kept.
    assert first.turns[0].text == "<image>\nOne. Two <IMAGE>.<image>\n<image>\nThree."
    assert [m.data for m in first.media] == [picture(2), picture(1), picture(3)]
    assert (text_only.turns[0].text, text_only.media) == ("One. Two <IMAGE>. Three.", ())
    assert [m.data for m in many.media] == [picture(i) for i in range(6)]
    assert b"image_base64" not in dict(data.members(0))["json"] and b'"url":"u"' in dict(data.members(0))["json"]


def test_interleave() -> None:
    assert interleave(["a", "b"], []) == "a b"
    assert interleave(["a", "b"], [0]) == "<image>\na b"
    assert interleave(["a", "b"], [0, 1]) == "<image>\na<image>\nb"


@pytest.mark.parametrize("count", [1, 3, "many", ""])
def test_the_count_file_must_agree(tmp_path: Path, count: object) -> None:
    with pytest.raises(RefusedInputError, match=r"part-00000\.count"):
        build_pickles(tmp_path, Kind.coyo_pkl, [coyo(1), coyo(2)], count)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_nothing_is_imported_by_name(tmp_path: Path) -> None:
    """A pickle that names a module that is not loaded yet does not load it."""
    path = saved(tmp_path, b"\x80\x04](cthis\ns\ne.")
    code = (
        "import sys; from pathlib import Path; from mmscale.data_tools.readers.pickles import iter_pickled_list\n"
        "from mmscale.errors import RefusedInputError\n"
        f"try:\n list(iter_pickled_list(Path({str(path)!r})))\nexcept RefusedInputError as e: print('GLOBAL' in str(e), 'this' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
