"""Documents have exactly the length that the plan computed from text and headers, and every fault has its reason."""

import pickle
import random
import zipfile
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from mmscale.data_tools.writer import ShardWriter
from mmscale.errors import BadSampleError, RefusedInputError
from mmscale.streaming.chat import load_template
from mmscale.streaming.decode.video import mux_frames
from mmscale.streaming.encode import Encoder, decode_media
from mmscale.streaming.lengths import modality_tokens, sample_lengths
from mmscale.streaming.media import modality_of, probe
from mmscale.streaming.plan import TOO_LONG
from mmscale.streaming.rows import encode_row
from mmscale.streaming.shards import ShardSet
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.types import (
    MODALITIES,
    NEWLINE_TOKEN,
    AudioSpec,
    ImageSpec,
    MediaBytes,
    MediaSpecs,
    Turn,
    VideoSpec,
)

SPECS = MediaSpecs(
    ImageSpec(size=8, tokens=6),
    AudioSpec(rate_hz=16_000, window_samples=8_000, tokens=5, features="waveform"),
    VideoSpec(frames=3),
)
SQUARES = ImageSpec(size=8, tokens=4, side=2, max_tiles=6, grids=((8, 16), (16, 8), (16, 16)))


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer):
    return TextTokenizer.load(byte_tokenizer, [NEWLINE_TOKEN])


@pytest.fixture
def encoder(tokenizer):
    return Encoder(tokenizer, load_template("chatml"), SPECS, max_tokens=200, on_long="drop", max_pixels=10_000)


def picture(width=8, height=8, seed=0):
    buffer = BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def clip(num_samples, rate_hz=16_000):
    buffer = BytesIO()
    soundfile.write(buffer, np.linspace(-0.5, 0.5, num_samples), rate_hz, format="FLAC")
    return buffer.getvalue()


def film(num_frames, width=8, height=8):
    return mux_frames([picture(width, height, seed=i) for i in range(num_frames)])


def row(user, answer="yes"):
    return encode_row([Turn("user", user), Turn("assistant", answer)])


def write(folder, samples, **options):
    with ShardWriter(folder, **options) as writer:
        for key, members in samples.items():
            writer.write(key, members)
    return ShardSet.open(folder, "set")


GOOD = {
    "text": {"json": row("hello")},
    "image": {"json": row("<image>\nwhat?"), "0.png": picture()},
    "images": {"json": row("<image> or <image>?"), "0.png": picture(5, 9), "1.png": picture(8, 30)},
    "audio": {"json": row("<audio>"), "flac": clip(11_000, 22_050)},
    "both": {"json": row("<audio> and <image>"), "flac": clip(17_000), "png": picture()},
    "video": {"json": row("<video> what?"), "mp4": film(7, 20, 10)},
    "short_video": {"json": row("<video> and <image>"), "0.mp4": film(2), "1.png": picture()},
    "caption": {"txt": b"a cat", "png": picture()},
    "unicode": {"json": row("\u00e4\u6f22\U0001f600 <|im_end|> <image>")},
}
BAD = {
    "cut_image": ({"json": row("<image>"), "png": picture()[:20]}, "decode_image"),
    "large_image": ({"json": row("<image>"), "png": picture(200, 100)}, "image_size"),
    "thin_image": ({"json": row("<image>"), "png": picture(1, 300)}, "image_size"),
    "cut_audio": ({"json": row("<audio>"), "flac": clip(100)[:10]}, "decode_audio"),
    "no_film": ({"json": row("<video>"), "mp4": b"no film"}, "decode_video"),
    "cut_film": ({"json": row("<video>"), "mp4": film(3)[:-50]}, "decode_video"),
    "large_film": ({"json": row("<video>"), "mp4": film(1, 200, 100)}, "image_size"),
    "tags": ({"json": row("<image> <image>"), "png": picture()}, "media_count"),
    "no_json": ({"json": b"{", "png": picture()}, None),
    "latin": ({"txt": b"caf\xe9", "png": picture()}, None),
    "long": ({"json": row("x" * 300)}, TOO_LONG),
}


def test_planned_lengths_are_the_encoded_lengths(tmp_path, encoder):
    samples = {**GOOD, **{key: members for key, (members, _) in BAD.items()}}
    shards = write(tmp_path, samples, max_samples=5)
    assert len(shards.shards) > 2
    lengths, by_modality = sample_lengths(shards, encoder), modality_tokens(shards, encoder)
    assert len(lengths.tokens) == len(samples)
    for i, key in enumerate(samples):
        if key in GOOD:
            document = encoder.encode(shards.read(i))
            assert lengths.tokens[i] == len(document) == len(document.is_target), key
            inputs = {m: sum(len(item.data) for item in document.media if item.modality == m) for m in MODALITIES}
            assert lengths.vision[i] == inputs["image"] + inputs["video"] and lengths.audio[i] == inputs["audio"], key
            assert i not in lengths.reasons
            for modality in MODALITIES:
                slots = sum(int(t) == encoder.tokenizer.media_id(modality) for t in document.input_ids)
                assert slots == by_modality[modality][i], (key, modality)
        else:
            assert lengths.tokens[i] == 0, key
            with pytest.raises(BadSampleError) as error:
                encoder.encode(shards.read(i))
            assert lengths.reasons[i] == error.value.reason, key
            assert BAD[key][1] in (None, error.value.reason)


