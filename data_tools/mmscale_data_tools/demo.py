"""A small, real, multimodal data set that needs no download: scanned digits, words, clips, tone sequences and text.

Digits are scikit-learn's 1,797 scans, split once into 1,437 to train on and 360 held out. A row's key begins with its
task: digits, compare, words, video, beeps, pitch or text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mmscale.data_tools.writer import ShardWriter
from mmscale.errors import MissingExtraError
from mmscale.streaming.chat import load_template, to_jinja
from mmscale.streaming.containers import encode_mp4
from mmscale.streaming.media import modality_of
from mmscale.streaming.rows import encode_row
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.types import MEDIA_TOKENS, Modality, Turn

if TYPE_CHECKING:
    from PIL.Image import Image

SEED = 20240
NUM_TRAIN_DIGITS = 1437
ROWS = {
    "compare": (1000, 100), "words": (800, 100), "video": (500, 60), "beeps": (1500, 200), "pitch": (1000, 100), "text": (500, 0),
}  # fmt: skip
"""Rows of each task: (train, held out)."""

RATE_HZ = 16_000
MAX_SAMPLES = 19_200  # 1.2 s, one window of the recipe's audio tower
VIDEO_SIDE, VIDEO_DIGIT, VIDEO_FPS = 32, 16, 8
"""Sides of a clip's frame and of the digit in it, in pixels, and frames per second."""

VOCABULARY = 512
WORDS = (
    "cat", "dog", "sun", "map", "red", "box", "ice", "jam", "owl", "key", "bus", "egg",
)  # fmt: skip
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *MEDIA_TOKENS.values())

DIGIT_QUESTIONS = ("Which digit is this?", "What digit do you see?", "Read the digit.", "Name this digit.")
LARGER_QUESTION, LARGEST_QUESTION = "Which of these is larger?", "Which is the largest?"
WORD_QUESTION, BEEPS_QUESTION, PITCH_QUESTION = "What does it say?", "How many beeps?", "Is the second tone higher?"
VIDEO_QUESTION = "Does the digit move left or right?"
ORDINALS = ("first", "second", "third")


class Row(NamedTuple):
    """One conversation with its media as (extension without number, bytes), in the order of the placeholders."""

    key: str
    turns: tuple[Turn, ...]
    media: tuple[tuple[str, bytes], ...] = ()


class Digit(NamedTuple):
    """One scan: a 32 x 32 RGB PNG and what it shows."""

    png: bytes
    value: int


def write_demo(folder: Path, scale: float = 1.0, report: Callable[[str], None] = print) -> None:
    """Writes the demo data: `train/` and `heldout/` dataset folders with index and manifest, and `tokenizer/`.

    The same call gives the same bytes; a call that was stopped can be repeated.

    Args:
        folder: made when missing.
        scale: share of the rows to write, for quick tests.
        report: takes one line of progress at a time.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        RefusedInputError: the folder holds shards of other data.
    """
    train, heldout = load_digits(scale)
    sizes = {task: (max(1, round(scale * a)), max(1, round(scale * b))) for task, (a, b) in ROWS.items()}
    texts: list[str] = []
    for split, digits in enumerate((train, heldout)):
        counts = {task: pair[split] for task, pair in sizes.items()}
        sources: dict[str, Iterable[Row]] = {
            "digits": digit_rows(digits, DIGIT_QUESTIONS if split == 0 else DIGIT_QUESTIONS[:1]),
            "compare": compare_rows(digits, counts["compare"], several_turns=split == 0),
            "words": word_rows(counts["words"], split),
            "video": video_rows(digits, counts["video"], split),
            "audio": chain(beep_rows(counts["beeps"], split), pitch_rows(counts["pitch"], split)),
        }
        if split == 0:
            sources["text"] = text_rows(counts["text"])
        for name, rows in sources.items():
            target = folder / ("train", "heldout")[split] / name
            with ShardWriter(target, max_samples=500) as writer:
                for row in rows:
                    writer.write(row.key, members(row))
                    texts += [turn.text for turn in row.turns] if split == 0 else []
            report(f"{target}: {writer.num_samples} rows")
    write_tokenizer(folder / "tokenizer", texts)
    report(f"{folder / 'tokenizer'}: byte-level, at most {VOCABULARY} tokens")


def members(row: Row) -> dict[str, bytes]:
    """The files of a row by extension: numbered media when there are several, and the conversation."""
    extensions = [ext if len(row.media) == 1 else f"{i}.{ext}" for i, (ext, _) in enumerate(row.media)]
    names: dict[Modality, list[str]] = {}
    for ext in extensions:
        modality = modality_of(ext)
        assert modality is not None, "rows are made with media extensions"
        names.setdefault(modality, []).append(f"{row.key}.{ext}")
    files = {ext: data for ext, (_, data) in zip(extensions, row.media, strict=True)}
    return {**files, "json": encode_row(row.turns, names, row.key)}


