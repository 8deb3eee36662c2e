"""The demo data set: plain WebDataset, a clean split, and answers that are true by independent measurement."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="scikit-learn (extra `demo`) is not installed")

from mmscale.data_tools.demo import load_digits, video_rows, write_demo
from mmscale.streaming.chat import encode_chat, load_template
from mmscale.streaming.decode.video import decode_video
from mmscale.streaming.rows import parse_sample
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.types import ImageSpec, VideoSpec

SCALE = 0.02


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    lines = []
    write_demo(folder, SCALE, lines.append)
    assert len(lines) == 12
    return folder


def rows(folder: Path) -> list[dict]:
    """Every row of a dataset folder as plain `webdataset` gives it."""
    import webdataset as wds

    shards = sorted(str(p) for p in folder.glob("*.tar"))
    return list(wds.WebDataset(shards, shardshuffle=False, empty_check=False))


def conversation(row: dict) -> list[tuple[str, str]]:
    return [(turn["from"], turn["value"]) for turn in json.loads(row["json"])["conversations"]]


def images(row: dict) -> list[bytes]:
    return [row[ext] for ext in sorted(row) if ext.endswith("png")]


def test_webdataset_reads_every_row(demo):
    expected = {
        "train/digits": 29, "train/compare": 20, "train/words": 16, "train/video": 10, "train/audio": 50, "train/text": 10,
        "heldout/digits": 10, "heldout/compare": 2, "heldout/words": 2, "heldout/video": 1, "heldout/audio": 6,
    }  # fmt: skip
    found = {name: rows(demo / name) for name in expected}
    assert {name: len(r) for name, r in found.items()} == expected
    for name, group in found.items():
        assert len({row["__key__"] for row in group}) == len(group)
        for row in group:
            turns = conversation(row)
            assert turns[-1][0] == "gpt" and turns[-1][1]
            media = [ext for ext in row if ext.endswith(("png", "mp4", "flac"))]
            tags = sum(len(re.findall("<image>|<video>|<audio>", text)) for who, text in turns if who == "human")
            assert tags == len(media) and (tags > 0) == ("text" not in name)
    assert {conversation(row)[0][1] for row in found["heldout/digits"]} == {"<image>\nWhich digit is this?"}


def test_no_held_out_digit_is_trained_on(demo):
    train = {png for name in ("digits", "compare") for row in rows(demo / "train" / name) for png in images(row)}
    heldout = {png for name in ("digits", "compare") for row in rows(demo / "heldout" / name) for png in images(row)}
    assert len(train) > 20 and len(heldout) == 10
    assert not train & heldout
    all_train, all_heldout = load_digits()
    assert (len(all_train), len(all_heldout)) == (1437, 360)
    assert not {d.png for d in all_train} & {d.png for d in all_heldout}


def test_digits_and_comparisons_are_answered_truly(demo):
    truth = {digit.png: digit.value for half in load_digits() for digit in half}
    turns_seen = set()
    for name in ("train/digits", "heldout/digits", "train/compare", "heldout/compare"):
        for row in rows(demo / name):
            values = [truth[png] for png in images(row)]
            turns = conversation(row)
            assert int(turns[1][1]) == max(values)
            assert len(set(values)) == len(values)
            if len(turns) == 4:
                ordinal = next(i for i, word in enumerate(("first", "second", "third")) if word in turns[2][1])
                assert int(turns[3][1]) == values[ordinal]
            turns_seen.add(len(turns))
    assert turns_seen == {2, 4}


def test_the_digit_of_a_clip_moves_as_the_answer_says(demo):
    """Measured on the frames that the recipe takes."""
    clips = [(row["mp4"], conversation(row)[1][1]) for row in rows(demo / "heldout/video")]
    clips += [(row.media[0][1], row.turns[1].text) for row in video_rows(load_digits(SCALE)[0], 60, 0)]
    for clip, answer in clips:
        frames = decode_video(clip, VideoSpec(frames=4), ImageSpec(size=32, tokens=16), 10_000).double().mean(1)
        ink = (frames - frames.flatten(1).median(1).values[:, None, None]).abs()
        centres = (ink.sum(1) * torch.arange(32)).sum(1) / ink.sum((1, 2))
        ways = centres.diff() * (1 if answer == "right" else -1)
        assert len(frames) == 4 and (ways > 0.5).all(), (answer, centres)
    assert {answer for _, answer in clips} == {"left", "right"}


def test_no_held_out_digit_moves_in_the_training_clips(monkeypatch):
    """Clips show training scans in `train` and held-out scans in `heldout`, whatever the encoder makes of them."""
    train, heldout = load_digits(SCALE)
    seen = []
    monkeypatch.setattr("mmscale.data_tools.demo._moving_digit", lambda digit, *_: seen.append(digit.png) or b"clip")
    for split, digits in enumerate((train, heldout)):
        seen.clear()
        assert len(list(video_rows(digits, 20, split))) == 20
        assert set(seen) <= {digit.png for digit in digits}


def envelope(flac: bytes) -> np.ndarray:
    """Loudness of a clip, RMS over 10 ms, per sample."""
    import soundfile

    wave, rate = soundfile.read(io.BytesIO(flac))
    assert rate == 16_000 and wave.ndim == 1 and 0 < len(wave) <= 32_000
    return np.sqrt(np.convolve(wave**2, np.ones(160) / 160, mode="same"))


def loud_parts(flac: bytes) -> list[tuple[int, int]]:
    loud = envelope(flac) > 0.025
    edges = np.flatnonzero(np.diff(np.concatenate([[0], loud.astype(int), [0]])))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a > 400]


def zero_crossings_hz(flac: bytes, part: tuple[int, int]) -> float:
    import soundfile

    wave, rate = soundfile.read(io.BytesIO(flac))
    middle = wave[part[0] + 400 : part[1] - 400]
    return np.sum(np.diff(np.signbit(middle)) != 0) / 2 / len(middle) * rate


def test_beeps_and_pitches_are_what_the_answers_say(demo):
    counts, answers = set(), set()
    for row in rows(demo / "train/audio") + rows(demo / "heldout/audio"):
        parts, answer = loud_parts(row["flac"]), conversation(row)[1][1]
        if row["__key__"].startswith("beeps_"):
            assert len(parts) == int(answer), row["__key__"]
            counts.add(answer)
        else:
            first, second = (zero_crossings_hz(row["flac"], part) for part in parts)
            assert ("yes" if second > first else "no") == answer, row["__key__"]
            answers.add(answer)
    assert counts == set("12345") and answers == {"yes", "no"}


def test_the_tokenizer_takes_every_row_and_keeps_digits_apart(demo):
    tokenizer = TextTokenizer.load(demo / "tokenizer")
    assert tokenizer.num_tokens <= 512 and tokenizer.pad_id == tokenizer.eos_id
    (ids,) = tokenizer.encode_batch(["12 apples, 345"])
    assert {"1", "2", "3", "4", "5"} <= {tokenizer.decode([i]) for i in ids}
    template = load_template("chatml")
    for name in ("digits", "compare", "words", "video", "audio", "text"):
        for row in rows(demo / "train" / name):
            members = [(ext, data) for ext, data in row.items() if not ext.startswith("__")]
            sample = parse_sample(row["__key__"], members)
            media = {m: [2] * sum(item.modality == m for item in sample.media) for m in ("image", "video", "audio")}
            out = encode_chat(template, tokenizer, sample.turns, {m: n for m, n in media.items() if n})
            answers = "".join(t.text + "<|im_end|>" for t in sample.turns if t.role == "assistant")
            assert tokenizer.decode(out.input_ids[out.is_target].tolist()) == answers


def test_a_second_run_gives_the_same_bytes(demo, tmp_path):
    write_demo(tmp_path, SCALE, lambda line: None)
    files = {p.relative_to(demo): p.read_bytes() for p in demo.rglob("*") if p.is_file()}
    again = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert files == again and len(files) > 20
