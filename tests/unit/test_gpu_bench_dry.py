"""The GPU benchmarks without a GPU: every line of them runs on tiny shapes, so that on a GPU only the times are new."""

# ruff: noqa: E402 (benchmarks are not installed)

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).parents[2]
sys.path.append(str(REPO))

from benchmarks.gpu import groups, merging, placement
from benchmarks.gpu.__main__ import choose, in_process, main
from benchmarks.gpu.groups import GROUPS, Group, run_group
from benchmarks.gpu.measure import Bench, relative
from benchmarks.gpu.report import MAX_LINES, Claim, Failure, Report, Timing, read_lines, store, table
from benchmarks.gpu.suite import ON_ANY_DEVICE
from benchmarks.gpu.wheels import PACKAGES, missing, pinned


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """(exit code, output, results) of a dry run of everything."""
    folder = tmp_path_factory.mktemp("dry")
    env = {**os.environ, "OUT": str(folder / "out")}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--results", str(folder / "results")]
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, check=False)
    (path,) = (folder / "results").iterdir()
    assert (folder / "out" / path.name).read_text() == path.read_text()
    return done.returncode, done.stdout + done.stderr, json.loads(path.read_text())


def test_everything_runs(dry):
    code, text, results = dry
    assert code == 0, text
    assert not [entry for entry in results["entries"] if entry["kind"] == "failure"]
    assert {entry["group"] for entry in results["entries"]} == {g.name for g in GROUPS}


def test_each_kernel_is_held_against_its_peers(dry):
    found: dict[str, set[str]] = {}
    for entry in dry[2]["entries"]:
        if entry["kind"] == "timing":
            found.setdefault(entry["group"], set()).add(entry["impl"])
    assert found["placement"] == {"masked_scatter", "index_copy", "compile", "ours"}
    assert found["token_merge"] == {"tome", "ours"}
    assert found["prologue"] == {"eager", "compile", "ours"}
    assert found["loss"] == {"eager", "ours"}
    assert {"math", "cpu_aten"} <= found["attention"]
    assert found["layers"] == {"eager", "torch", "compile", "jit.script", "ours"}


def test_the_table_comes_last_and_is_short(dry):
    lines = dry[1].rstrip().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("date "))
    assert len(lines) - start <= MAX_LINES
    assert lines[-1] == "0 failed, 0 short of their target"
    assert all(any(line.startswith(g.name) for line in lines[start:]) for g in GROUPS)


def test_a_kernel_with_a_wrong_result_is_not_timed(monkeypatch, tmp_path):
    right = placement.place_media
    monkeypatch.setattr(placement, "place_media", lambda *args: right(*args) * 1.01)
    report = run_group("placement", tmp_path / "lines", dry=True)
    assert [type(entry) for entry in report.entries] == [Failure]
    assert read_lines(tmp_path / "lines") == report.entries


def test_a_peer_that_fails_does_not_hide_the_others(tmp_path):
    report = Report("a")
    bench = Bench(torch.device("cpu"), torch.float32, report, dry=True)

    def fails():
        raise RuntimeError("not here\nat all")

    times = bench.case("c", {"peer": fails, "ours": lambda: torch.ones(2)})
    assert list(times) == ["ours"]
    assert report.entries[0] == Failure("a", "c, peer: RuntimeError: not here")


def test_memory_that_does_not_suffice_is_a_result_for_a_peer():
    report = Report("a")

    def fails():
        raise torch.OutOfMemoryError("no")

    times = Bench(torch.device("cpu"), torch.float32, report, dry=True).case("c", {"peer": fails})
    assert times["peer"].ms != times["peer"].ms
    assert not any(isinstance(entry, Failure) for entry in report.entries)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_process_that_cannot_work_says_so(tmp_path):
    lines = tmp_path / "lines"
    assert in_process(Group("ceilings", "kernels", "ceilings"), lines, 100) == ""
    (entry,) = read_lines(lines)
    assert isinstance(entry, Failure)
    assert main(["--part", "kernels", "--results", str(tmp_path)]) == 2


def test_a_process_that_takes_too_long_is_ended(tmp_path):
    assert in_process(Group("ceilings", "kernels", "ceilings"), tmp_path / "lines", 0.05) == "ended after 0 s"


