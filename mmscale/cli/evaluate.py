"""`mmscale eval`: exact match of an exported model on datasets."""

from __future__ import annotations

from pathlib import Path

from rich.progress import Progress

import mmscale
from mmscale.eval.exact_match import ask, score_table, write_answers
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
    """Asks every row, prints the table and writes the answers."""
    generator = mmscale.load(model, device=device)
    shards = [ShardSet.open(Path(folder), Path(folder).name) for folder in data]
    answers = []
    with Progress() as progress:
        bar = progress.add_task("asking", total=sum(len(s) for s in shards))
        for rows in ask(generator, shards, modalities, batch_size, max_new_tokens):
            answers += rows
            progress.advance(bar, len(rows))
    if out is not None:
        write_answers(Path(out), answers)
    for task, (right, total) in score_table(answers).items():
        print(f"{task:12s} exact_match {right / total:.4f}  ({right}/{total})")
