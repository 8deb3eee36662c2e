"""Stands in for the command `mmscale` in tests of the batch script's own paths; real training is tested elsewhere.

`mmscale launch` does what `behaviour.json` in the run directory says: a list of attempts, each a list of actions:

    own           claims the run directory and goes on from the newest checkpoint, as rank 0 of the trainer does
    save:STEP     writes a whole checkpoint
    late:SECONDS  hears no signal for so long, as while Python starts
    wait          waits for a signal, then ends with outcome `stopped`
    end:OUTCOME   writes end.json
    done          writes DONE
    crash:NODE    exits with 1 on the node of that number, once node 0 has done what stands before; the others wait
    unwell:NODE   writes a failed health check of the node of that number
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mmscale.train.attempt import Attempt, write_json
from mmscale.train.manifest import file_record, folder_name, manifest_text

node = int(os.environ["SLURM_NODEID"])
heard: list[str] = []


def option(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


def handle(number: int, _frame: object) -> None:
    name = signal.Signals(number).name
    heard.append(name)
    write_json(folder / f"signal-{node}.json", {"signal": name, "at": time.time()})


def listen() -> None:
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, handle)


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)


def wait_for_signal() -> None:
    wait_for(lambda: heard)


def save(step: int, token: str) -> None:
    final = run / "checkpoints" / folder_name(step)
    final.mkdir(parents=True)
    (final / "trainer.json").write_text("{}")
    (final / "manifest.json").write_text(
        manifest_text(step, token, {"trainer.json": file_record(final / "trainer.json")})
    )


def act(action: str, attempt: Attempt, token: str) -> None:
    word, _, value = action.partition(":")
    if word == "late":
        time.sleep(float(value))
        listen()
    elif word == "wait":
        wait_for_signal()
        if node == 0 and heard:
            attempt.ended("stopped", reason=heard[0])
    elif word == "crash":
        if node == 0:
            write_json(folder / "ready-0.json", {})
        if node == int(value):
            wait_for(lambda: (folder / "ready-0.json").exists())  # SLURM kills the others when one has crashed
            sys.exit(1)
        wait_for_signal()
    elif word == "unwell" and node == int(value):
        report = {"host": "h", "node": os.environ["SLURMD_NODENAME"], "at": time.time(), "problems": ["no GPU answers"]}
        write_json(folder / f"health-{node}.json", report)
    elif node != 0:
        return
    elif word == "own":
        attempt.claim()
        attempt.started(max([int(p.name[5:]) for p in (run / "checkpoints").glob("step_*")], default=0), world_size=1)
    elif word == "save":
        save(int(value), token)
    elif word == "end":
        attempt.ended(value, reason=f"reason of {value}")
    elif word == "done":
        (run / "DONE").touch()


if sys.argv[1] == "launch":
    run = Path(next(word for word in sys.argv if word.startswith("run.dir=")).removeprefix("run.dir="))
    token = os.environ["MMSCALE_ATTEMPT"]
    folder = run / "attempts" / token
    write_json(folder / f"call-{node}.json", {"argv": sys.argv[1:], "env": dict(os.environ)})
    actions = json.loads((run / "behaviour.json").read_text())[len(list(run.glob("attempts/*/job.json"))) - 1]
    if not actions[0].startswith("late"):
        listen()
    attempt = Attempt(run, token)
    for action in actions:
        act(action, attempt, token)
elif sys.argv[1] == "consolidate":
    Path(sys.argv[3]).mkdir()  # fails when it is there
else:  # mmscale eval MODEL DATASET --out FILE
    row = {"task": Path(sys.argv[3]).name, "answer": "x", "truth": "x"}
    Path(option("--out")).write_text(json.dumps(row) + "\n")
