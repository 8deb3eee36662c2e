"""A throw-away SLURM cluster on loopback: real slurmctld, slurmd and munged, in one folder, for one test session.

Nothing outside the folder is read or written, so clusters do not disturb each other nor a SLURM installed on the
machine: each has its own munged (key and socket), its own ports and its own range of job ids.
The daemons run in the foreground as children, so they are stopped by pid and end with this process however it ends.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import psutil
from cluster_config import config_text, take_slot

PROGRAMS = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "setpriv")
ENDED = frozenset({"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "SPECIAL_EXIT", "BOOT_FAIL", "DEADLINE"})
TAIL_LINES = 25


def why_not_here() -> str | None:
    """Why this machine cannot run a cluster; None when it can."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=_search_path()) is None]
    if missing:
        return f"programs not found: {', '.join(missing)}; install the packages slurm-wlm and munge"
    if os.geteuid() != 0:
        return f"slurmd needs root, found user id {os.geteuid()}"
    return None


PATIENCE = 3.0
"""A limit is there so that a test that is stuck ends; no test measures a time by it."""


def poll(condition: Callable[[], object], limit_s: float, step_s: float = 0.05) -> bool:
    """True as soon as `condition()` is true, False when it is not within `limit_s` seconds."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(step_s)
    return True


class Cluster:
    """A running SLURM cluster with nodes fx1, fx2, ...; a context manager that starts and stops it.

    Use one from the main thread: the daemons end with the thread that started them.
    """

    KILL_WAIT_S = 5
    SLURMD_TIMEOUT_S = 10

    def __init__(self, root: Path, num_nodes: int = 3, cpus_per_node: int = 4) -> None:
        """
        Args:
            root: an empty folder, not read by anybody else. Short: paths of unix sockets end at 107 characters.
            num_nodes: 1 to 15.
            cpus_per_node: what SLURM believes, whatever the machine has.
        """
        self.root = root
        self.nodes = [f"fx{number + 1}" for number in range(num_nodes)]
        self.cpus_per_node = cpus_per_node
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        self.env |= {"SLURM_CONF": str(root / "slurm.conf"), "PATH": _search_path()}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._slot_lock = -1

    def __enter__(self) -> Cluster:
        (self.root / "log").mkdir(parents=True)
        (self.root / "state").mkdir()
        slot, self._slot_lock = take_slot(len(self.nodes))
        try:
            text = config_text(self.root, slot, self.nodes, self.cpus_per_node, self.KILL_WAIT_S, self.SLURMD_TIMEOUT_S)
            Path(self.env["SLURM_CONF"]).write_text(text)
            self._start_munged()
            self.start_controller(is_first=True)
            for name in self.nodes:
                self.start_node(name)
            self.wait_until(self._is_clean, 30, "all nodes are idle")
        except BaseException:
            self._stop_daemons()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.cancel_all()
        finally:
            self._stop_daemons()

    # ---- commands and jobs

    def run(self, *command: str, env: Mapping[str, str] | None = None, is_checked: bool = True) -> str:
        """What a command prints on this cluster, without the last line end; stderr too when it may fail.

        Args:
            command: such as `"squeue", "-h"`.
            env: variables on top of `self.env`.
            is_checked: False = an exit status other than 0 is not an error.
        """
        result = subprocess.run(command, env={**self.env, **(env or {})}, capture_output=True, text=True, timeout=60)
        if is_checked and result.returncode != 0:
            raise AssertionError(
                f"{' '.join(command)} ended with {result.returncode}:\n{result.stdout}{result.stderr}\n{self.report()}"
            )
        return (result.stdout if is_checked else result.stdout + result.stderr).rstrip("\n")

    def submit(
        self, script: Path, *args: str, options: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> Job:
        """The job that `sbatch` makes of a script; its log is `root/log/job-ID.log` unless `options` say otherwise."""
        log = f"--output={self.root}/log/job-%j.log"
        answer = self.run("sbatch", "--parsable", log, *options, str(script), *args, env=env)
        return Job(self, int(answer))

    def submit_text(
        self, text: str, *args: str, options: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> Job:
        """The job that `sbatch` makes of the bash lines in `text`; its log keeps the lines of all attempts."""
        script = self.root / f"script-{secrets.token_hex(4)}.sh"
        script.write_text("#!/bin/bash\n#SBATCH --open-mode=append\n" + text)
        return self.submit(script, *args, options=options, env=env)

    def job(self, job_id: int) -> Job:
        """The handle of a job that somebody else submitted."""
        return Job(self, job_id)

    def cancel_all(self) -> None:
        """Ends every job and returns when the queue is empty."""
        jobs = self.run("squeue", "-h", "-o", "%A", is_checked=False).split()
        numbers = [word for word in jobs if word.isdigit()]
        if numbers:
            self.run("scancel", "--full", "--signal=KILL", *numbers, is_checked=False)  # spares KillWait
            self.run("scancel", *numbers, is_checked=False)
        self.wait_until(lambda: not self.run("squeue", "-h"), 40, "the queue is empty")

    # ---- daemons

    def start_controller(self, is_first: bool = False) -> None:
        """Starts slurmctld with the state it left (`is_first`: with none) and returns when it answers."""
        self._spawn("slurmctld", ["slurmctld", "-D", "-f", self.env["SLURM_CONF"], *(["-c"] if is_first else [])])
        self.wait_until(lambda: " is UP" in self.run("scontrol", "ping", is_checked=False), 30, "slurmctld answers")

    def kill_controller(self) -> None:
        """Ends slurmctld with SIGKILL. It forgets what happened in the last 5 s, a new job too: it saves at that interval."""
        self._kill_daemon("slurmctld")

    def restart_controller(self) -> None:
        """Kills slurmctld and starts it again from what it had saved."""
        self.kill_controller()
        self.start_controller()

    def start_node(self, name: str) -> None:
        """Starts the slurmd of a node. Does not wait: `wait_node` does."""
        self._spawn(name, ["slurmd", "-D", "-f", self.env["SLURM_CONF"], "-N", name])

    def wait_node(self, name: str, state: str, limit_s: float = 60) -> None:
        """Returns when `state`, such as IDLE or DOWN, is among the states of a node."""
        self.wait_until(lambda: state in self.node_states(name), limit_s, f"node {name} is {state}")

    def node_states(self, name: str) -> list[str]:
        """The states of a node, such as ["DOWN", "NOT_RESPONDING"].

        From scontrol: sinfo prints `completing*` for a dead node.
        """
        found = re.search(r"State=(\S+)", self.run("scontrol", "show", "node", name, is_checked=False))
        return found[1].replace("*", "+NOT_RESPONDING").split("+") if found else []

    def kill_slurmd(self, name: str) -> None:
        """Ends the slurmd of a node with SIGKILL; the steps and ranks on the node go on."""
        self._kill_daemon(name)

    def kill_node(self, name: str) -> None:
        """Ends everything on a node with SIGKILL, as a power cut does: slurmd, the slurmstepds and all below them."""
        self._kill_daemon(name)

        def is_dead() -> bool:
            pids = self.processes(name)
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):  # it ended by itself, which is what was wanted
                    os.kill(pid, signal.SIGKILL)
            return not pids

        self.wait_until(is_dead, 10, f"node {name} is dead")

    def processes(self, name: str) -> list[int]:
        """Pids of all processes on a node: slurmd, slurmstepds and what they started, orphans too.

        slurmd and slurmstepd hold the node's log open; what they start has the node's name in its environment.
        """
        log = str(self.root / "log" / f"slurmd-{name}.log")
        wanted = {"SLURMD_NODENAME": name, "SLURM_CONF": self.env["SLURM_CONF"]}.items()
        pids = []
        for process in psutil.process_iter():
            # ended since, or a process of the machine that even root may not look into
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if wanted <= process.environ().items() or log in {file.path for file in process.open_files()}:
                    pids.append(process.pid)
        return pids

    def stepds(self, name: str) -> dict[str, int]:
        """Pid of each slurmstepd on a node by its step, such as {"1000.batch": 77, "1000.0": 78}."""
        pids = {}
        for pid in self.processes(name):
            with contextlib.suppress(psutil.NoSuchProcess):
                if found := re.match(r"slurmstepd: \[(\d+\.\w+)\]", " ".join(psutil.Process(pid).cmdline())):
                    pids[found[1]] = pid
        return pids

    def restore(self) -> None:
        """Brings the cluster back to idle nodes and an empty queue, whatever a test did to it; an error if it cannot."""
        if self._daemons["slurmctld"].poll() is not None:
            self.start_controller()
        for name in self.nodes:
            if self._daemons[name].poll() is not None:
                self.start_node(name)
        self.cancel_all()
        for name in self.nodes:
            if {"DOWN", "DRAIN"} & set(self.node_states(name)):
                # refused when the node has come back by itself in the meantime; the wait below is the judge
                self.run("scontrol", "update", f"nodename={name}", "state=resume", is_checked=False)
        self.wait_until(self._is_clean, 60, "all nodes are idle and the queue is empty")

    def assert_clean(self) -> None:
        """An error unless all nodes are idle and the queue is empty."""
        assert self._is_clean(), f"expected idle nodes and an empty queue, found:\n{self.report()}"

    # ---- waiting and reporting

    def wait_until(
        self, condition: Callable[[], object], limit_s: float, what: str, job: Job | None = None, step_s: float = 0.1
    ) -> None:
        """Returns when `condition()` is true; an error that shows the state of the cluster when it is not in time.

        Args:
            limit_s: on a machine that has time; one that is busy with something else gets `PATIENCE` times as much.
        """
        if not poll(condition, limit_s * PATIENCE, step_s):
            raise AssertionError(f"not within {limit_s * PATIENCE:g} s: {what}\n{self.report(job)}")

    def report(self, job: Job | None = None) -> str:
        """The queue, the nodes, the end of slurmctld's log and, if given, a job with the end of its log."""
        parts = [
            ("squeue", self._try("squeue")),
            ("sinfo", self._try("sinfo", "-Nl")),
            ("slurmctld's log", _tail(self.root / "log" / "ctld.log")),
        ]
        if job is not None:
            fields = self._try("scontrol", "show", "job", str(job.id))
            log = re.search(r"StdOut=(.*)", fields)
            parts += [(f"job {job.id}", fields)]
            parts += [(f"log of job {job.id}", _tail(Path(log[1])) if log else "(not known)")]
        return "\n".join(f"---- {title}\n{text}" for title, text in parts)

    def _try(self, *command: str) -> str:
        """What a command prints; why not, when slurmctld does not answer in time."""
        try:
            return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=15).stdout
        except subprocess.TimeoutExpired as error:
            return str(error)

    def _is_clean(self) -> bool:
        is_idle = all(self.node_states(name) == ["IDLE"] for name in self.nodes)
        return is_idle and not self.run("squeue", "-h", is_checked=False)

    # ---- start and stop

    def _start_munged(self) -> None:
        key = self.root / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = [f"--{name}-file={self.root}/munge.{name}" for name in ("key", "log", "pid", "seed")]
        # --force: munged would rather have a folder that every user may enter, which the folder of a test is not
        self._spawn("munged", ["munged", "--foreground", "--force", f"--socket={self.root}/munge.socket", *files])
        answer = ("munge", "-n", f"--socket={self.root}/munge.socket")
        self.wait_until(lambda: "MUNGE:" in self.run(*answer, is_checked=False), 15, "munged answers")

    def _spawn(self, name: str, command: list[str]) -> None:
        env = self.env | {"SLURMD_NODENAME": name}
        with open(self.root / "log" / f"{name}.out", "ab") as out:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],  # no daemon is left when pytest is killed
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,  # Ctrl-C is for pytest, which then stops them in order
            )

    def _kill_daemon(self, name: str) -> None:
        self._daemons[name].kill()
        self._daemons[name].wait(10)

    def _stop_daemons(self) -> None:
        for name in [*self.nodes, "slurmctld", "munged"]:
            daemon = self._daemons.get(name)
            if daemon is None or daemon.poll() is not None:
                continue
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                self._kill_daemon(name)
        for name in set(self.nodes) & set(self._daemons):
            self.kill_node(name)  # steps outlive slurmd
        os.close(self._slot_lock)


