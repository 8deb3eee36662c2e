"""Answers of an array of `mmscale eval` tasks into one file: `python -m mmscale.eval.merge FOLDER --parts N`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mmscale.eval.exact_match import score_table


def merge_parts(folder: Path, num_parts: int) -> str:
    """The table of all answers once every part is there, else a line that names the missing parts.

    Args:
        folder: holds 00000.jsonl, 00001.jsonl, ...; `answers.jsonl` is written beside them when all are there.
    """
    parts = [folder / f"{number:05d}.jsonl" for number in range(num_parts)]
    missing = [path.name for path in parts if not path.exists()]
    if missing:
        return f"{num_parts - len(missing)} of {num_parts} parts are there, missing: {', '.join(missing)}"
    lines = [line for path in parts for line in path.read_text(encoding="utf-8").splitlines()]
    temporary = folder / f".answers.{os.getpid()}.tmp"  # two tasks may end together
    temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    os.replace(temporary, folder / "answers.jsonl")
    table = score_table(json.loads(line) for line in lines)
    rows = [f"{task:12s} exact_match {right / total:.4f}  ({right}/{total})" for task, (right, total) in table.items()]
    return "\n".join([*rows, f"{len(lines)} answers of {num_parts} datasets in {folder / 'answers.jsonl'}"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Merges and prints."""
    parser = argparse.ArgumentParser(
        prog="python -m mmscale.eval.merge", description="Answers of an array into one file."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", type=int, required=True)
    given = parser.parse_args(arguments)
    sys.stdout.write(merge_parts(given.folder, given.parts) + "\n")


if __name__ == "__main__":
    main()
