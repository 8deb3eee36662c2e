"""`mmscale launch` with real ranks: death, signals at every time, hangs, a bad node; two agents on one machine stand for two nodes."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

RECIPE = Path(__file__).parents[2] / "configs/recipes/digits.yaml"
MMSCALE = Path(sys.executable).parent / "mmscale"
TOKEN = "77.0"
LIMIT_S = 120
SMALL = [
    "train.steps=5000", "train.save_every=1000", "train.warmup_steps=2", "train.global_batch=2", "data.plan_group=2", "data.seq_len=384",
    "data.window=64", "data.workers=0", "eval.every=0", "run.tensorboard=false", "run.threads=1", "parallel.engine=fsdp",
    "model.llm.config.num_hidden_layers=1", "model.vision.config.num_hidden_layers=1", "model.audio.config.encoder_layers=1",
    "run.watch.min_free_gb=0", "run.watch.straggler_every=0",
]  # fmt: skip

ALONE = "parallel.engine=auto"


class Launched:
    """One agent that runs, its log, and the run directory."""

    def __init__(self, data: Path, run: Path, options: list[str], words: list[str], shell: str = "") -> None:
        self.run = run
        folder = run / "attempts" / TOKEN
        folder.mkdir(parents=True, exist_ok=True)  # as the job script does
        self.log = run.parent / f"log-{secrets.token_hex(4)}"
        command = [str(MMSCALE), "launch", *options, str(RECIPE), f"data.root={data}", f"run.dir={run}", *SMALL, *words]
        if shell:
            command = ["bash", "-c", f'{shell} exec "$@"', "bash", *command]
        env = os.environ | {"MMSCALE_ATTEMPT": TOKEN, "SLURMD_NODENAME": "fx1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stderr=log, stdout=log, env=env)

    @property
    def text(self) -> str:
        return self.log.read_text()

    @property
    def steps(self) -> int:
        path = self.run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def fact(self, name: str) -> dict:
        return json.loads((self.run / "attempts" / TOKEN / name).read_text())

    def wait_for(self, what, is_true) -> None:
        limit = time.monotonic() + LIMIT_S
        while not is_true():
            assert self.process.poll() is None, f"ended with {self.process.returncode} before {what}:\n{self.text}"
            assert time.monotonic() < limit, f"no {what} within {LIMIT_S} s:\n{self.text}"
            time.sleep(0.005)

    def wait_for_steps(self, count: int) -> None:
        self.wait_for(f"{count} steps", lambda: self.steps >= count)

    def ranks(self) -> list[psutil.Process]:
        """The processes of the ranks, in their order."""
        found = [p for p in psutil.Process(self.process.pid).children() if "train" in p.cmdline()]
        return sorted(found, key=lambda p: p.pid)

    def tree(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self) -> int:
        return self.process.wait(LIMIT_S)


@pytest.fixture
def launch(demo_data, tmp_path):
    """Starts agents; ends what is left of them."""
    launched = []

    def start(*words: str, ranks: int = 1, shell: str = "", options: tuple[str, ...] = ()) -> Launched:
        all_options = ["--nproc-per-node", str(ranks), *options]
        launched.append(Launched(demo_data, tmp_path / "run", all_options, list(words), shell))
        return launched[-1]

    yield start
    for one in launched:
        if one.process.poll() is None:
            for process in [*one.tree(), psutil.Process(one.process.pid)]:
                process.kill()
            one.process.wait(30)


def catches(pid: int, number: int) -> bool:
    line = next(li for li in Path(f"/proc/{pid}/status").read_text().splitlines() if li.startswith("SigCgt"))
    return bool(int(line.split()[1], 16) >> (number - 1) & 1)


def are_gone(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def test_a_killed_rank_is_named_and_ends_the_others(launch) -> None:
    agent = launch(ranks=2)
    agent.wait_for_steps(2)
    first, second = agent.ranks()
    second.kill()
    started = time.monotonic()
    assert agent.end() == 1
    assert time.monotonic() - started < 15
    text = rf"rank 1 \(process {second.pid} on \S+\) was ended by SIGKILL; its last word, \S+ s ago: step \d+, phase (data|step)"
    assert re.search(text, agent.text), agent.text
    assert are_gone([first])


def test_ranks_and_their_loaders_die_with_the_agent(launch) -> None:
    agent = launch(ALONE, "data.workers=1")
    agent.wait_for_steps(2)
    tree = agent.tree()
    assert len(tree) == 2
    (rank,) = agent.ranks()
    rank.suspend()  # so must one that hangs
    agent.process.kill()
    agent.process.wait(30)
    limit = time.monotonic() + 20
    while not are_gone(tree):
        assert time.monotonic() < limit, f"{[p for p in tree if p.is_running()]} outlive their agent"
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_a_signal_saves_once(launch, name) -> None:
    """A job script sends SIGUSR1 to the agent, which its wrapper let ignore it; SLURM sends SIGTERM to all processes of a step."""
    agent = launch(ALONE, shell="trap '' USR1;") if name == "SIGUSR1" else launch("data.workers=2", ranks=2)
    agent.wait_for_steps(3)
    started = time.monotonic()
    for target in [agent.process] if name == "SIGUSR1" else [agent.process, *agent.tree()]:
        target.send_signal(getattr(signal, name))
    assert agent.end() == 0, agent.text
    print(f"from {name} to the end of the agent: {time.monotonic() - started:.1f} s")
    saves = [p.name for p in (agent.run / "checkpoints").glob("step_*")]
    assert saves == [f"step_{agent.steps:08d}"], agent.text
    assert agent.fact("signal-0.json")["signal"] == name
    assert agent.fact("end.json")["outcome"] == "stopped"


@pytest.mark.parametrize("handlers_stand", [False, True])
def test_a_signal_during_start_up_ends_at_once(launch, handlers_stand) -> None:
    """Before torch is imported, before and after the ranks have handlers: there is nothing to save."""
    agent = launch(ranks=2)
    agent.wait_for("both ranks", lambda: len(agent.ranks()) == 2)
    if handlers_stand:
        agent.wait_for("handlers", lambda: all(catches(p.pid, signal.SIGTERM) for p in agent.ranks()))
    ranks = agent.ranks()
    agent.process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert agent.end() == 0, agent.text
    assert time.monotonic() - started < 5, "KillWait may be 5 s"
    assert "SIGTERM during start-up, nothing to save" in agent.text
    assert agent.fact("signal-0.json")["signal"] == "SIGTERM"
    assert are_gone(ranks)
    assert not (agent.run / "OWNER").exists()


def test_a_signal_to_a_rank_before_its_handler_stands_is_neither_lost_nor_fatal(launch) -> None:
    agent = launch(ALONE)
    agent.wait_for("a rank", agent.ranks)
    (rank,) = agent.ranks()
    assert not catches(rank.pid, signal.SIGUSR1)
    rank.send_signal(signal.SIGUSR1)
    assert agent.end() == 0, agent.text
    assert "SIGUSR1: saving at the next step" in agent.text
    assert agent.steps <= 1


def test_a_hang_is_found_named_and_shown_on_two_nodes(launch) -> None:
    words = ("run.watch.hang_floor_s=5", "run.watch.hang_factor=2")
    meet = ("--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port()))
    nodes = [launch(*words, options=(*meet, "--node-rank", str(k))) for k in range(2)]
    for node in nodes:
        node.wait_for_steps(4)
    (stopped,) = nodes[1].ranks()
    stopped.suspend()
    started = time.monotonic()
    assert [node.end() for node in nodes] == [1, 1], nodes[1].text
    took_s = time.monotonic() - started
    facts = [nodes[0].fact(f"hang-{k}.json") for k in range(2)]
    limit_s = max(fact["limit_s"] for fact in facts)
    print(f"found and ended {took_s:.1f} s after the stop, the limit is {limit_s} s")
    assert took_s < limit_s + 20
    for k, (node, fact) in enumerate(zip(nodes, facts, strict=True)):
        assert (fact["slowest"]["rank"], fact["slowest"]["halted"]) == (1, True), node.text
        assert re.search(
            r"hang: rank 1 on \S+ is at step \d+, phase (data|step) since \d+ s, the limit is \d+ s", node.text
        )
        stacks = (node.run / "attempts" / TOKEN / fact["stacks"]).read_text()
        assert stacks in node.text
        assert f"--- rank {k}, process " in stacks
        assert "loop.py" in stacks and "in _steps" in stacks, stacks
    assert "its process did not run" in (nodes[1].run / "attempts" / TOKEN / "stacks-1.txt").read_text()


def test_a_start_up_that_hangs_is_found(launch) -> None:
    agent = launch("run.watch.setup_limit_s=2")
    agent.wait_for("a rank", agent.ranks)
    (rank,) = agent.ranks()
    agent.wait_for("the handler of stacks", lambda: catches(rank.pid, signal.SIGUSR2))
    rank.suspend()
    assert agent.end() == 1
    assert re.search(r"hang: rank 0 on \S+ is at step 0, phase setup since [23] s, the limit is 2 s", agent.text)
    assert "File " in (agent.run / "attempts" / TOKEN / "stacks-0.txt").read_text()


def test_refused_input_is_exit_code_2(launch) -> None:
    agent = launch("data.sources.text.path=nowhere")
    assert agent.end() == 2, agent.text
    assert "nowhere" in agent.text and "rank 0" in agent.text
    assert launch("train.no_such_key=1").end() == 2


def test_an_unfit_node_starts_nothing(launch) -> None:
    agent = launch("run.watch.min_free_gb=1000000")
    assert agent.end() == 1
    (line,) = [li for li in agent.text.splitlines() if "not fit to train" in li]
    assert "memory" in line and "node fx1" in line
    report = agent.fact("health-0.json")
    assert report["node"] == "fx1" and report["host"] == socket.gethostname() and len(report["problems"]) == 2
    assert not (agent.run / "OWNER").exists()


def test_options_that_do_not_fit_are_refused(launch) -> None:
    assert launch(options=("--nnodes", "2", "--node-rank", "2")).end() == 2
    alone = launch(options=("--nnodes", "2"))
    assert alone.end() == 2 and "--master-addr" in alone.text


def test_the_agent_is_light() -> None:
    """It has to stand before signals can come: no torch, and less than half a second of work."""
    code = "import sys, resource, mmscale.cli.main, mmscale.cli.launch, mmscale.cluster.agent, mmscale.config.load\n"
    code += "used = resource.getrusage(resource.RUSAGE_SELF)\n"
    code += "print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules], used.ru_utime + used.ru_stime)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, cpu_s = done.stdout.rsplit(" ", 1)
    assert heavy == "[]"
    print(f"the agent's imports take {float(cpu_s):.2f} s")
    assert float(cpu_s) < 0.5


def free_port() -> int:
    """Below the ports that the kernel hands out to connections."""
    while True:
        port = 15_000 + secrets.randbelow(15_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
