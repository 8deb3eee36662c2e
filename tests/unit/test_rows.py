"""Rows to samples: formats.md 1.1 case by case, and strict JSON."""

from __future__ import annotations

import json
import random

import pytest

from mmscale.errors import BadSampleError
from mmscale.streaming.rows import encode_row, parse_sample
from mmscale.streaming.strict_json import MAX_DEPTH, JsonFault, parse_json
from mmscale.types import Sample, Turn

H, G, S = "human", "gpt", "system"


def row(*turns: tuple[str, str], **fields: object) -> bytes:
    return json.dumps({"conversations": [{"from": role, "value": text} for role, text in turns], **fields}).encode()


def sample(data: bytes, *media: str) -> Sample:
    return parse_sample("s:k", [("json", data), *((ext, ext.encode()) for ext in media)], 7)


def texts(parsed: Sample) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in parsed.turns]


def refused(data: bytes, *media: str) -> str:
    with pytest.raises(BadSampleError) as caught:
        sample(data, *media)
    return caught.value.reason


def test_a_plain_row() -> None:
    parsed = sample(row((H, "<image>\nWhat?"), (G, "A cat."), id=1), "png")
    assert texts(parsed) == [("user", "<image>\nWhat?"), ("assistant", "A cat.")]
    assert [(m.modality, m.ext, m.data) for m in parsed.media] == [("image", "png", b"png")]
    assert (parsed.id, parsed.offset) == ("s:k", 7)


@pytest.mark.parametrize("role", ["gpt", "assistant", "chatgpt", "bing", "bard"])
def test_role_aliases(role: str) -> None:
    assert [turn.role for turn in sample(row(("user", "q"), (role, "a"))).turns] == ["user", "assistant"]


def test_leading_turns() -> None:
    good = [("user", "q"), ("assistant", "a")]
    assert texts(sample(row((S, "Be brief."), (H, "q"), (G, "a")))) == [("system", "Be brief."), *good]
    assert texts(sample(row((G, "Hello!"), (H, "q"), (G, "a")))) == good
    assert texts(sample(row((S, "s"), (G, "Hello!"), (H, "q"), (G, "a")))) == [("system", "s"), *good]
    assert texts(sample(row((H, "q"), (G, "a"), (H, "q2")))) == [*good, ("user", "q2")]


@pytest.mark.parametrize(
    "turns",
    [
        [],
        [(H, "q")],
        [(G, "a")],
        [(S, "s"), (G, "a")],
        [(H, "q"), (H, "q")],
        [(H, "q"), (G, "a"), (G, "a")],
        [(H, "q"), (S, "s"), (G, "a")],
        [(H, "q"), ("robot", "a")],
    ],
)
def test_roles_that_do_not_alternate(turns: list[tuple[str, str]]) -> None:
    assert refused(row(*turns)) == "roles"


def test_placeholders_keep_their_position_over_turns() -> None:
    data = row((H, "<image> and <image>: older?"), (G, "The <image> one."), (H, "And <image>?"), (G, "No."))
    parsed = sample(data, "2.png", "0.jpg", "1.webp")
    assert [turn.text for turn in parsed.turns] == [
        "<image> and <image>: older?",
        "The <image> one.",
        "And <image>?",
        "No.",
    ]
    assert [m.data for m in parsed.media] == [b"0.jpg", b"1.webp", b"2.png"]


def test_media_are_in_natural_order() -> None:
    exts = [f"{i}.png" for i in range(12)]
    shuffled = random.Random(3).sample(exts, 12)
    assert [m.data.decode() for m in sample(row((H, "q"), (G, "a")), *shuffled).media] == exts


def test_media_without_tags_come_first() -> None:
    parsed = sample(row((S, "s"), (H, "Look."), (G, "a <image>")), "0.png", "1.png")
    assert [turn.text for turn in parsed.turns] == ["s", "<image>\n<image>\nLook.", "a <image>"]
    parsed = sample(row((H, "Look at <image>"), (G, "a")), "0.png", "1.flac")
    assert parsed.turns[0].text == "<audio>\nLook at <image>"
    parsed = sample(row((H, "Compare."), (G, "a")), "0.flac", "1.png", "2.flac")
    assert parsed.turns[0].text == "<audio>\n<image>\n<audio>\nCompare."


