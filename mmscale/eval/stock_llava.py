"""Asks an exported LLaVA folder the questions of WebDataset tars with plain transformers; imports nothing of mmscale.

    python stock_llava.py MODEL DATASET... --out answers.jsonl

It is the proof that an export needs mmscale neither to be read nor to answer: transformers opens the weights, tokenizer,
processor and chat template, webdataset reads the shards. Rows with other media than images are left out and counted.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import webdataset
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

IMAGE = re.compile(r"(?:(\d+)\.)?(png|jpe?g|webp)")
OTHER_MEDIA = re.compile(r"(?:\d+\.)?(flac|wav|mp3|ogg|m4a|aac|mp4|webm|mkv)")


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of a dataset folder: id, first question, its true answer, images in order."""
    for tar in sorted(folder.glob("*.tar")):
        for sample in webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False):
            names = [name for name in sample if not name.startswith("__")]
            if any(OTHER_MEDIA.fullmatch(name) for name in names):
                continue
            images = sorted((int(m[1] or 0), name) for name in names if (m := IMAGE.fullmatch(name)))
            turns = json.loads(sample["json"])["conversations"]
            first = next(i for i, turn in enumerate(turns) if turn["from"] == "human")
            yield {
                "id": f"{folder.name}/{tar.name}:{sample['__key__']}",
                "system": [turn["value"] for turn in turns[:first] if turn["from"] == "system"],
                "question": turns[first]["value"],
                "truth": turns[first + 1]["value"],
                "images": [sample[name] for _, name in images],
            }


def messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The chat messages of a row: `<image>` tags become image parts where they stand."""
    parts: list[dict[str, str]] = []
    for i, text in enumerate(row["question"].split("<image>") if row["images"] else [row["question"]]):
        parts += [{"type": "image"}] if i else []
        parts += [{"type": "text", "text": text}] if text else []
    system = [{"role": "system", "content": [{"type": "text", "text": text}]} for text in row["system"]]
    return [*system, {"role": "user", "content": parts}]


def answer(model: Any, processor: Any, batch: Sequence[dict[str, Any]], max_new_tokens: int) -> list[list[int]]:
    """Greedy answers of a batch as token ids, without the end token."""
    prompts = [processor.apply_chat_template(messages(row), add_generation_prompt=True) for row in batch]
    images = [
        Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")).convert("RGB")
        for row in batch
        for data in row["images"]
    ]
    inputs = processor(text=prompts, images=images or None, padding=True, padding_side="left", return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    ends = model.generation_config.eos_token_id
    stops = set(ends if isinstance(ends, list) else [ends])
    answers = []
    for ids in output[:, inputs["input_ids"].shape[1] :].tolist():
        length = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        answers.append(ids[:length])
    return answers


def main() -> None:
    """Asks every row and writes one JSON line per row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("datasets", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    args = parser.parse_args()
    loaded: Any = LlavaForConditionalGeneration.from_pretrained(args.model, output_loading_info=True)
    model, loading = loaded
    bad = {name: keys for name, keys in loading.items() if keys}
    if bad:
        raise SystemExit(f"{args.model}: the weights do not fit the stock class: {bad}")
    processor = AutoProcessor.from_pretrained(args.model)
    asked = [row for folder in args.datasets for row in rows(folder)]
    with args.out.open("w", encoding="utf-8") as file:
        for start in range(0, len(asked), args.batch_size):
            batch = asked[start : start + args.batch_size]
            for row, ids in zip(batch, answer(model.eval(), processor, batch, args.max_new_tokens), strict=True):
                text = processor.tokenizer.decode(ids)
                line = {
                    "id": row["id"],
                    "question": row["question"],
                    "truth": row["truth"],
                    "answer": text,
                    "answer_ids": ids,
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            sys.stderr.write(f"\rstock LLaVA: {min(start + args.batch_size, len(asked))}/{len(asked)} questions")
    sys.stderr.write("\n")
    assert "mmscale" not in sys.modules, "this script must not need mmscale"


if __name__ == "__main__":
    main()
