"""Exact match by task: an exported model answers the first question of every row of some datasets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from mmscale.errors import BadSampleError, DataError
from mmscale.streaming.shards import ShardSet
from mmscale.types import Sample, Turn


class GivenAnswer(Protocol):
    """An answer: its text, and its token ids without the end token."""

    @property
    def text(self) -> str:
        """The text."""
        ...

    @property
    def ids(self) -> Sequence[int]:
        """The token ids."""
        ...


class Answerer(Protocol):
    """What is examined: answers conversations in batches, such as `mmscale.load(folder)`."""

    def answer(self, samples: Sequence[Sample], max_new_tokens: int) -> Sequence[GivenAnswer]:
        """One answer per sample."""
        ...


def task_of(sample_id: str) -> str:
    """The task of a row: its key up to the last underscore, or its dataset's name when keys are numbers.

    Example:
        >>> task_of("audio/000000.tar:beeps_00012"), task_of("mine/000000.tar:000000012")
        ('beeps', 'mine')
    """
    dataset, _, key = sample_id.partition(":")
    return key.rpartition("/")[2].rpartition("_")[0] or dataset.rpartition("/")[0]


def first_question(sample: Sample) -> tuple[Sample, str] | None:
    """The sample cut after its first user turn, and the true answer; None when there is no answered question."""
    for i, turn in enumerate(sample.turns[:-1]):
        if turn.role == "user" and sample.turns[i + 1].role == "assistant":
            return dataclasses.replace(sample, turns=sample.turns[: i + 1]), sample.turns[i + 1].text
    return None


def ask(
    generator: Answerer, shards: Sequence[ShardSet], modalities: Iterable[str], batch_size: int, max_new_tokens: int
) -> Iterator[list[dict[str, Any]]]:
    """Answers in batches: `id`, `task`, `question`, `answer`, `answer_ids`, `truth` of each row.

    Rows with a medium outside `modalities` are left out, and so are rows without an answered question. A row that cannot be
    read gives `id`, `task` and `skipped`, the reason.
    """
    allowed = set(modalities)
    batch: list[tuple[Sample, str]] = []
    for dataset in shards:
        for row in range(len(dataset)):
            try:
                question = first_question(dataset.read(row))
            except BadSampleError as error:
                yield [_skipped(dataset.id(row), error)]
                continue
            if question is None or any(m.modality not in allowed for m in question[0].media):
                continue
            batch.append(question)
            if len(batch) == batch_size:
                yield _answer(generator, batch, max_new_tokens)
                batch = []
    if batch:
        yield _answer(generator, batch, max_new_tokens)


def _answer(generator: Answerer, batch: Sequence[tuple[Sample, str]], max_new_tokens: int) -> list[dict[str, Any]]:
    """The rows of a batch; when one sample cannot be read, each is asked alone and that one is skipped."""
    try:
        answers = generator.answer([sample for sample, _ in batch], max_new_tokens)
    except DataError as error:
        if len(batch) == 1:
            return [_skipped(batch[0][0].id, error)]
        return [row for one in batch for row in _answer(generator, [one], max_new_tokens)]
    return [
        {
            "id": sample.id,
            "task": task_of(sample.id),
            "question": last_user_text(sample.turns),
            "answer": answer.text,
            "answer_ids": list(answer.ids),
            "truth": truth,
        }
        for (sample, truth), answer in zip(batch, answers, strict=True)
    ]


def _skipped(sample_id: str, error: DataError) -> dict[str, Any]:
    return {"id": sample_id, "task": task_of(sample_id), "skipped": str(error)}


def last_user_text(turns: Sequence[Turn]) -> str:
    """The text of the last user turn."""
    return next(turn.text for turn in reversed(turns) if turn.role == "user")


def score_table(answers: Iterable[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """Task -> (answers equal to the truth, questions asked), in order of first appearance; surrounding blanks do not count."""
    table: dict[str, tuple[int, int]] = {}
    for row in answers:
        if "skipped" in row:
            continue
        right, total = table.get(row["task"], (0, 0))
        table[row["task"]] = (right + (row["answer"].strip() == row["truth"].strip()), total + 1)
    return table