def test_a_tag_without_media_of_its_kind_is_text() -> None:
    assert sample(row((H, "What does <image> mean?"), (G, "a tag"))).turns[0].text == "What does <image> mean?"
    assert sample(row((H, "<image> <audio>"), (G, "a")), "png").turns[0].text == "<image> <audio>"


@pytest.mark.parametrize(("tags", "media"), [(1, 2), (2, 1), (3, 1)])
def test_more_or_fewer_tags_than_media(tags: int, media: int) -> None:
    data = row((H, "<image>" * tags + "x"), (G, "a"))
    assert refused(data, *(f"{i}.png" for i in range(media))) == "media_count"


@pytest.mark.parametrize(
    ("fields", "media"),
    [
        ({"image": "a.jpg"}, []),
        ({"images": ["a.jpg", "b.jpg"]}, ["0.jpg"]),
        ({"image": ["a", "b"]}, ["jpg"]),
        ({"image": "a.jpg"}, ["0.jpg", "1.jpg"]),
        ({"audio": "a.wav"}, []),
    ],
)
def test_a_row_that_names_other_media_than_there_are(fields: dict[str, object], media: list[str]) -> None:
    assert refused(row((H, "q"), (G, "a"), **fields), *media) == "missing_media"


@pytest.mark.parametrize("fields", [{"image": 5}, {"images": [["a"]]}, {"image": ""}, {"images": [{"bytes": "x"}]}])
def test_media_fields_of_a_wrong_type(fields: dict[str, object]) -> None:
    assert refused(row((H, "q"), (G, "a"), **fields), "png") == "json_fields"


def test_media_declared_as_objects() -> None:
    assert (
        len(sample(row((H, "q"), (G, "a"), images=[{"path": "a.png"}, {"path": "b.png"}]), "0.png", "1.png").media) == 2
    )


@pytest.mark.parametrize(
    "data",
    [
        b"[]",
        b'"x"',
        b"5",
        b'{"conversations": 5}',
        b'{"conversations": [5]}',
        b'{"conversations": [{"from": 1, "value": "x"}]}',
        b'{"conversations": [{"from": "human"}]}',
    ],
)
def test_rows_of_a_wrong_type(data: bytes) -> None:
    assert refused(data) == "json_fields"


def test_unknown_fields_and_members_are_no_fault() -> None:
    parsed = parse_sample(
        "k", [("json", row((H, "q"), (G, "a"), extra={"x": [1]})), ("cls", b"3"), ("eps", b"%!PS")], 0
    )
    assert parsed.media == ()