def test_a_file_that_was_cut_short_is_read_up_to_there(tmp_path):
    path = tmp_path / "lines"
    report = Report("a", path)
    report.claim("x", 1.0, "x", ">= 2")
    report.timing("c", "ours", ms=1.5, spread=0.0, host_ms=1.0, peak_mb=0.0, extra_mb=float("nan"), floor_share=0.5)
    with path.open("a") as file:
        file.write('{"kind": "clai')
    claim, timing = read_lines(path)
    assert claim == Claim("a", "x", 1.0, "x", ">= 2")
    assert isinstance(timing, Timing) and timing.extra_mb != timing.extra_mb


def test_results_of_other_groups_stay(tmp_path):
    path = tmp_path / "results.json"
    store(path, {"device": "d"}, [Claim("a", "x", 1.0), Claim("b", "y", float("nan"), "", ">= 1")])
    store(path, {"device": "d"}, [Failure("a", "gone")])
    kinds = [(entry["group"], entry["kind"]) for entry in json.loads(path.read_text())["entries"]]
    assert sorted(kinds) == [("a", "failure"), ("b", "claim")]


def test_the_table_stays_short_whatever_fails():
    entries = [Claim(f"g{i}", "a figure of some length", i, "x", ">= 5") for i in range(8)]
    entries += [Failure("g1", "error " * 60) for _ in range(60)]
    lines = table({"device": "d"}, entries).splitlines()
    assert len(lines) <= MAX_LINES
    assert lines[-1] == "60 failed, 5 short of their target"


def test_a_figure_that_is_no_number_is_short():
    assert not Claim("a", "x", float("nan"), "", ">= 1").is_ok
    assert Claim("a", "x", float("nan")).is_ok


def test_packages_are_hidden_for_one_group_only(monkeypatch):
    name = "wave"  # of the standard library, and easily missed
    monkeypatch.delitem(sys.modules, name, raising=False)
    with groups._hidden((name,)), pytest.raises(ImportError):
        __import__(name)
    __import__(name)


@pytest.mark.parametrize(("length", "num_merged"), [(7, 2), (8, 4), (9, 1), (2, 1), (5, 0)])
def test_the_peer_of_token_merging_follows_the_paper(seed, length, num_merged):
    x_LC = torch.randn(length, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    unit = [row / row.norm() for row in x_LC]
    edges = []
    for a in range(0, length, 2):
        scores = {b: float(unit[a] @ unit[b]) for b in range(1, length, 2)}
        b = max(scores, key=scores.__getitem__)
        edges.append((scores[b], a, b))
    merged: dict[int, list[int]] = {b: [b] for b in range(1, length, 2)}
    taken = sorted(edges, reverse=True)[:num_merged]
    for _, a, b in taken:
        merged[b].append(a)
    rows = [x_LC[a] for a in range(0, length, 2) if a not in {edge[1] for edge in taken}]
    rows += [x_LC[members].mean(0) for members in merged.values()]
    got = merging.published(x_LC[None], num_merged)[0]

    def ordered(found):
        return torch.stack(sorted(found, key=lambda row: row.tolist()))

    assert relative(ordered(got.unbind()), ordered(rows)) <= 1e-14


def test_kernels_are_always_held_against_this_device():
    assert [g.name for g in choose("kernels", "placement")] == ["ceilings", "placement"]
    assert [g.name for g in choose("kernels", "ceil")] == ["ceilings"]
    assert [g.name for g in choose("steps", "padded")] == ["steps padded"]
    assert choose("all", "") == list(GROUPS)


def test_tests_that_follow_the_gpu_run_there():
    texts = {
        path.relative_to(REPO).as_posix(): path.read_text() for path in (REPO / "tests/numerics").glob("test_*.py")
    }
    assert set(ON_ANY_DEVICE) == {name for name, text in texts.items() if 'DEVICE = "cuda" if' in text}


def test_wheels_of_missing_packages_only(tmp_path):
    for name in ("pydantic_core-2.0-cp312-cp312-linux_x86_64.whl", "no_such_thing-1.0-py3-none-any.whl"):
        (tmp_path / name).touch()
    assert [path.name for path in missing(tmp_path)] == ["no_such_thing-1.0-py3-none-any.whl"]


def test_wheels_come_in_the_versions_that_are_tested():
    wanted = dict(line.split("==") for line in pinned(PACKAGES))
    assert set(wanted) == set(PACKAGES)
    assert f"webdataset=={wanted['webdataset']}" in (REPO / "constraints-cpu.txt").read_text()