@pytest.mark.parametrize(
    ("mode", "merge"), [("tiles", "flat"), ("anyres", "flat"), ("anyres", "spatial"), ("anyres", "spatial_unpad")]
)
def test_tiled_images_have_their_planned_tokens(mode, merge, tmp_path, encoder, seed):
    tiled = replace(encoder, specs=MediaSpecs(replace(SQUARES, mode=mode, merge=merge)), max_tokens=1000)
    rng = np.random.default_rng(seed)
    samples = {}
    for i in range(12):
        sizes = np.exp(rng.uniform(0, np.log(90), (1 + i % 3, 2))).astype(int).tolist()
        members = {f"{n}.png": picture(*size, seed=i) for n, size in enumerate(sizes)}
        samples[str(i)] = {"json": row("<image> " * len(sizes)), **members}
    shards = write(tmp_path, samples)
    lengths = sample_lengths(shards, tiled)
    image_id, newline = tiled.tokenizer.media_id("image"), tiled.tokenizer.special_id(NEWLINE_TOKEN)
    for i in range(len(samples)):
        document = tiled.encode(shards.read(i))
        assert len(document) == lengths.tokens[i]
        for item in document.media:
            assert item.data.shape[1:] == (3, 8, 8) and item.data.dtype == torch.uint8
            rows = np.arange(item.num_tokens) if item.rows is None else item.rows
            assert rows.max() < 4 * len(item.data)
            ids = document.input_ids[item.slot : item.slot + item.num_tokens].numpy()
            assert (ids == np.where(rows < 0, newline, image_id)).all()
            assert (rows < 0).any() <= (merge == "spatial_unpad")
        under_media = sum(m.num_tokens for m in document.media)
        assert sum(int(t) in (image_id, newline) for t in document.input_ids) == under_media


def test_planned_inputs_are_the_decoded_inputs(tmp_path, encoder):
    tiled = replace(encoder, specs=replace(SPECS, image=replace(SQUARES, mode="tiles")))
    for ext, data in (("png", picture(40, 20)), ("flac", clip(17_000)), ("flac", clip(24_000)), ("mp4", film(5))):
        modality = modality_of(ext)
        item = decode_media(MediaBytes(modality, ext, data), tiled.specs, tiled.max_pixels)
        assert tiled.planned(modality, probe(ext, data)) == (item.num_tokens, len(item.data)), ext


def test_media_stand_at_their_slots_in_order(tmp_path, encoder):
    pictures = [picture(seed=1), picture(seed=2)]
    members = {
        "json": row("a <image> b <audio> c <image>"),
        "0.png": pictures[0],
        "1.png": pictures[1],
        "flac": clip(4_000),
    }
    document = encoder.encode(write(tmp_path, {"k": members}).read(0))
    assert [m.modality for m in document.media] == ["image", "audio", "image"]
    for item, tokens in zip(document.media, (6, 3, 6), strict=True):
        ids = document.input_ids[item.slot : item.slot + item.num_tokens]
        assert item.num_tokens == tokens and (ids == encoder.tokenizer.media_id(item.modality)).all()
    first, second = (np.array(Image.open(BytesIO(p))) for p in pictures)
    assert (document.media[0].data[0].permute(1, 2, 0).numpy() == first).all()
    assert (document.media[2].data[0].permute(1, 2, 0).numpy() == second).all()
    assert document.media[1].data.shape == (1, 8_000)


def test_a_modality_that_the_model_lacks_is_a_named_skip(tmp_path, encoder):
    blind = replace(encoder, specs=MediaSpecs())
    shards = write(tmp_path, {"image": GOOD["image"], "text": GOOD["text"]})
    lengths = sample_lengths(shards, blind)
    assert lengths.reasons == {0: "modality"} and lengths.tokens[1] > 0
    with pytest.raises(BadSampleError, match="takes no image"):
        blind.encode(shards.read(0))


def test_long_samples_follow_the_rule(tmp_path, encoder):
    samples = {
        "text": {"json": row("question", "a" * 300)},
        "early": {"json": row("<image>" + "b" * 300), "png": picture()},
        "late": {"json": row("c" * 300 + "<image>"), "png": picture()},
    }
    shards = write(tmp_path, samples)
    assert sample_lengths(shards, encoder).reasons == dict.fromkeys(range(3), TOO_LONG)
    cutter = replace(encoder, on_long="truncate")
    lengths = sample_lengths(shards, cutter)
    assert lengths.tokens.tolist() == [200, 200, 0] and lengths.reasons == {2: TOO_LONG}
    for i in (0, 1):
        assert len(cutter.encode(shards.read(i))) == 200
    assert cutter.encode(shards.read(0)).is_target.sum() > 100
    with pytest.raises(BadSampleError, match=TOO_LONG):
        cutter.encode(shards.read(2))
    with pytest.raises(RefusedInputError, match=r"set/000000.tar:text.*data.seq_len=200"):
        sample_lengths(shards, replace(encoder, on_long="error"))