def test_caption_layout() -> None:
    parsed = parse_sample("k", [("jpg", b"j"), ("txt", b"Ein Hund."), ("json", b'{"url": "x", "width": 3}')], 0)
    assert texts(parsed) == [("user", "<image>\n"), ("assistant", "Ein Hund.")]
    with_row = parse_sample("k", [("jpg", b"j"), ("txt", b"other"), ("json", row((H, "q"), (G, "a")))], 0)
    assert with_row.turns[1].text == "a"


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("txt", b"Alone <image>.")], "Alone <image>."),
        ([("json", b'{"text": "Words.", "lang": "en"}')], "Words."),
        ([("json", b'{"text": "A <image> b <image>"}'), ("1.png", b"q"), ("0.png", b"p")], "A <image> b <image>"),
        ([("json", b'{"text": "No tag"}'), ("0.png", b"p"), ("1.png", b"q")], "<image>\n<image>\nNo tag"),
    ],
)
def test_documents(members: list[tuple[str, bytes]], expected: str) -> None:
    parsed = parse_sample("k", members, 0)
    assert texts(parsed) == [("document", expected)]
    assert [m.data for m in parsed.media] == [b"p", b"q"][: len(parsed.media)]
    again = encode_row(parsed.turns, {"image": [m.ext for m in parsed.media]} if parsed.media else None)
    assert parse_sample("k", [("json", again), *((e, d) for e, d in members if "png" in e)], 0).turns == parsed.turns


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("jpg", b"j")], "missing_text"),
        ([("jpg", b"j"), ("json", b"{}")], "missing_text"),
        ([("txt", b"a caption"), ("json", b'{"url": "x"}')], "missing_media"),
        ([("txt", b" ")], "empty_text"),
        ([("json", b'{"text": "\\n"}')], "empty_text"),
        ([("json", b'{"text": ["a"]}')], "json_fields"),
        ([("json", b'{"text": "<image>"}'), ("0.png", b"p"), ("1.png", b"p")], "media_count"),
        ([("json", b'{"text": "a", "image": "x.png"}')], "missing_media"),
        ([("jpg", b"j"), ("txt", b" \n")], "empty_text"),
        ([("jpg", b"j"), ("txt", b"caf\xe9")], "text_utf8"),
        ([("jpg", b"j"), ("txt", b"x"), ("json", b"{")], "json_syntax"),
    ],
)
def test_faulty_members(members: list[tuple[str, bytes]], reason: str) -> None:
    with pytest.raises(BadSampleError) as caught:
        parse_sample("k", members, 0)
    assert caught.value.reason == reason


def test_encode_row_and_parse_sample_are_inverse() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    alphabet = 'ab \n\t"\\{}é漢😀<>'
    for _ in range(200):
        turns = [Turn("system", "s")] * rng.randrange(2)
        for _ in range(rng.randrange(1, 4)):
            turns += [
                Turn("user", "".join(rng.choices(alphabet, k=rng.randrange(9)))),
                Turn("assistant", "".join(rng.choices(alphabet, k=3))),
            ]
        names = [f"{i}.png" for i in range(rng.randrange(3))]
        first = next(i for i, turn in enumerate(turns) if turn.role == "user")
        turns[first] = Turn("user", "<image>" * len(names) + turns[first].text)
        data = encode_row(turns, {"image": names} if names else None, id="7")
        assert sample(data, *names).turns == tuple(turns)
    assert b'"image":"a.png"' in encode_row(turns, {"image": ["a.png"]})
    assert b'"images":["a.png","b.png"]' in encode_row(turns, {"image": ["a.png", "b.png"]})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "json_syntax"),
        (b"{", "json_syntax"),
        (b'{"a": 1} x', "json_syntax"),
        (b"{'a': 1}", "json_syntax"),
        (b'{"a": 1,}', "json_syntax"),
        (b'{"a": "\x01"}', "json_syntax"),
        (b'\xef\xbb\xbf{"a": 1}', "json_syntax"),
        ('{"a": 1}'.encode("utf-16"), "json_utf8"),
        (b'{"a": "caf\xe9"}', "json_utf8"),
        (b'{"a": NaN}', "json_number"),
        (b'{"a": -Infinity}', "json_number"),
        (b'{"a": 1e999}', "json_number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "json_number"),
        (b'{"a": 1, "a": 2}', "json_duplicate_key"),
        (b'{"a": "\\ud800"}', "json_text"),
        (b'{"\\udfff": 1}', "json_text"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "json_depth"),
        (b"[" * 200_000, "json_depth"),
        (b'{"a":' * 50 + b"1" + b"}" * 50, "json_depth"),
        (b'"' + b"x" * (16 << 20) + b'"', "json_size"),
    ],
)
def test_what_is_not_strict_json(data: bytes, reason: str) -> None:
    with pytest.raises(JsonFault) as caught:
        parse_json(data)
    assert caught.value.reason == reason


def test_strict_json_reads_json() -> None:
    value = {"a": [1, -2.5e3, None, True, {"b": "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")}]}
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value
    deep = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert parse_json(deep) is not None
    assert parse_json(b'{"a": [' + b"{}," * 100 + b"{}]}") == {"a": [{}] * 101}
