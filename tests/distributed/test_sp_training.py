"""The recipe with sequence and tensor parallelism: losses, norms, weights and sample order are those of one process."""

import json
import math
from dataclasses import replace

import pytest
from test_recipe_parity import OPTIMIZERS, results, train_alone, train_recipe

STEPS = ["train.steps=8", "eval.every=4"]
# tensor, ulysses, ring, and settings of each grid; plans and exchanges differ, the numbers must not
TWO = [
    ((1, 2, 1), "sgd", 0.0, ["parallel.zero_stage=1"], {"ulysses", "media"}),
    ((1, 1, 2), "sgd", 0.0, ["parallel.zero_stage=3"], {"exchange", "media"}),
    ((1, 1, 2), "adamw", 0.5, ["parallel.sp=ring", "parallel.zero_stage=2"], {"ring", "media"}),
    ((2, 1, 1), "sgd", 0.0, ["parallel.zero_stage=1"], {"tensor"}),
]
FOUR = [
    ((1, 2, 2), "sgd", 0.0, ["parallel.zero_stage=2"], {"ulysses", "exchange", "media"}),
    ((1, 1, 2), "adamw", 0.5, ["parallel.sp=gather", "parallel.sp_layout=zigzag", "parallel.zero_stage=3"], {"gather"}),
    ((1, 2, 1), "sgd", 0.0, ["parallel.zero_stage=1"], {"ulysses", "media"}),
    (
        (2, 1, 2),
        "adamw",
        0.5,
        ["parallel.engine=fsdp", "parallel.zero_keep_whole=100000"],
        {"tensor", "exchange", "media"},
    ),
]


def train_on_grid(pool, data, run, degrees, overrides):
    from grids import grid

    tensor, ulysses, ring = degrees
    own = [f"parallel.tensor={tensor}", f"parallel.ulysses={ulysses}", f"parallel.ring={ring}"]
    train_recipe(grid(pool, *degrees), data, run, [*STEPS, *own, *overrides])


def validations(run):
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [(e["step"], e["val_targets"], e["val_loss"]) for e in events if e["event"] == "validation"]


def all_results(run):
    return (*results(run), validations(run))


@pytest.fixture(scope="module")
def reference(demo_data, tmp_path_factory):
    """Results of one process, by settings; made when first asked for."""
    made = {}

    def get(*settings):
        if settings not in made:
            run = tmp_path_factory.mktemp("one") / "run"
            train_alone(demo_data, run, [*STEPS, *settings])
            made[settings] = all_results(run)
        return made[settings]

    return get


def assert_equal(got, want):
    losses, norms, ledger, weights, validated = got
    assert ledger == want[2]
    assert len(losses) == len(want[0]) and all(math.isfinite(x) for x in (*losses, *norms))
    assert max(abs(a - b) / abs(b) for a, b in zip(losses, want[0], strict=True)) <= 1e-5
    assert max(abs(a - b) / abs(b) for a, b in zip(norms, want[1], strict=True)) <= 1e-5
    assert weights.keys() == want[3].keys()
    worst = max(((weights[n] - w).abs().max().item(), n) for n, w in want[3].items())
    assert worst[0] <= 1e-5, worst
    assert [v[:2] for v in validated] == [v[:2] for v in want[4]]
    assert max(abs(a[2] - b[2]) / b[2] for a, b in zip(validated, want[4], strict=True)) <= 1e-5


def settings_of(optimizer, clip):
    return (*OPTIMIZERS[optimizer], f"train.clip={clip}")


@pytest.mark.parametrize(("world", "case"), [*((2, c) for c in TWO), *((4, c) for c in FOUR)])
def test_a_divided_pack_trains_like_a_whole_one(ranks, reference, demo_data, tmp_path, world, case):
    """Packs of images, sounds and text over sequence ranks, alone and beside data-parallel ones, under every ZeRO stage."""
    degrees, optimizer, clip, more, kinds = case
    own = settings_of(optimizer, clip)
    ranks(world).run(train_on_grid, str(demo_data), str(tmp_path / "run"), degrees, [*own, *more])
    assert_equal(all_results(tmp_path / "run"), reference(*own))
    step = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert step["comm_bytes"].keys() >= {"share", *kinds} and step["comm_wait_s"] > 0


TEXT = ["data.sources={text: {path: train/text}}", "eval.every=0"]


def test_packs_of_text_alone(ranks, reference, demo_data, tmp_path):
    """No rank has media, and no rank waits in an exchange of them."""
    own = [*settings_of("sgd", 0.0), *TEXT]
    ranks(2).run(train_on_grid, str(demo_data), str(tmp_path / "run"), (1, 1, 2), own)
    train_alone(demo_data, tmp_path / "one", [*STEPS, *own])
    got, want = ((*results(tmp_path / run), [(0, 0, 1.0)]) for run in ("run", "one"))
    assert_equal(got, want)
    assert "media" not in json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["comm_bytes"]


def test_one_rank_to_two_and_back(ranks, reference, demo_data, tmp_path):
    """Resumed on another number of sequence ranks, a run sees the same samples, and its losses agree to 1e-6."""
    run, own = tmp_path / "run", [*settings_of("adamw", 0.5), "train.schedule=constant"]

    def stop_at(step):
        return [*own, f"train.steps={step}"]

    train_alone(demo_data, run, [*STEPS, *stop_at(3)])
    ranks(2).run(train_on_grid, str(demo_data), str(run), (1, 1, 2), [*stop_at(6), "parallel.zero_stage=3"])
    ranks(2).run(train_on_grid, str(demo_data), str(run), (1, 2, 1), stop_at(7))
    train_alone(demo_data, run, [*STEPS, *stop_at(8)])
    got, want = results(run), reference(*own)
    assert got[2] == want[2]
    assert max(abs(a - b) / abs(b) for a, b in zip(got[0], want[0], strict=True)) <= 1e-6


def test_the_comparison_can_fail(reference, demo_data, tmp_path):
    """A learning rate off by 0.2 % is seen."""
    run = tmp_path / "run"
    train_alone(demo_data, run, [*STEPS, "train.optimizer=sgd", "train.lr=0.0501", "train.clip=0.0"])
    with pytest.raises(AssertionError):
        assert_equal(all_results(run), reference(*settings_of("sgd", 0.0)))


def qwen_vl_gradients(pool, seed, degrees):
    """Loss and worst relative gradient error of an unmodified Qwen3-VL decoder over the ranks against the whole pack."""
    import torch
    from grids import grid
    from test_share import random_pack
    from transformers import Qwen3VLTextConfig, Qwen3VLTextModel

    from mmscale.model.batch import ModelBatch
    from mmscale.model.llm.attention import ATTENTION, register
    from mmscale.parallel.share import Sharing, share_packs
    from mmscale.parallel.sp.split import divide

    register()
    torch.manual_seed(seed)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}
    config = Qwen3VLTextConfig(vocab_size=50, **sizes, **heads, rope_parameters=rope)
    model = Qwen3VLTextModel(config).double()
    model.set_attn_implementation(ATTENTION)
    head = torch.nn.Linear(32, 50).double()

    def gradients(batch):
        model.zero_grad()
        head.zero_grad()
        out = model(
            input_ids=batch.input_ids[None], position_ids=batch.position_ids.unsqueeze(-2), use_cache=False,
            pack=batch.attention,
        )  # fmt: skip
        logits = head(out.last_hidden_state[0, batch.target_idx])
        loss = torch.nn.functional.cross_entropy(logits, batch.labels[batch.target_idx], reduction="sum")
        loss.backward()
        named = [*model.named_parameters(), *head.named_parameters()]
        return loss.detach(), {name: p.grad.clone() for name, p in named}

    results = []
    for ulysses, ring, kind in degrees:
        mesh = grid(pool, ulysses=ulysses, ring=ring)
        pack = random_pack(seed + mesh.dp_rank, with_media=False)
        # as images of a grid count: time, height and width go their own ways, and restart in every document
        other = torch.stack([(pack.position_ids // n) + k for k, n in enumerate((1, 2, 3))])
        spans = divide(pack.lengths, ulysses, ring, "planned")
        pack = replace(pack, position_ids=torch.cat([pack.position_ids[None], other]), spans=spans)
        loss, want = gradients(ModelBatch.of(pack))
        own = [pack] if mesh.replica.rank == 0 else []
        (batch,) = share_packs(Sharing(mesh, kind=kind), own, [0] * len(own), 1).batches
        part, got = gradients(batch)
        for value in (part, *got.values()):
            torch.distributed.all_reduce(value, group=mesh.sequence.group)
        worst = max(float((got[n] - w).norm() / w.norm().clamp_min(1e-30)) for n, w in want.items() if w.norm() > 1e-9)
        results.append((float(abs(part - loss) / max(1.0, float(loss))), worst, batch.position_ids.shape[0]))
    return results


@pytest.mark.parametrize(
    ("world", "degrees"),
    [(2, [(2, 1, "exchange"), (1, 2, "exchange")]), (4, [(2, 2, "gather"), (1, 4, "ring"), (1, 2, "exchange")])],
)
def test_four_position_axes_through_an_unmodified_model(ranks, seed, world, degrees):
    """Qwen3-VL's decoder with positions [4, 1, L]: loss and every gradient equal the whole pack's."""
    for found in ranks(world).run(qwen_vl_gradients, seed, degrees):
        for loss_error, gradient_error, axes in found:
            assert (loss_error <= 1e-12, axes) == (True, 4)
            assert gradient_error <= 1e-11
