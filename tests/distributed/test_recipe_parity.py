"""The recipe on 1, 2 and 4 processes: losses, gradient norms and weights agree, whatever the ZeRO stage and accumulation."""

import json
import math
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "configs/recipes/digits.yaml"
STEPS = 20
SMALL = [
    f"train.steps={STEPS}", "train.save_every=1000", "train.warmup_steps=3", "train.global_batch=4", "data.plan_group=4", "data.seq_len=256",
    "data.window=64", "data.workers=0", "eval.every=7", "eval.max_packs=3", "parallel.zero_keep_whole=0", "run.tensorboard=false", "run.threads=1", "run.device=cpu",
    "model.llm.config.num_hidden_layers=2", "model.llm.config.hidden_size=32", "model.llm.config.intermediate_size=64",
    "model.vision.config.num_hidden_layers=1", "model.vision.config.hidden_size=32", "model.vision.config.intermediate_size=64",
    "model.audio.config.encoder_layers=1", "model.audio.config.d_model=32", "model.audio.config.encoder_ffn_dim=64",
]  # fmt: skip
OPTIMIZERS = {
    "sgd": ["train.optimizer=sgd", "train.lr=0.05"],
    "adamw": ["train.optimizer=adamw", "train.lr=1e-3", "train.eps=1e-6"],
}


def train_recipe(mesh, data, run, overrides):
    """Runs on every rank of the mesh."""
    from mmscale.config.load import load_config
    from mmscale.train.loop import train

    train(load_config(RECIPE, [f"data.root={data}", f"run.dir={run}", *SMALL, *overrides]), mesh)


def train_alone(data, run, overrides):
    from mmscale.config.schema import ParallelConfig
    from mmscale.parallel.mesh import init_mesh

    train_recipe(init_mesh(ParallelConfig(), "cpu"), data, run, overrides)


def results(run):
    """(losses, norms, ledger, weights) of a finished run."""
    from mmscale.train.checkpoint import open_checkpoint

    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ledger = [json.loads(line)["ids"] for line in (run / "ledger.jsonl").read_text().splitlines()]
    reader = open_checkpoint(max((run / "checkpoints").glob("step_*")))
    weights = {name: reader.read(name) for name in reader.names if name.startswith("model.")}
    return [r["loss"] for r in steps], [r["grad_norm"] for r in steps], ledger, weights


@pytest.fixture(scope="module")
def reference(demo_data, tmp_path_factory):
    """Results of one process, by settings; made when first asked for."""
    made = {}

    def get(optimizer, clip):
        if (optimizer, clip) not in made:
            run = tmp_path_factory.mktemp("one") / "run"
            train_alone(demo_data, run, [*OPTIMIZERS[optimizer], f"train.clip={clip}"])
            made[optimizer, clip] = results(run)
        return made[optimizer, clip]

    return get


def assert_equal(got, want):
    losses, norms, ledger, weights = got
    assert len(losses) == len(want[0]) == STEPS
    assert all(math.isfinite(x) for x in (*losses, *norms))
    assert ledger == want[2]
    assert max(abs(a - b) / abs(b) for a, b in zip(losses, want[0], strict=True)) <= 1e-5
    assert max(abs(a - b) / abs(b) for a, b in zip(norms, want[1], strict=True)) <= 1e-5
    assert weights.keys() == want[3].keys()
    worst = max(((weights[n] - w).abs().max().item(), n) for n, w in want[3].items())
    assert worst[0] <= 1e-5, worst


CASES = [
    (2, 1, "sgd", 0.0), (2, 2, "sgd", 0.5), (2, 3, "sgd", 0.0), (2, 1, "adamw", 0.5), (2, 2, "adamw", 0.0), (2, 3, "adamw", 0.5),
    (4, 1, "adamw", 0.0), (4, 2, "sgd", 0.0), (4, 3, "sgd", 0.5), (4, 3, "adamw", 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("world", "stage", "optimizer", "clip"), CASES)
def test_many_processes_equal_one(ranks, reference, demo_data, tmp_path, world, stage, optimizer, clip):
    """One process accumulates 4 packs, two accumulate 2, four accumulate 1."""
    settings = [*OPTIMIZERS[optimizer], f"train.clip={clip}", f"parallel.zero_stage={stage}"]
    ranks(world).run(train_recipe, str(demo_data), str(tmp_path / "run"), settings)
    assert_equal(results(tmp_path / "run"), reference(optimizer, clip))


def test_the_comparison_can_fail(reference, demo_data, tmp_path):
    """A learning rate off by 0.1 % is seen in the weights, and a clip that should not be there in the losses."""
    run = tmp_path / "run"
    train_alone(demo_data, run, ["train.optimizer=sgd", "train.lr=0.05005", "train.clip=0"])
    with pytest.raises(AssertionError):
        assert_equal(results(run), reference("sgd", 0.0))


def test_two_ranks_to_one_and_back(ranks, demo_data, reference, tmp_path):
    """The ledger is identical and losses agree to 1e-6 when the number of ranks changes twice, through ZeRO-3."""
    run = tmp_path / "run"
    settings = [*OPTIMIZERS["adamw"], "train.clip=0.5", "parallel.zero_stage=3"]

    def stop_at(step):
        return [*settings, f"train.steps={step}", "train.schedule=constant"]

    ranks(2).run(train_recipe, str(demo_data), str(run), stop_at(7))
    train_alone(demo_data, run, stop_at(13))
    ranks(2).run(train_recipe, str(demo_data), str(run), stop_at(STEPS))
    straight = tmp_path / "straight"
    train_alone(demo_data, straight, [*settings, "train.schedule=constant"])
    got, want = results(run), results(straight)
    assert got[2] == want[2]
    assert max(abs(a - b) / abs(b) for a, b in zip(got[0], want[0], strict=True)) <= 1e-6
