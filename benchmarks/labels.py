"""What it costs to find the target tokens of a long conversation."""

from __future__ import annotations

import copy
import random
import statistics
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np

from benchmarks.data import make_text, write_tokenizer
from benchmarks.result import Result, Settings, interleaved
from mmscale.streaming.chat import encode_chat, load_template
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.types import Turn

NUM_TOKENS = 16_384
ROUNDS = 15

# ChatML with transformers' marks around what the assistant says; jinja drops a newline that follows a block.
JINJA = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
)


def labels_ms_16k(settings: Settings) -> Result:
    """Time for ids and target mask of a conversation of 16,384 text tokens in 64 turns, the tokenizer's own work left out."""
    tokenizer = write_tokenizer(settings.folder / "tokenizer")
    template = load_template("chatml")
    rng = random.Random(2)
    turns = [Turn("assistant" if i % 2 else "user", make_text(rng, NUM_TOKENS // 64 - 4)) for i in range(64)]
    known = _remembering(tokenizer, encode_chat_texts(tokenizer, turns))
    theirs = _transformers_tokenizer(settings.folder / "tokenizer")
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]

    def ours(own: TextTokenizer) -> np.ndarray:
        return encode_chat(template, own, turns, {}).is_target

    def peer() -> np.ndarray:
        out = theirs.apply_chat_template(
            messages, chat_template=JINJA, return_assistant_tokens_mask=True, return_dict=True
        )
        return np.array(out["assistant_masks"])

    mask = ours(known)
    assert (mask == ours(tokenizer)).all(), "remembered ids change nothing"
    assert (mask == peer()).all(), "both mark the same tokens"
    times = interleaved([lambda: ours(known), lambda: ours(tokenizer), peer], ROUNDS)
    alone, whole, other = (statistics.median(t) * 1e3 for t in times)
    text = f"tokenizer included: ours {whole:.1f} ms, transformers' chat template with assistant mask {other:.1f} ms"
    return Result("labels_ms_16k", alone, "ms", "<= 5", f"{text}; {len(mask)} tokens, same mask")


def encode_chat_texts(tokenizer: TextTokenizer, turns: list[Turn]) -> list[list[int]]:
    """The ids of every run of text, in the order in which `encode_chat` asks for them."""
    seen: list[list[int]] = []

    def encode(self: TextTokenizer, texts: list[str], places: Any = None) -> list[list[int]]:
        found = TextTokenizer.encode_batch(self, texts, places)
        seen.extend(found)
        return found

    listening = copy.copy(tokenizer)
    listening.encode_batch = MethodType(encode, listening)  # type: ignore[method-assign]
    encode_chat(load_template("chatml"), listening, turns, {})
    return seen


def _remembering(tokenizer: TextTokenizer, ids: list[list[int]]) -> TextTokenizer:
    """The tokenizer, answering with `ids` at once."""
    known = copy.copy(tokenizer)
    known.encode_batch = lambda texts, places=None: ids  # type: ignore[method-assign]
    return known


def _transformers_tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(folder))
