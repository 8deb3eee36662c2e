"""Real training on the test cluster: a small run, submitted as a user submits it, and what a test needs to hurt it."""

from __future__ import annotations

import json
import os
import signal
import sys
import tarfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import pytest
from cluster import Cluster, Job
from judge import Attempt, History, Recovery, check_losses, check_samples, read_attempts, read_history, recoveries, rows

from mmscale.train.attempt import read_json
from mmscale.train.goodput import goodput_of
from mmscale.train.manifest import folder_name

REPO = Path(__file__).parents[2]
RECIPE = REPO / "configs/recipes/digits.yaml"
SAVE_EVERY = 5
STEPS = 10 * SAVE_EVERY  # a run goes through several faults, each after one or two new checkpoints
HANG_FLOOR_S = 8.0
SMALL = (
    f"train.steps={STEPS}", f"train.save_every={SAVE_EVERY}", "train.keep_last=3", "train.warmup_steps=2", "train.global_batch=2",
    "parallel.engine=fsdp", "data.plan_group=2", "data.seq_len=384", "data.window=64", "data.workers=0", "eval.every=0",
    "run.tensorboard=false", "run.threads=1", "run.log_every=5", f"run.watch.hang_floor_s={HANG_FLOOR_S}", "run.watch.setup_limit_s=240",
    "run.watch.min_free_gb=0.1", "model.llm.config.num_hidden_layers=1", "model.vision.config.num_hidden_layers=1",
    "model.audio.config.encoder_layers=1",
)  # fmt: skip
"""Starts within seconds, makes a step in a tenth of one."""

MAX_GAP_S = 30.0
"""What is promised, from the death of an attempt to the first new step."""

LOADED = 4.0
"""A machine that is busy with something else may take so many times longer before a test fails."""