def test_lengths_are_stored_for_this_encoder_only(tmp_path, encoder, monkeypatch):
    shards = write(tmp_path, GOOD)
    first = sample_lengths(shards, encoder)
    stored = list(tmp_path.glob("*.lengths.*.npz"))
    assert len(stored) == 1

    def compute(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr("mmscale.streaming.lengths._compute", compute)
    for same in (encoder, replace(encoder, max_tokens=100, on_long="truncate")):
        again = sample_lengths(ShardSet.open(tmp_path, "other"), same)
        assert (again.vision == first.vision).all() and (again.audio == first.audio).all()
    others = (replace(encoder, template=load_template("plain")), replace(encoder, specs=MediaSpecs()))
    for other in others:
        assert other.fingerprint != encoder.fingerprint
        with pytest.raises(AssertionError, match="computed again"):
            sample_lengths(shards, other)
    stored[0].write_bytes(stored[0].read_bytes()[:100])
    with pytest.raises(AssertionError, match="computed again"):
        sample_lengths(shards, encoder)


def test_damaged_or_forged_lengths_are_computed_again(tmp_path, encoder, seed):
    shards = write(tmp_path, GOOD)
    right = sample_lengths(shards, encoder)
    (stored,) = tmp_path.glob("*.lengths.*.npz")
    whole, rng = stored.read_bytes(), random.Random(seed)
    files = [b"", b"PK", npy(np.zeros(3))]
    for _ in range(100):
        at = rng.randrange(len(whole))
        files += [whole[:at], whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :]]
    huge = npy(np.zeros(1, np.uint32)).replace(b"(1,), }" + b" " * 14, b"(1" + b"0" * 14 + b",), }")
    rows = len(shards)
    others = (
        np.zeros(rows),
        np.zeros(rows + 1, np.uint32),
        np.zeros((rows, 1), np.uint32),
        np.zeros(1 << 24, np.uint32),
    )
    for column in ("tokens", "bad_rows", "bad_reasons"):
        files += [with_member(whole, column, content) for content in (huge, *map(npy, others))]
    for data in files:
        stored.write_bytes(data)
        found = sample_lengths(shards, encoder)
        assert (found.tokens == right.tokens).all() and found.reasons == right.reasons
        assert (found.vision == right.vision).all() and (found.audio == right.audio).all()
        assert len(stored.read_bytes()) == len(whole)  # written anew, or a flip where it says nothing


def npy(array):
    buffer = BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def with_member(data, name, content):
    """A copy of an npz file in which one array is another file."""
    buffer = BytesIO()
    with zipfile.ZipFile(BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.namelist():
            new.writestr(member, content if member == f"{name}.npy" else old.read(member))
    return buffer.getvalue()


def test_lengths_are_computed_again_for_other_text_of_equal_size(tmp_path, encoder):
    found = []
    for text in ("12345678", "\u00e4\u00e4\u00e4\u00e4", "a\\nb\\nc"):  # 8 bytes each, as JSON too
        for old in (*tmp_path.glob("*.tar"), *tmp_path.glob("*.idx"), *tmp_path.glob("manifest.json")):
            old.unlink()
        content = b'{"conversations": [{"from": "user", "value": "%s"}, {"from": "gpt", "value": "x"}]}'
        shards = write(tmp_path, {"k": {"json": content % text.encode()[:8].ljust(8)}})
        lengths = sample_lengths(shards, encoder)
        assert lengths.tokens[0] == len(encoder.encode(shards.read(0)))
        found.append((shards.shards[0].index.headers, int(lengths.tokens[0])))
    assert len({headers for headers, _ in found}) == 1 and len({tokens for _, tokens in found}) > 1
    assert len(list(tmp_path.glob("*.lengths.*.npz"))) == 3


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path, encoder, monkeypatch):
    shards = write(tmp_path, GOOD)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("mmscale.streaming.lengths.os.replace", refuse)
    assert sample_lengths(shards, encoder).tokens.all()
    assert not list(tmp_path.glob("*.lengths.*.npz"))


def test_encoding_is_repeatable_and_travels(tmp_path, encoder):
    shards = write(tmp_path, GOOD)
    other = pickle.loads(pickle.dumps(encoder))
    assert other.fingerprint == encoder.fingerprint
    for i in range(len(GOOD)):
        a, b = encoder.encode(shards.read(i)), other.encode(shards.read(i))
        assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.is_target, b.is_target)
        assert all(torch.equal(x.data, y.data) for x, y in zip(a.media, b.media, strict=True))


def test_filler_has_no_targets(encoder):
    filler = encoder.filler("x", 7)
    assert len(filler) == 7 and not filler.is_target.any() and not filler.media and filler.id == "x"
