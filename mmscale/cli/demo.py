"""`mmscale demo`: the main job on real data, by the same commands that a user types."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mmscale
from mmscale.config.load import load_config
from mmscale.config.specs import media_specs
from mmscale.errors import ConfigError, MmscaleError
from mmscale.eval.exact_match import score_table
from mmscale.eval.report import draw_report
from mmscale.streaming.encode import decode_media
from mmscale.streaming.shards import ShardSet
from mmscale.types import MediaBytes, MediaSpecs

RECIPE = Path(mmscale.__file__).parent / "configs/recipes/digits.yaml"
MARKER = ".mmscale-demo"
HELDOUT = ("digits", "compare", "words", "video", "audio")
PICTURES = {"digits": 12, "words": 6, "video": 6}
"""Answers of each task on the report's picture."""


class DemoError(MmscaleError):
    """A command of the demo failed; its own output stands above."""


def run(folder: str) -> None:
    """Runs every part and prints the last line `demo: exact_match=<float> export=<dir> llava=<dir>`."""
    root = _fresh(Path(folder))
    data, run_dir, export, llava = (root / name for name in ("data", "run", "export", "llava"))
    started = time.monotonic()
    _command("mmscale-data", "demo", data)
    train = ["mmscale", "train", RECIPE, f"data.root={data}", f"run.dir={run_dir}"]
    trained = time.monotonic()
    _train_and_stop(train, run_dir, after_step=load_config(RECIPE).train.steps // 2)
    _command(*train)
    trained = time.monotonic() - trained
    _command("mmscale", "consolidate", run_dir, export)
    _command("mmscale", "consolidate", run_dir, llava, "--target", "llava", "--drop", "audio")
    tasks = [data / "heldout" / name for name in HELDOUT]
    _command("mmscale", "eval", export, *tasks, "--out", root / "answers.jsonl")
    stock = Path(mmscale.__file__).parent / "eval/stock_llava.py"
    _command("python", "-P", stock, llava, *tasks, "--out", root / "answers_llava.jsonl")
    answers, stock_answers = _rows(root / "answers.jsonl"), _rows(root / "answers_llava.jsonl")
    _compare(answers, stock_answers)
    scores = score_table(answers)
    _report(
        root,
        run_dir,
        data,
        answers,
        {task: f"{right}/{total} = {right / total:.3f}" for task, (right, total) in scores.items()},
    )
    print(
        f"training took {trained:.0f} s, everything {time.monotonic() - started:.0f} s; picture: {root / 'report.png'}"
    )
    right, total = scores["digits"]
    print(f"demo: exact_match={right / total:.4f} export={export} llava={llava}")


def _fresh(root: Path) -> Path:
    """An empty folder for the demo; only a folder that an earlier demo made is emptied."""
    if root.exists() and any(root.iterdir()):
        if not (root / MARKER).exists():
            raise ConfigError(
                f"expected a new or an earlier demo's folder, found other files in {root}; give another folder"
            )
        shutil.rmtree(root)
    root.mkdir(parents=True, exist_ok=True)
    (root / MARKER).touch()
    return root


def _program(name: str) -> str:
    """The command of this installation, whatever PATH says."""
    return sys.executable if name == "python" else str(Path(sys.executable).parent / name)


def _show(words: Sequence[object]) -> None:
    print(f"\n$ {shlex.join(str(w) for w in words)}", flush=True)


def _command(*words: object) -> None:
    """Prints and runs one command."""
    _show(words)
    name, *rest = (str(w) for w in words)
    code = subprocess.run([_program(name), *rest], check=False).returncode
    if code:
        raise DemoError(f"'{name}' ended with exit code {code}; its message stands above")


def _train_and_stop(words: Sequence[object], run_dir: Path, after_step: int) -> None:
    """Starts the training and stops it by SIGTERM once `after_step` steps are done; it saves and exits with 0."""
    _show(words)
    name, *rest = (str(w) for w in words)
    process = subprocess.Popen([_program(name), *rest])
    try:
        while process.poll() is None and _last_step(run_dir) < after_step:
            time.sleep(0.2)
        if process.poll() is None:
            print(f"\n$ kill -TERM {process.pid}    # half way: it saves, and the same command goes on", flush=True)
            process.send_signal(signal.SIGTERM)
        code = process.wait()
    finally:
        if process.poll() is None:
            process.kill()
    if code:
        raise DemoError(f"training ended with exit code {code}; its message stands above")


def _last_step(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    if not metrics.exists():
        return 0
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return max(steps, default=0)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _compare(ours: Sequence[dict[str, Any]], stock: Sequence[dict[str, Any]]) -> None:
    """Says how often the stock model gave the same answer, token for token, and fails when it did not."""
    own = {row["id"]: row["answer_ids"] for row in ours}
    different = [row["id"] for row in stock if own[row["id"]] != row["answer_ids"]]
    print(
        f"\nstock LLaVA, opened by transformers alone: {len(stock) - len(different)}/{len(stock)} answers equal token for token"
    )
    if different:
        raise DemoError(
            f"expected equal greedy answers from both exports, found {len(different)} that differ, first {different[0]}"
        )


def _report(root: Path, run_dir: Path, data: Path, answers: Sequence[dict[str, Any]], scores: dict[str, str]) -> None:
    print("\nexact match on held-out data")
    for task, score in scores.items():
        print(f"  {task:10s} {score}")
    config = load_config(RECIPE)
    specs = media_specs(config.model, config.data)
    pictures = []
    for task, count in PICTURES.items():
        shards = ShardSet.open(data / "heldout" / task, task)
        rows = {shards.id(i): i for i in range(len(shards))}
        for row in [a for a in answers if a["task"] == task][:count]:
            picture = _tower_inputs(shards.read(rows[row["id"]]).media[0], specs, config.data.image.max_pixels)
            question = re.sub(r"<\w+>", "", row["question"]).strip()
            pictures.append({"picture": picture, "question": question, "answer": row["answer"], "truth": row["truth"]})
    draw_report(run_dir, pictures, scores, root / "report.png")


def _tower_inputs(item: MediaBytes, specs: MediaSpecs, max_pixels: int) -> np.ndarray:
    """What the model sees of an image or a clip, side by side: uint8 [size, inputs * size, 3]."""
    inputs = decode_media(item, specs, max_pixels).data
    return torch.cat(list(inputs), dim=-1).permute(1, 2, 0).numpy()