class Run:
    """A run directory and its jobs. Two nodes with one rank each unless said otherwise."""

    def __init__(self, cluster: Cluster, folder: Path, data: Path, *overrides: str) -> None:
        self.cluster = cluster
        self.folder = folder / "run"
        self.words = [f"data.root={data}", f"run.dir={self.folder}", *SMALL, *overrides]
        site = folder / "site.env"
        site.parent.mkdir(parents=True, exist_ok=True)
        site.write_text(f"VENV={sys.prefix}\nLEAD_S=30\nexport OMP_WAIT_POLICY=PASSIVE\n")
        self.env = {"MMSCALE_SITE": str(site), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def sbatch(
        self, *options: str, nodes: int = 2, env: dict[str, str] | None = None, words: tuple[str, ...] = ()
    ) -> Job:
        """The job of `sbatch slurm/pretrain.sbatch CONFIG ...`, as a user types it."""
        given = (f"--nodes={nodes}", "--time=10", "--signal=B:USR1@30", *options)
        script = REPO / "slurm/pretrain.sbatch"
        return self.cluster.submit(
            script, str(RECIPE), *self.words, *words, options=given, env={**self.env, **(env or {})}
        )

    # ---- what it has written

    def read(self, token: str, name: str) -> dict[str, Any] | None:
        """A record of an attempt, such as "start"; None while it is not there."""
        return read_json(self.folder / "attempts" / token / f"{name}.json")

    def events(self, name: str) -> list[dict[str, Any]]:
        return [row for row in rows(self.folder / "events.jsonl") if row["event"] == name]

    def last_step(self, token: str) -> int:
        """The newest step of an attempt; 0 = none."""
        return max((row["step"] for row in rows(self.folder / "metrics.jsonl") if row["attempt"] == token), default=0)

    def checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / folder_name(step)

    def log(self, token: str = "*") -> str:
        """The logs of an attempt's nodes."""
        return "\n".join(path.read_text() for path in sorted((self.folder / "logs").glob(f"{token}.node*.log")))

    @property
    def history(self) -> History:
        return read_history(self.folder)

    @property
    def attempts(self) -> list[Attempt]:
        return read_attempts(self.folder)

    # ---- waiting

    def wait(
        self, job: Job, condition: Callable[[], object], what: str, limit_s: float = 90, step_s: float = 0.02
    ) -> None:
        """Returns when `condition()` is true; an error with all logs when it is not in time."""
        try:
            job.wait_until(condition, limit_s, what, step_s)
        except AssertionError as error:
            tails = [f"---- {path.name}\n{path.read_text()[-4000:]}" for path in sorted(self.folder.glob("logs/*"))]
            raise AssertionError("\n".join([str(error), *tails])) from None

    def wait_step(self, job: Job, step: int, token: str) -> None:
        """Returns when an attempt has made a step."""
        self.wait(job, lambda: self.last_step(token) >= step, f"attempt {token} has made step {step}")

    def wait_checkpoint(self, job: Job, token: str, num: int = 1) -> int:
        """The step of the `num`th checkpoint of an attempt, as soon as it is committed."""
        self.wait(job, lambda: self.read(token, "start"), f"attempt {token} has chosen its checkpoint")
        step = (self.base(token) // SAVE_EVERY + num) * SAVE_EVERY
        manifest = self.checkpoint(step) / "manifest.json"
        self.wait(job, lambda: self._is_by(manifest, token), f"attempt {token} has saved step {step}")
        return step

    def wait_over(self, job: Job, token: str, limit_s: float = 60) -> dict[str, Any]:
        """What the batch script of an attempt has decided, as soon as it has."""
        self.wait(job, lambda: self.read(token, "after"), f"attempt {token} is over", limit_s, 0.1)
        return self.read(token, "after") or {}

    def wait_done(self, job: Job, limit_s: float = 120) -> None:
        """Returns when the run is finished and the job has ended well."""
        self.wait(job, lambda: (self.folder / "DONE").exists(), "the run is finished", limit_s, 0.1)
        assert job.wait_end(60) == "COMPLETED", job.log

    def base(self, token: str) -> int:
        """The step from which an attempt went on."""
        return int((self.read(token, "start") or {})["base_step"])

    def _is_by(self, manifest: Path, token: str) -> bool:
        return manifest.exists() and json.loads(manifest.read_text())["attempt"] == token

    # ---- processes

    def nodes(self, token: str) -> list[str]:
        """The nodes of an attempt that has begun, in the order of their ranks."""
        return list((self.read(token, "job") or {})["nodes"])

    def agent(self, job: Job, token: str, node_rank: int) -> int:
        """Pid of the agent of a node, as soon as it is there."""
        node = self.nodes(token)[node_rank]
        self.wait(job, lambda: self._agents(job, node), f"an agent runs on {node}")
        return self._agents(job, node)[0]

    def _agents(self, job: Job, node: str) -> list[int]:
        steps = [pid for step, pid in self.cluster.stepds(node).items() if step in (f"{job.id}.0", f"{job.id}.1")]
        return [pid for step in steps for pid in _children(step) if "launch" in _words(pid)]

    def ranks(self, job: Job, token: str) -> list[int]:
        """Pids of an attempt's ranks, as soon as all are there; one rank per node."""
        self.wait(job, lambda: self.read(token, "job"), f"attempt {token} begins")
        agents = [self.agent(job, token, number) for number in range(len(self.nodes(token)))]
        self.wait(job, lambda: all(_rank_of(agent) for agent in agents), f"all ranks of {token} have started")
        return [pid for agent in agents for pid in _rank_of(agent)]

    # ---- judging

    def check_equals(self, expected: History, rel: float = 0.0, unnoticed_s: float = 0.0) -> list[Recovery]:
        """How the run recovered each time. AssertionError unless its history is `expected`, it was back in time, and its goodput
        account leaves no time out.

        Args:
            unnoticed_s: how long SLURM needs to find a node dead, which is no time of the run's.
        """
        check_samples(self.history, expected)
        check_losses(self.history, expected, rel)
        found = recoveries(self.folder)
        self._check_account(found)
        for one in found:
            print(f"\n{one}", end="")
            assert one.gap_s <= MAX_GAP_S * LOADED + unnoticed_s, str(one)
        return found

    def _check_account(self, found: list[Recovery]) -> None:
        """AssertionError unless the goodput categories make up the wall-clock, from the first submission to the last step at least."""
        account, attempts = goodput_of(self.folder), self.attempts
        assert sum(account.seconds.values()) == pytest.approx(account.wall_s, abs=1e-3)
        begin, end = attempts[0].submitted_at, max(one.last_at or 0.0 for one in attempts)
        assert begin is not None and account.wall_s >= end - begin - 1
        assert [one.token for one in account.attempts] == [one.token for one in attempts if one.outcome != "refused"]
        num_redone = sum(one.redone for one in found)
        assert sum(one.num_redone for one in account.attempts) == num_redone
        assert (account.seconds["redone"] > 0) == (num_redone > 0)


def kill(pid: int) -> float:
    """The unix seconds at which a process got SIGKILL."""
    os.kill(pid, signal.SIGKILL)
    return time.time()


def loads(pid: int, library: str) -> bool:
    """Whether a process has a library in its memory."""
    try:
        return library in Path(f"/proc/{pid}/maps").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def replace_sample(source: Path, key: str, change: Callable[[bytes], bytes], ext: str) -> None:
    """Writes another content into one member of a source's shard, and its index again."""
    from mmscale.data_tools.indexing import index_folder

    path = source / "000000.tar"
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar.getmembers()]  # type: ignore[union-attr]
    names = [member.name for member, _ in members]
    assert f"{key}.{ext}" in names, f"no {key}.{ext} in {path}"
    with tarfile.open(path, "w") as tar:
        for member, data in members:
            content = change(data) if member.name == f"{key}.{ext}" else data
            member.size = len(content)
            tar.addfile(member, BytesIO(content))
    for old in [*source.glob("*.idx"), source / "manifest.json"]:
        old.unlink()
    index_folder(source)


def _rank_of(agent: int) -> list[int]:
    """Pids of the ranks below an agent."""
    return [pid for pid in _children(agent) if "train" in _words(pid)]


def _children(pid: int) -> list[int]:
    try:
        return [process.pid for process in psutil.Process(pid).children()]
    except psutil.NoSuchProcess:
        return []


def _words(pid: int) -> list[str]:
    try:
        return psutil.Process(pid).cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []
