"""`run.profile`: a real run writes a trace and tables whose shares add up; without it nothing is written or wrapped."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from mmscale.config.load import load_config
from mmscale.config.schema import ParallelConfig
from mmscale.parallel.mesh import init_mesh
from mmscale.train.loop import train
from mmscale.train.profile import FORWARD_BACKWARD, STEPS, StepProfiler, shares_of

RECIPE = Path(__file__).parents[2] / "configs/recipes/digits.yaml"
WORDS = [
    "train.save_every=100", "train.warmup_steps=0", "train.global_batch=2", "data.plan_group=1", "data.seq_len=384", "data.window=64",
    "data.workers=0", "eval.every=0", "run.tensorboard=false", "run.threads=1", "run.device=cpu",
]  # fmt: skip


def train_here(data, run, *words):
    config = load_config(RECIPE, [*WORDS, f"data.root={data}", f"run.dir={run}", *words])
    train(config, init_mesh(ParallelConfig(), "cpu"))


def phases(trace):
    """Names of the events of a trace, of those that begin with mmscale:: and of operators."""
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    return [e["name"] for e in events if e.get("ph") == "X"]


def test_a_profile_of_a_run(demo_data, tmp_path):
    run = tmp_path / "run"
    train_here(demo_data, run, "run.profile=true", "train.steps=10")
    names = phases(run / "profile/trace-rank0.json.gz")
    for phase in ("data", "forward_backward", "update"):
        assert names.count(f"mmscale::{phase}") == STEPS
    assert any(name.startswith("aten::") for name in names)
    shares = json.loads((run / "profile/shares.json").read_text())
    print(json.dumps(shares, indent=1))
    assert shares["steps"] == STEPS and shares["syncs"] is None
    times = [json.loads(line)["step_time_s"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert shares["step_s"] == pytest.approx(sum(times[4 : 4 + STEPS]) / STEPS, rel=0.25)
    for table in ("host", "kinds"):
        assert sum(shares[table].values()) == pytest.approx(1, abs=0.01)
        assert all(share >= 0 for share in shares[table].values())
    assert shares["host"]["backward"] > shares["host"]["forward"] * 0.5
    for kind in (
        "matmul",
        "attention",
        "head and loss",
        "norms and elementwise",
        "copies, casts, lookups",
        "optimizer",
        "data wait",
    ):
        assert shares["kinds"][kind] > 0, kind
    assert shares["kinds"]["data wait"] == pytest.approx(shares["host"]["data wait"])
    text = (run / "profile/table.txt").read_text()
    assert "aten::" in text and "matmul" in text and "what the host does" in text


def test_a_run_that_is_shorter_than_a_profile_is_recorded_as_far_as_it_goes(demo_data, tmp_path):
    train_here(demo_data, tmp_path / "run", "run.profile=true", "train.steps=1")
    shares = json.loads((tmp_path / "run/profile/shares.json").read_text())
    assert shares["steps"] == 1
    assert sum(shares["kinds"].values()) == pytest.approx(1, abs=0.01)


def test_operators_of_the_loop_are_no_computing_of_the_model():
    found, big = [], torch.randn(200, 200)
    with profile(
        activities=[ProfilerActivity.CPU], schedule=schedule(wait=0, warmup=1, active=1, repeat=1),
        on_trace_ready=lambda recorded: found.append(shares_of(recorded.events(), torch.device("cpu"))),
    ) as profiler:  # fmt: skip
        for _ in range(2):
            with record_function(FORWARD_BACKWARD):
                big.sum()
            for _ in range(20):
                big @ big
            profiler.step()
    assert "matmul" not in found[0].kinds
    assert found[0].kinds["Python and idle"] > 0.5 and sum(found[0].kinds.values()) == pytest.approx(1, abs=0.01)


def test_nothing_is_done_without_it(demo_data, tmp_path):
    profiler = StepProfiler(None, init_mesh(ParallelConfig(), "cpu"), 100)
    engine = object()
    with profiler:
        assert profiler.watch(engine) is engine, "no layer between the loop and its engine"
        with profiler.data():
            profiler.after_step()
        assert not torch.autograd._profiler_enabled()
    train_here(demo_data, tmp_path / "run", "train.steps=1")
    assert not (tmp_path / "run/profile").exists()
