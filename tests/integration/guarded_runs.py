"""Runs of the digits recipe with a batch that gives no finite loss, and what they leave behind.

No sample can be made that gives NaN by itself. So the weights have one embedding that is infinite, of a token that one sample of the
first steps alone contains: the batch of its step is the only one that meets it.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).parents[2] / "configs/recipes/digits.yaml"
MMSCALE = Path(sys.executable).parent / "mmscale"
STEPS, SAVE_EVERY = 14, 3
SMALL = [
    f"train.steps={STEPS}", f"train.save_every={SAVE_EVERY}", "train.keep_last=9", "train.warmup_steps=2", "train.global_batch=2",
    "data.plan_group=2", "data.seq_len=384", "data.window=64", "data.workers=0", "eval.every=0", "run.tensorboard=false",
    "run.threads=1", "run.device=cpu", "model.llm.config.num_hidden_layers=1", "model.vision.config.num_hidden_layers=1",
    "model.audio.config.encoder_layers=1",
]  # fmt: skip


@dataclass(frozen=True)
class Poison:
    """`step`: the one whose batch has no finite loss, `sample`: the sample that is to blame, `words`: for `mmscale train`."""

    step: int
    sample: str
    words: tuple[str, ...]

    def run(self, folder: Path, *more: str) -> list[str]:
        """The arguments of a run in `folder`."""
        return [str(RECIPE), *SMALL, *self.words, f"run.dir={folder}", *more]


def make_poison(data: Path, folder: Path) -> Poison:
    """Chooses an order of the data and a token, and writes the weights."""
    import torch

    from mmscale.config.specs import media_specs
    from mmscale.model.composite import build_model
    from mmscale.train.setup import load_tokenizer

    root = f"data.root={data}"
    # neither at a save nor right after one, so that a rollback undoes a sound step too
    step = 2 * SAVE_EVERY + 2
    found = ((seed, *one) for seed in range(50) for one in _rare_tokens([root, f"data.seed={seed}"]) if one[1] == step)
    seed, token, _, sample = next(found)
    config = _config([root])
    llm = build_model(config, load_tokenizer(config).vocab_size, media_specs(config.model, config.data)).llm
    with torch.no_grad():
        llm.get_input_embeddings().weight[token] = math.inf
    llm.save_pretrained(folder / "llm")
    weights = ("model.llm.config=null", f"model.llm.path={folder / 'llm'}")
    return Poison(step, sample, (root, f"data.seed={seed}", *weights))


def _rare_tokens(words: Sequence[str]) -> list[tuple[int, int, str]]:
    """(token, step, sample) of the tokens that one sample of all steps alone contains."""
    from mmscale.config.env import Launch
    from mmscale.parallel.mesh import init_mesh
    from mmscale.train.setup import open_again

    config = _config(words)
    mesh = init_mesh(config.parallel, "cpu", Launch())
    with open_again(config, mesh, None) as run, closing(run.stream.steps()) as steps:
        where = [
            (token, step, name)
            for step, batch in enumerate(islice(steps, STEPS), 1)
            for pack in batch.packs
            for name, ids in zip(pack.ids, pack.input_ids.split(pack.lengths), strict=True)
            for token in set(ids.tolist())
        ]
    often = Counter(token for token, _, _ in where)
    return [one for one in where if often[one[0]] == 1]


def _config(words: Sequence[str]) -> Any:
    from mmscale.config.load import load_config

    return load_config(str(RECIPE), [*SMALL, "run.dir=nowhere", *words])


def train_here(arguments: Sequence[str]) -> None:
    """A run in this process."""
    from mmscale.config.env import Launch
    from mmscale.config.load import load_config
    from mmscale.parallel.mesh import init_mesh
    from mmscale.train.loop import train

    path, *words = arguments
    config = load_config(path, words)
    train(config, init_mesh(config.parallel, "cpu", Launch()))


def _command(arguments: list[str]) -> None:
    from mmscale.cli import train

    os.setpgid(0, 0)
    train.run(arguments[0], arguments[1:])


def start(arguments: list[str]) -> Any:
    """A run in a process of its own, which has its imports already."""
    import mmscale.cli.train
    import mmscale.train.loop  # noqa: F401

    process = multiprocessing.get_context("fork").Process(target=_command, args=(arguments,))
    process.start()
    return process


def on_ranks(world_size: int, *words: str, limit_s: float = 180) -> list[subprocess.CompletedProcess[str]]:
    """`mmscale WORDS` on some ranks, each a process with torchrun's variables; what each has printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world_size):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        env = {**os.environ, "MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen([str(MMSCALE), *words], env=env, **pipes))  # type: ignore[call-overload]
    try:
        texts = [process.communicate(timeout=limit_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [subprocess.CompletedProcess(p.args, p.returncode, *t) for p, t in zip(processes, texts, strict=True)]


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    """All whole lines of a file of JSON lines."""
    path = run / name
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def rows(run: Path, name: str = "metrics.jsonl") -> dict[int, dict[str, Any]]:
    """step -> its last line."""
    return {row["step"]: row for row in lines(run, name)}


def losses(run: Path) -> dict[int, str | None]:
    """step -> `loss_hex`."""
    return {step: row["loss_hex"] for step, row in sorted(rows(run).items())}


def ledger(run: Path) -> dict[int, list[str]]:
    """step -> the samples of its global batch."""
    return {step: row["ids"] for step, row in sorted(rows(run, "ledger.jsonl").items())}


def events(run: Path, *names: str) -> list[dict[str, Any]]:
    """The events of some names, in order."""
    return [row for row in lines(run, "events.jsonl") if row["event"] in names]


def pass_over(run: Path, *steps: int) -> None:
    """Writes down, before a run, that it passes some steps over."""
    run.mkdir()
    content = {"steps": {str(step): {"reason": "given", "ids": []} for step in steps}, "rollbacks": 0}
    (run / "passed_over.json").write_text(json.dumps(content))