def load_digits(scale: float = 1.0) -> tuple[list[Digit], list[Digit]]:
    """The scans to train on and those held out, always split alike; the first `scale` of each."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "demo", "the demo data", error) from error
    data = load()
    order = np.random.default_rng(SEED).permutation(len(data.images))
    halves = order[:NUM_TRAIN_DIGITS], order[NUM_TRAIN_DIGITS:]
    chosen = [half[: max(10, round(scale * len(half)))] for half in halves]
    train, heldout = ([Digit(_digit_png(data.images[i]), int(data.target[i])) for i in half] for half in chosen)
    return train, heldout


def _digit_png(scan: np.ndarray) -> bytes:
    """The 8 x 8 scan of values 0 to 16, enlarged smoothly."""
    from PIL import Image

    grey = Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8))
    return _png(grey.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB"))


def _png(image: Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _rng(task: str, split: int) -> np.random.Generator:
    """The random numbers of one task and split (0 train, 1 held out)."""
    return np.random.default_rng([SEED, split, *task.encode()])


def _ask(question: str, answer: object) -> tuple[Turn, Turn]:
    return Turn("user", question), Turn("assistant", str(answer))


def digit_rows(digits: Sequence[Digit], questions: Sequence[str]) -> Iterator[Row]:
    """One row per scan, the questions in turn."""
    for i, digit in enumerate(digits):
        turns = _ask(f"<image>\n{questions[i % len(questions)]}", digit.value)
        yield Row(f"digits_{i:05d}", turns, (("png", digit.png),))


def compare_rows(digits: Sequence[Digit], count: int, several_turns: bool) -> Iterator[Row]:
    """Two or three scans of different digits in one conversation; every third row has more turns when asked for."""
    rng = _rng("compare", int(not several_turns))
    for i in range(count):
        picked: list[Digit] = []
        while len(picked) < 2 + i % 2:
            digit = digits[int(rng.integers(len(digits)))]
            picked += [digit] if digit.value not in [d.value for d in picked] else []
        question = (LARGER_QUESTION, LARGEST_QUESTION)[i % 2]
        if rng.random() < 0.5:
            text = "".join("<image>\n" for _ in picked) + question
        else:
            text = (
                ", ".join(f"{ordinal}: <image>" for ordinal, _ in zip(ORDINALS, picked, strict=False)) + f"\n{question}"
            )
        turns: tuple[Turn, ...] = _ask(text, max(d.value for d in picked))
        if several_turns and i % 3 == 0:
            which = int(rng.integers(len(picked)))
            turns += _ask(f"Which digit is the {ORDINALS[which]} image?", picked[which].value)
        yield Row(f"compare_{i:05d}", turns, tuple(("png", d.png) for d in picked))


def word_rows(count: int, split: int) -> Iterator[Row]:
    """Short words drawn with Pillow's own font, in other colours and places each time."""
    rng = _rng("words", split)
    for i in range(count):
        word = WORDS[i % len(WORDS)]
        yield Row(f"words_{i:05d}", _ask(f"<image>\n{WORD_QUESTION}", word), (("png", _word_png(word, rng)),))


def _word_png(word: str, rng: np.random.Generator) -> bytes:
    from PIL import Image, ImageDraw, ImageFont

    ink, paper = (tuple(int(c) for c in rng.integers(low, low + 60, 3)) for low in (0, 190))
    font = ImageFont.load_default(18)
    left, _, right, _ = font.getbbox(word)
    image = Image.new("RGB", (int(right - left) + 4, 32), paper)
    x, y = int(rng.integers(1, 4)) - int(left), int(rng.integers(3, 6))
    ImageDraw.Draw(image).text((x, y), word, fill=ink, font=font)
    return _png(image)


def video_rows(digits: Sequence[Digit], count: int, split: int) -> Iterator[Row]:
    """A digit that crosses two thirds or more of a plain ground in 8 to 16 frames."""
    rng = _rng("video", split)
    for i in range(count):
        goes_right = i % 2 == 0
        clip = _moving_digit(digits[int(rng.integers(len(digits)))], goes_right, rng)
        turns = _ask(f"<video>\n{VIDEO_QUESTION}", "right" if goes_right else "left")
        yield Row(f"video_{i:05d}", turns, (("mp4", clip),))


def _moving_digit(digit: Digit, goes_right: bool, rng: np.random.Generator) -> bytes:
    from PIL import Image

    with Image.open(BytesIO(digit.png)) as scan:
        ink = np.asarray(scan.convert("L").resize((VIDEO_DIGIT, VIDEO_DIGIT)), np.float64) / 255
    room, paper, pen = VIDEO_SIDE - VIDEO_DIGIT, rng.uniform(0, 20), rng.uniform(230, 255)
    way = rng.uniform(0.65, 1.0) * room
    places = rng.uniform(0, room - way) + np.linspace(0, way, int(rng.integers(8, 17)))
    y = int(rng.integers(room + 1))
    frames = []
    for x in np.round(places if goes_right else places[::-1]).astype(int):
        frame = np.full((VIDEO_SIDE, VIDEO_SIDE, 3), paper)
        frame[y : y + VIDEO_DIGIT, x : x + VIDEO_DIGIT] += ink[:, :, None] * (pen - paper)
        frames.append(np.round(frame).astype(np.uint8))
    return encode_mp4(frames, VIDEO_FPS, (VIDEO_SIDE, VIDEO_SIDE))


