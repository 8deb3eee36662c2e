"""`mmscale eval`: exact match of an exported model on datasets."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

from rich.progress import Progress

import mmscale
from mmscale.errors import ConfigError
from mmscale.eval.exact_match import ask, score_table
from mmscale.streaming.shards import ShardSet


def run(
    model: str,
    data: list[str],
    out: str | None,
    batch_size: int,
    max_new_tokens: int,
    modalities: list[str],
    device: str,
) -> None:
    """Asks every row, writes each answer as it comes, and prints the table and what was skipped."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(Path(out).open("w", encoding="utf-8")) if out is not None else None
        except OSError as error:
            raise ConfigError(
                f"--out {out}: cannot be written: {error.strerror}; give a file in a folder that exists"
            ) from error
        shards = [ShardSet.open(Path(folder), Path(folder).resolve().name) for folder in data]
        generator = mmscale.load(model, device=device)
        progress = stack.enter_context(Progress())
        bar = progress.add_task("asking", total=sum(len(s) for s in shards))
        answers = []
        for rows in ask(generator, shards, modalities, batch_size, max_new_tokens):
            answers += rows
            if file is not None:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            progress.advance(bar, len(rows))
    for task, (right, total) in score_table(answers).items():
        print(f"{task:12s} exact_match {right / total:.4f}  ({right}/{total})")
    for row in answers:
        if "skipped" in row:
            print(f"skipped {row['id']}: {row['skipped']}")
