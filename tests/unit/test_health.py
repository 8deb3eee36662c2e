"""The check of a node before it trains: real disks, memory and (as its text) nvidia-smi."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
import threading
from pathlib import Path

import pytest

from mmscale.cluster import health
from mmscale.cluster.health import Findings, check_node, read_gpus
from mmscale.config.load import load_config

RECIPE = Path(__file__).parents[2] / "configs/recipes/digits.yaml"


def config_for(run: Path, *words: str):
    return load_config(RECIPE, [f"run.dir={run}", "run.watch.min_free_gb=0", "run.device=cpu", *words])


def test_a_sound_node_has_no_problems_and_no_traces(tmp_path) -> None:
    run = tmp_path / "runs" / "new"
    assert check_node(config_for(run), 2) == Findings()
    assert list(tmp_path.iterdir()) == [], "neither the run directory nor a test file is left behind"
    run.mkdir(parents=True)
    assert check_node(config_for(run), 2) == Findings()
    assert list(run.iterdir()) == []


def test_too_little_space_is_the_nodes_fault_only_on_its_own_disk(tmp_path) -> None:
    """What is shared is full on all nodes: to exclude one after the other would end the run for good."""
    found = check_node(config_for(tmp_path, "run.watch.min_free_gb=1000000"), 1)
    assert [text.split(":")[0] for text in found.problems] == [tempfile.gettempdir(), "memory"]
    assert len(found.warnings) == 1 and found.warnings[0].startswith(f"{tmp_path}: ")
    assert "run.watch.min_free_gb=1e+06" in found.problems[0]


@pytest.mark.parametrize(
    ("number", "is_problem"),
    [(errno.EIO, True), (errno.EROFS, True), (errno.ESTALE, True), (errno.ENOSPC, False), (errno.EACCES, False)],
)
def test_a_disk_that_refuses(tmp_path, monkeypatch, number, is_problem) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    found = Findings()
    health._check_disk(tmp_path, 0.0, True, found)
    texts = found.problems if is_problem else found.warnings
    assert texts == [f"{tmp_path}: cannot write and read back 8 MiB: {os.strerror(number)}"]
    assert len(found.problems) + len(found.warnings) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_gives_other_bytes_back(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"\0" * health.PROBE_BYTES)
    found = Findings()
    health._check_disk(tmp_path, 0.0, True, found)
    assert "other bytes came back" in found.problems[0]


def test_a_clock_that_is_off(tmp_path, monkeypatch) -> None:
    now = health.time.time
    monkeypatch.setattr(health.time, "time", lambda: now() + 3600)
    found = check_node(config_for(tmp_path), 1)
    assert not found.problems
    assert len(found.warnings) == 1 and "+3600 s off" in found.warnings[0]


def test_a_check_that_never_answers_is_a_problem(tmp_path, monkeypatch) -> None:
    forever = threading.Event()
    monkeypatch.setattr(health, "ANSWER_S", 0.2)
    monkeypatch.setattr(health, "_check_memory", lambda *_: forever.wait())
    monkeypatch.setattr(health, "_write_and_read_back", lambda path: health.time.time())
    try:
        assert check_node(config_for(tmp_path), 1).problems == ["memory: no answer within 0 s"]
    finally:
        forever.set()


@pytest.mark.parametrize(
    ("text", "problems", "warnings"),
    [
        ("0, 4, 0\n1, 4, 0", [], []),
        ("0, 4, [N/A]\n1, [N/A], [N/A]", [], []),
        ("0, 4, 0", ["1 GPUs, 2 ranks"], []),
        ("0, 4, 0\n1, 4, 2", ["GPU 1: 2 memory errors that were not corrected"], []),
        ("0, 4, 0\n1, [Unknown Error], [Unknown Error]", ["GPU 1: nvidia-smi says [Unknown Error]"], []),
        ("0, 4, 0\n1, 4, [GPU requires reset]", ["GPU 1: nvidia-smi says [GPU requires reset]"], []),
        ("0, 70000, 0\n1, 4, 0", [], ["GPU 0: 70000 MiB in use before the run starts"]),
        ("0, 4, 0\nUnable to determine the device handle for GPU: Unknown Error", ["GPU: nvidia-smi says 'Unable to determine the device handle for GPU: Unknown Error'"], []),
    ],
)  # fmt: skip
def test_what_nvidia_smi_says(text, problems, warnings) -> None:
    found = Findings()
    read_gpus(text.splitlines(), 2, found)
    assert (found.problems, found.warnings) == (problems, warnings)


def fake_nvidia_smi(folder: Path, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def test_the_gpus_are_asked_when_there_is_nvidia_smi(tmp_path, monkeypatch) -> None:
    """A program of that name says what the real one says; this machine may have no GPU."""
    fake_nvidia_smi(tmp_path, 'case "$*" in *memory.used*) echo "0, 4, 0";; *) exit 3;; esac')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    auto = config_for(tmp_path / "run", "run.device=auto")
    assert check_node(auto, 1) == Findings()
    assert check_node(auto, 2).problems == ["1 GPUs, 2 ranks"]
    fake_nvidia_smi(tmp_path, "echo 'No devices were found'; exit 6")
    assert check_node(auto, 1).problems == ["nvidia-smi: No devices were found"]
    assert check_node(config_for(tmp_path / "run"), 1) == Findings(), "run.device=cpu needs none"
