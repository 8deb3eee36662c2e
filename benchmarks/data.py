"""Invented data: a tokenizer, conversations of a wanted length, and shards of them. Everything follows from fixed seeds."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mmscale.data_tools.writer import ShardWriter
from mmscale.streaming.rows import encode_row
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.types import Turn

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TOKENS = 10
"""Tokens of a ChatML question and answer besides their texts."""


def _words() -> list[str]:
    syllables = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]
    rng = random.Random(1)
    return sorted({"".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3)))) for _ in range(300)})


WORDS = _words()


def write_tokenizer(folder: Path) -> TextTokenizer:
    """A byte-level tokenizer, written to `folder`, in which each of `WORDS` is one token with the space before it."""
    folder.mkdir(parents=True)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIALS),
        show_progress=False,
    )
    texts = [" ".join(["", *WORDS])] * 4 + ["user\n", "assistant\n", "system\n"] * 9
    backend.train_from_iterator(texts, trainer)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": SPECIALS[0], "pad_token": SPECIALS[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return TextTokenizer.load(folder)


def make_text(rng: random.Random, num_words: int) -> str:
    """Text of so many words and tokens; it begins with a space."""
    return "".join(f" {word}" for word in rng.choices(WORDS, k=num_words))


def write_conversations(
    folder: Path, lengths: Sequence[int], seed: int, *, images: Sequence[bytes] = (), image_tokens: int = 0
) -> None:
    """A dataset of one question and answer per row, `lengths[i]` tokens long in ChatML; 40 to 60 % of the text is answer.

    Args:
        images: files of which 7 in 10 rows that are long enough get one.
        image_tokens: tokens of an image.
    """
    rng = random.Random(seed)
    with ShardWriter(folder, max_samples=2_000) as writer:
        for i, length in enumerate(lengths):
            members: dict[str, bytes | Path] = {}
            has_image = bool(images) and length >= 2 * image_tokens and rng.random() < 0.7
            words = length - CHAT_TOKENS - (image_tokens + 1 if has_image else 0)
            answer = max(1, round(words * rng.uniform(0.4, 0.6)))
            question = make_text(rng, max(1, words - answer))
            if has_image:
                members["png"] = rng.choice(images)
                question = f"<image>\n{question}"
            members["json"] = encode_row([Turn("user", question), Turn("assistant", make_text(rng, answer))])
            writer.write(f"{i:08d}", members)


def write_photos(folder: Path, num_samples: int, seed: int) -> None:
    """A dataset of JPEG files of about 75 KB with a short conversation each, 500 to a shard."""
    photos = [noise_jpeg(seed + i) for i in range(8)]
    rng = random.Random(seed)
    with ShardWriter(folder, max_samples=500) as writer:
        for i in range(num_samples):
            turns = [Turn("user", f"<image>\n{make_text(rng, 20)}"), Turn("assistant", make_text(rng, 20))]
            writer.write(f"{i:08d}", {"jpg": rng.choice(photos), "json": encode_row(turns, {"image": [f"{i}.jpg"]})})


def write_small_rows(folder: Path, num_samples: int, num_bytes: int, seed: int) -> None:
    """A dataset of one `.json` member of `num_bytes` bytes per row, in one shard."""
    rng = random.Random(seed)
    text = make_text(rng, num_bytes)
    with ShardWriter(folder, max_samples=num_samples) as writer:
        for i in range(num_samples):
            at = rng.randrange(num_bytes)
            row = encode_row([Turn("user", "Say it."), Turn("assistant", text[at : at + num_bytes])])
            writer.write(f"{i:08d}", {"json": row[:num_bytes]})


def noise_jpeg(seed: int) -> bytes:
    """A JPEG of smooth noise, 448 x 336 pixels, about 75 KB."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (84, 112, 3), dtype=np.uint8)).resize(
        (448, 336), Image.Resampling.BICUBIC
    )
    fine = np.asarray(coarse).astype(np.int16) + rng.integers(-24, 25, (336, 448, 3))
    return _encode(fine.clip(0, 255).astype(np.uint8), "JPEG", quality=84)


def noise_png(seed: int, side: int) -> bytes:
    """A square PNG of noise."""
    return _encode(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8), "PNG")


def _encode(pixels: NDArray[np.uint8], kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def lognormal(rng: np.random.Generator, median: float, sigma: float, lo: int, hi: int, size: int) -> NDArray[np.int64]:
    """Skewed lengths, int64 [size], cut at `lo` and `hi`."""
    return np.exp(rng.normal(np.log(median), sigma, size)).astype(np.int64).clip(lo, hi)