def beep_rows(count: int, split: int) -> Iterator[Row]:
    """One to five beeps; loudness, pitch, lengths and gaps vary, and the clip's length tells nothing."""
    rng = _rng("beeps", split)
    for i in range(count):
        beeps = i % 5 + 1
        pitch = rng.uniform(300, 1500) * (rng.uniform(0.8, 1.25, beeps) if rng.random() < 0.5 else np.ones(beeps))
        loudness = rng.uniform(0.1, 0.6) * rng.uniform(0.75, 1.0, beeps)
        clip = _tones(pitch, rng.uniform(0.045, 0.10, beeps), rng.uniform(0.05, 0.11, beeps - 1), loudness, rng)
        yield Row(f"beeps_{i:05d}", _ask(f"<audio>\n{BEEPS_QUESTION}", beeps), (("flac", clip),))


def pitch_rows(count: int, split: int) -> Iterator[Row]:
    """Two tones, the second five to twelve semitones higher or lower."""
    rng = _rng("pitch", split)
    for i in range(count):
        rises = i % 2 == 0
        low = rng.uniform(400, 1000)
        pitch = np.array([low, low * 2 ** (rng.uniform(5, 12) / 12)])
        clip = _tones(
            pitch if rises else pitch[::-1],
            rng.uniform(0.18, 0.36, 2),
            rng.uniform(0.06, 0.12, 1),
            rng.uniform(0.15, 0.5, 2),
            rng,
        )
        yield Row(f"pitch_{i:05d}", _ask(f"<audio>\n{PITCH_QUESTION}", "yes" if rises else "no"), (("flac", clip),))


def _tones(
    pitch_hz: np.ndarray, lengths_s: np.ndarray, gaps_s: np.ndarray, loudness: np.ndarray, rng: np.random.Generator
) -> bytes:
    """A FLAC clip of at most 1.2 s, mono: tones with gaps between them, silence around them, light noise over all."""
    import soundfile

    tones = np.round(lengths_s * RATE_HZ).astype(int)
    gaps = np.round(np.append(gaps_s, 0.0) * RATE_HZ).astype(int)
    starts = np.cumsum(np.append(0, (tones + gaps)[:-1]))
    free = MAX_SAMPLES - int(starts[-1] + tones[-1])
    lead = int(rng.integers(free // 8, free // 2))
    clip = rng.normal(0.0, rng.uniform(0.001, 0.006), MAX_SAMPLES - int(rng.integers(0, free // 2)))
    for start, length, hertz, level in zip(starts + lead, tones, pitch_hz, loudness, strict=True):
        ramp = np.minimum(1.0, np.minimum(np.arange(length), np.arange(length)[::-1]) / (0.006 * RATE_HZ))
        clip[start : start + length] += level * ramp * np.sin(2 * np.pi * hertz / RATE_HZ * np.arange(length))
    buffer = BytesIO()
    soundfile.write(buffer, np.round(clip * 32767).astype(np.int16), RATE_HZ, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def text_rows(count: int) -> Iterator[Row]:
    """Conversations without media: sums, copies, orders, and small talk with a system turn."""
    rng = _rng("text", 0)
    for i in range(count):
        a, b, c = (int(n) for n in rng.integers(0, 10, 3))
        words = [WORDS[j] for j in rng.choice(len(WORDS), 3, replace=False)]
        turns: tuple[Turn, ...] = (
            _ask(f"What is {a} + {b}?", a + b),
            _ask(f"Repeat: {' '.join(words)}", " ".join(words)),
            _ask(f"Sort: {a} {b} {c}", " ".join(map(str, sorted((a, b, c))))),
            (
                Turn("system", "You are a friendly assistant."),
                *_ask("Hello!", "Hello! How can I help?"),
                *_ask(f"What is {a} + {b}?", a + b),
                *_ask(f"Which is larger, {a} or {b}?", max(a, b)),
            ),
        )[i % 4]
        yield Row(f"text_{i:05d}", turns)


def write_tokenizer(folder: Path, texts: Sequence[str]) -> None:
    """Trains a byte-level tokenizer in which every digit is a token of its own, and writes it with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    split, level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = json.dumps({"eos_token": SPECIALS[0], "pad_token": SPECIALS[0]})
    (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")
    TextTokenizer.load(folder).save(folder, to_jinja(load_template("chatml")))