class Job:
    """A job of a cluster; every question is answered by SLURM at that moment."""

    def __init__(self, cluster: Cluster, job_id: int) -> None:
        self.cluster = cluster
        self.id = job_id

    def fields(self) -> dict[str, str]:
        """The fields of `scontrol show job`, times in seconds since 1970; empty while slurmctld does not answer."""
        text = self.cluster.run(
            "scontrol", "show", "job", str(self.id), env={"SLURM_TIME_FORMAT": "%s"}, is_checked=False
        )
        fields: dict[str, str] = {}
        for line in text.splitlines():
            key, _, value = line.strip().partition("=")
            if key in ("Command", "WorkDir", "StdErr", "StdIn", "StdOut", "Comment"):  # one to a line, may have spaces
                fields[key] = value
            else:
                fields |= dict(word.split("=", 1) for word in line.split() if "=" in word)
        return fields

    @property
    def state(self) -> str:
        """JobState, such as PENDING; empty while slurmctld does not answer."""
        return self.fields().get("JobState", "")

    @property
    def restarts(self) -> int:
        """How often SLURM has put the job back into the queue; -1 while slurmctld does not answer."""
        return int(self.fields().get("Restarts", -1))

    @property
    def log(self) -> str:
        """What the job's batch script has printed so far, of all attempts."""
        path = Path(self.fields().get("StdOut", os.devnull))
        return path.read_text() if path.exists() else ""

    def wait_state(self, *states: str, limit_s: float = 60) -> str:
        """The state of the job, as soon as it is one of `states`."""
        self.wait_until(lambda: self.state in states, limit_s, f"job {self.id} is {' or '.join(states)}")
        return self.state

    def wait_end(self, limit_s: float = 60) -> str:
        """The last state of the job."""
        return self.wait_state(*ENDED, limit_s=limit_s)

    def wait_log(self, text: str, limit_s: float = 30) -> None:
        """Returns when the job's log has `text`."""
        self.wait_until(lambda: text in self.log, limit_s, f"log of job {self.id} has {text!r}")

    def wait_restart(self, restarts: int = 1, limit_s: float = 60) -> None:
        """Returns when the job runs again after `restarts` requeues."""
        what = f"job {self.id} runs with Restarts={restarts}"
        self.wait_until(lambda: self.state == "RUNNING" and self.restarts >= restarts, limit_s, what)

    def wait_until(self, condition: Callable[[], object], limit_s: float, what: str, step_s: float = 0.1) -> None:
        """As `Cluster.wait_until`; the error shows the job and its log too."""
        self.cluster.wait_until(condition, limit_s, what, self, step_s)

    def signal(self, name: str, *options: str) -> None:
        """Sends a signal with scancel to the job's steps; `options` such as "--batch" or "--full" say to whom else."""
        self.cluster.run("scancel", f"--signal={name}", *options, str(self.id))

    def cancel(self) -> None:
        """Cancels the job and returns when it is gone from the queue."""
        self.cluster.run("scancel", str(self.id))
        self.wait_state("CANCELLED", "COMPLETED", "FAILED")

    def stepd(self, node: str, step: str) -> int:
        """Pid of the slurmstepd of a step ("batch", "0") on a node."""
        return self.cluster.stepds(node)[f"{self.id}.{step}"]

    def children(self, node: str, step: str) -> list[int]:
        """Pids of what the slurmstepd of a step started: the batch shell of "batch", the agent of "0"."""
        return [process.pid for process in psutil.Process(self.stepd(node, step)).children()]


def _search_path() -> str:
    """PATH with the folders of the daemons, which a user's PATH may lack."""
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-TAIL_LINES:]) if path.exists() else "(no file)"
