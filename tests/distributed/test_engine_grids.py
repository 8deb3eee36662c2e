"""Grids of tensor, sequence and data ranks train like one plain torch process, under ZeRO-1, 2, 3 and FSDP2.

Sequence parallelism is a split of the targets and tensor parallelism a pair of matrices cut by hand: this is about engines.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from grids import grid
from tiny_run import (
    FSDP,
    Batch,
    Memory,
    TinyModel,
    build,
    documents,
    micro_batches,
    train_config,
    train_steps,
    whole_state,
)
from torch import nn

from mmscale.config.env import Launch
from mmscale.config.schema import ParallelConfig
from mmscale.errors import ConfigError
from mmscale.parallel.apply import make_engine
from mmscale.parallel.comm import broadcast_object, sum_floats
from mmscale.parallel.mesh import Mesh, init_mesh
from mmscale.train.optim import build_optimizer, param_groups

STEPS, CLIP = 4, 0.2
CASES = [("sgd", 0.0, 2), ("sgd", CLIP, 1), ("adamw", CLIP, 2)]
ENGINES = [1, 2, 3, FSDP]
LAYOUTS = [
    (2, {"ulysses": 2}),
    (2, {"tensor": 2}),
    (4, {"ulysses": 2}),
    (4, {"ulysses": 2, "ring": 2}),
    (4, {"tensor": 2}),
    (4, {"tensor": 2, "ring": 2}),
]


def one_process(run: Any, *args: Any) -> Any:
    return run(init_mesh(ParallelConfig(), "cpu", Launch()), *args)


def single_run(mesh: Mesh, optimizer: str, clip: float, accumulation: int, seed: int) -> Any:
    """One process without an engine; test_engine_parity compares it with plain torch."""
    return engine_run(mesh, 0, optimizer, clip, accumulation, seed)


def engine_run(
    mesh: Mesh, stage: int, optimizer: str, clip: float, accumulation: int, seed: int, wrong: float = 1.0, **how: Any
) -> Any:
    train = train_config(optimizer, clip)
    engine = build(mesh, stage, train, seed, **how)
    losses = train_steps(engine, mesh, train, range(STEPS), accumulation, seed, wrong)
    state = {} if how.get("forget_layouts") else whole_state(engine, mesh)
    engine.close()
    return losses, state


def grid_runs(mesh: Mesh, degrees: dict[str, int], stages: list[int], cases: list[Any], seed: int) -> Any:
    mesh = grid(mesh, **degrees)
    return [engine_run(mesh, stage, *case, seed) for case in cases for stage in stages]


def differences(got: Any, want: Any) -> tuple[float, float, float]:
    """Largest relative difference of losses and norms, and largest difference of weights and moments."""
    (losses, state), (want_losses, want_state) = got, want
    assert all(math.isfinite(value) for pair in losses for value in pair)
    loss, norm = (max(abs(a[i] - b[i]) / b[i] for a, b in zip(losses, want_losses, strict=True)) for i in (0, 1))
    assert state.keys() == want_state.keys()
    return loss, norm, max((state[name] - value).abs().max().item() for name, value in want_state.items())


def check_grid(ranks: Any, world_size: int, degrees: dict[str, int], cases: list[Any], seed: int) -> None:
    runs = ranks(world_size).run(grid_runs, degrees, ENGINES, cases, seed)
    for other in runs[1:]:
        assert [losses for losses, _ in other] == [losses for losses, _ in runs[0]], "ranks disagree"
    for case in cases:
        want = one_process(single_run, *case, seed)
        for stage in ENGINES:
            loss, norm, weight = differences(runs[0].pop(0), want)
            assert loss <= 1e-6 and norm <= 1e-6 and weight <= 5e-6, (stage, case, loss, norm, weight)


@pytest.mark.parametrize(
    ("world_size", "degrees"), LAYOUTS, ids=lambda v: "-".join(f"{k}{n}" for k, n in v.items()) if isinstance(v, dict) else str(v)
)  # fmt: skip
def test_grid_equals_one_process(ranks, world_size, degrees, seed) -> None:
    check_grid(ranks, world_size, degrees, CASES, seed)


def test_tensor_sequence_and_data_ranks_together(ranks, seed) -> None:
    check_grid(ranks, 8, {"tensor": 2, "ulysses": 2}, [CASES[0], CASES[2]], seed)


def wrong_runs(mesh: Mesh, seed: int) -> Any:
    tensor, sequence = grid(mesh, tensor=2), grid(mesh, ulysses=2)
    unmarked = [engine_run(tensor, stage, "sgd", 0.0, 1, seed, forget_layouts=True)[0] for stage in ENGINES]
    averaged = [engine_run(sequence, stage, "sgd", 0.0, 1, seed, 2.0)[0] for stage in ENGINES]
    return unmarked, averaged


def test_the_comparison_detects_uncounted_tensor_ranks_and_an_average_over_sequence_ranks(ranks, seed) -> None:
    want, _ = one_process(single_run, "sgd", 0.0, 1, seed)
    unmarked, averaged = ranks(2).run(wrong_runs, seed)[0]
    for losses in unmarked:
        assert abs(losses[0][1] / want[0][1] - 1) > 1e-3, "half of the cut matrices should be missing in the norm"
    for losses in averaged:
        assert losses[0][1] == pytest.approx(want[0][1] / 2, rel=1e-4)


def resumed_runs(mesh: Mesh, degrees: dict[str, int], state: dict[str, torch.Tensor] | None, seed: int) -> Any:
    """Trains on from `state` (None = from the start, two steps), with every engine: (state read back, later losses, state)."""
    mesh, train = grid(mesh, **degrees), train_config("adamw", CLIP)
    state = broadcast_object(mesh, state)
    results = []
    for stage in ENGINES:
        engine = build(mesh, stage, train, seed if state is None else seed + 1, Memory(state) if state else None)
        if state is None:
            train_steps(engine, mesh, train, range(2), 2, seed)
        before = whole_state(engine, mesh)
        losses = train_steps(engine, mesh, train, range(2, STEPS), 2, seed)
        results.append((before, losses))
        engine.close()
    return results


@pytest.mark.parametrize("degrees", [{"ulysses": 2}, {"tensor": 2}, {}], ids=["sp2", "tp2", "dp2"])
def test_state_of_any_layout_goes_on_in_any_engine(ranks, degrees, seed) -> None:
    want = one_process(single_run, "adamw", CLIP, 2, seed)[0][2:]
    written = ranks(2).run(resumed_runs, degrees, None, seed)[0]
    assert all(close(losses, want) for _, losses in written), (written, want)
    for (state, _), other in zip(written, ({"tensor": 2}, {"ulysses": 2}, {}, {"tensor": 2}), strict=True):
        for read, losses in ranks(2).run(resumed_runs, other, state, seed)[0]:
            assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)
            assert close(losses, want), (losses, want)


def close(got: Any, want: Any) -> bool:
    return all(abs(x - y) <= 1e-6 * abs(y) for a, b in zip(got, want, strict=True) for x, y in zip(a, b, strict=True))


def poisoned(mesh: Mesh, dtype: str, seed: int) -> Any:
    """FSDP2: a step in which the last rank has a NaN, evaluation around it, a healthy step."""
    train = train_config("sgd", CLIP, dtype)
    engine = build(mesh, FSDP, train, seed)
    (share,) = micro_batches(documents(0, seed), mesh, 1)
    bad = Batch(share.pixels * (math.nan if mesh.rank == mesh.world_size - 1 else 1), share.ids, share.labels)
    before = engine.evaluate(share)
    engine.forward_backward([bad], 50)
    skipped = engine.step([1e-2] * 4).skipped
    after = engine.evaluate(share)
    losses = train_steps(engine, mesh, train, range(STEPS), 2, seed)
    dtypes = {chunk.value.dtype for name, chunk in engine.state_views() if name.startswith("model.")}
    changed = engine.evaluate(share)
    engine.close()
    return skipped, before == after, losses, dtypes, changed != after


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_fsdp_skips_a_nan_and_bf16_stays_close(ranks, dtype, seed) -> None:
    train = train_config("sgd", CLIP, dtype)
    mesh = init_mesh(ParallelConfig(), "cpu", Launch())
    want = train_steps(build(mesh, 0, train, seed), mesh, train, range(STEPS), 2, seed)
    results = ranks(2).run(poisoned, dtype, seed)
    for skipped, unchanged, losses, dtypes, _ in results:
        assert skipped and unchanged and dtypes == {torch.float32}
        for (loss, norm), (want_loss, want_norm) in zip(losses, want, strict=True):
            assert loss == pytest.approx(want_loss, rel=2e-2 if dtype == "bf16" else 1e-6)
            assert norm == pytest.approx(want_norm, rel=5e-2 if dtype == "bf16" else 1e-6)
    assert any(changed for *_, changed in results)


def bf16_runs(mesh: Mesh, seed: int) -> Any:
    train = train_config("sgd", CLIP, "bf16")
    results = []
    for degrees in ({"tensor": 2}, {"ulysses": 2}, {}):
        for stage in ENGINES:
            own = grid(mesh, **degrees)
            engine = build(own, stage, train, seed)
            results.append(train_steps(engine, own, train, range(STEPS), 2, seed))
            engine.close()
    return results


def test_bf16_on_a_grid_stays_close_to_one_process(ranks, seed) -> None:
    train = train_config("sgd", CLIP, "bf16")
    mesh = init_mesh(ParallelConfig(), "cpu", Launch())
    want = train_steps(build(mesh, 0, train, seed), mesh, train, range(STEPS), 2, seed)
    runs = ranks(2).run(bf16_runs, seed)[0]
    for losses in runs:
        for (loss, norm), (want_loss, want_norm) in zip(losses, want, strict=True):
            assert loss == pytest.approx(want_loss, rel=2e-2) and norm == pytest.approx(want_norm, rel=5e-2)
    first_norms = [losses[0][1] for losses in runs]
    assert max(first_norms) / min(first_norms) < 1.01, first_norms


def unused_run(mesh: Mesh, stage: int, seed: int) -> Any:
    return engine_run(mesh, stage, "adamw", CLIP, 2, seed, unused=True)


def test_fsdp_updates_a_parameter_without_gradient_like_one_process(ranks, seed) -> None:
    want = one_process(unused_run, 0, seed)
    assert (want[1]["model.connector.unused"] < 1).all(), "weight decay"
    loss, norm, weight = differences(ranks(4).run(unused_run, FSDP, seed)[0], want)
    assert loss <= 1e-6 and norm <= 1e-6 and weight <= 5e-6, (loss, norm, weight)


def multimodal_run(mesh: Mesh, engine_name: str, family: str, recompute: bool, dtype: str, seed: int) -> Any:
    """Two SGD steps of a whole model; rank 0 of 2 has media, rank 1 only text. One process has both packs."""
    from tiny_multimodal import tiny_config, tiny_model, tiny_pack

    config = tiny_config(family, optimizer="sgd", seed=seed % 1000, checkpoint_activations=recompute, dtype=dtype)
    model, specs = tiny_model(config)
    packs = [tiny_pack(specs, seed, "mixed"), tiny_pack(specs, seed + 1, "text")]
    parallel = ParallelConfig(engine=engine_name)
    optimizer = build_optimizer(param_groups(model, config.train), config.train)
    engine = make_engine(model, optimizer, parallel, config.train, mesh)
    results = []
    for _ in range(2):
        own = packs[mesh.dp_rank :: mesh.dp_size]
        local = engine.forward_backward(own, sum(len(pack.target_idx) for pack in packs))
        norm = engine.step([0.05] * len(optimizer.param_groups)).grad_norm
        results.append((sum_floats(mesh, [local])[0], norm))
    state = whole_state(engine, mesh)
    evaluated = sum_floats(mesh, [sum(engine.evaluate(pack) for pack in own)])[0]
    return [*results, (evaluated, norm)], state


@pytest.mark.parametrize(
    ("family", "recompute", "dtype"), [("gpt_oss", False, "fp32"), ("gemma", True, "fp32"), ("qwen3", True, "bf16")]
)
def test_fsdp_trains_a_whole_model_with_a_rank_without_media(ranks, family, recompute, dtype, seed) -> None:
    want = one_process(multimodal_run, "auto", family, recompute, dtype, seed)
    loss, norm, weight = differences(ranks(2).run(multimodal_run, "fsdp", family, recompute, dtype, seed)[0], want)
    most = (1e-6, 3e-6, 3e-6) if dtype == "fp32" else (5e-3, 5e-2, 5e-3)
    assert loss <= most[0] and norm <= most[1] and weight <= most[2], (loss, norm, weight)


def memory_and_refusals(mesh: Mesh, seed: int) -> Any:
    train = train_config("adamw")
    model = TinyModel()
    groups = param_groups(model, train)
    whole = sum(param.numel() for param in model.parameters())
    optimizer = build_optimizer(groups, train)
    engine = make_engine(model, optimizer, ParallelConfig(engine="fsdp"), train, mesh)
    train_steps(engine, mesh, train, range(1), 2, seed)
    engine.evaluate(micro_batches(documents(0, seed), mesh, 1)[0])
    left_over = sum(param.numel() for group in groups for param in group.params)
    own = sum(param.to_local().numel() for param in model.parameters())  # type: ignore[attr-defined]
    state = sum(value.numel() for values in optimizer.state.values() for value in values.values())
    engine.close()
    messages = []
    for key, value in (("offload_optimizer", True), ("deepspeed", "ds.json"), ("gate", None)):
        other = TinyModel()
        if key == "gate":
            other.connector.register_parameter("gate", nn.Parameter(torch.zeros(())))
        optimizer = build_optimizer(param_groups(other, train), train)
        parallel = ParallelConfig(engine="fsdp").model_copy(update={key: value} if key != "gate" else {})
        with pytest.raises(ConfigError) as refusal:
            make_engine(other, optimizer, parallel, train, mesh)
        messages.append(key in str(refusal.value) and "parallel.engine=deepspeed" in str(refusal.value))
    return whole, left_over, own, state, messages


def test_fsdp_holds_only_its_rows_and_refuses_what_it_cannot_do(ranks, seed) -> None:
    results = ranks(4).run(memory_and_refusals, seed)
    wholes, left_over, own, state, messages = zip(*results, strict=True)
    assert set(left_over) == {0} and sum(own) == wholes[0] and max(own) < 0.4 * wholes[0]
    assert sum(state) < 2.1 * wholes[0], "two moments per trained element"
    assert all(all(told) for told in messages)


PUBLISHED_OFFLOAD = {
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


def offload_runs(mesh: Mesh, path: str, seed: int) -> Any:
    """AdamW with its state in host memory, on every stage and layout, then through a published JSON file."""
    results = []
    for degrees in ({}, {"tensor": 2}, {"ulysses": 2}):
        for stage in (1, 2, 3):
            own = grid(mesh, **degrees)
            results.append(engine_run(own, stage, "adamw", CLIP, 2, seed, offload_optimizer=True))
    defaults = ParallelConfig()
    settings = {"deepspeed": path, "zero_stage": defaults.zero_stage, "zero_keep_whole": defaults.zero_keep_whole}
    results.append(engine_run(grid(mesh), 3, "adamw", CLIP, 2, seed, **settings))
    return results


def test_an_optimizer_in_host_memory_trains_the_same(ranks, tmp_path, seed) -> None:
    path = tmp_path / "zero3_offload.json"
    path.write_text(json.dumps(PUBLISHED_OFFLOAD))
    want = one_process(single_run, "adamw", CLIP, 2, seed)
    for got in ranks(2).run(offload_runs, str(path), seed)[0]:
        loss, norm, weight = differences(got, want)
        assert loss <= 1e-6 and norm <= 1e-6 and weight <= 5e-6, (loss, norm, weight)


def hpz_runs(mesh: Mesh, path: str, seed: int) -> Any:
    """ZeRO++'s second partition inside groups of 2, on data and on sequence ranks, and gone on from its state."""
    defaults = ParallelConfig()
    settings = {"deepspeed": path, "zero_stage": defaults.zero_stage, "zero_keep_whole": defaults.zero_keep_whole}
    train, results = train_config("adamw", CLIP), []
    for own in (grid(mesh), grid(mesh, ulysses=2)):
        results.append(engine_run(own, 3, "adamw", CLIP, 2, seed, **settings))
        engine = build(own, 3, train, seed, **settings)
        first = train_steps(engine, own, train, range(2), 2, seed)
        state = broadcast_object(own, whole_state(engine, own))
        engine.close()
        engine = build(own, 3, train, seed + 1, Memory(state), **settings)
        rest = train_steps(engine, own, train, range(2, STEPS), 2, seed)
        results.append(([*first, *rest], whole_state(engine, own)))
        engine.close()
    return results


def test_zero_plus_plus_partitions_train_and_go_on(ranks, tmp_path, seed) -> None:
    path = tmp_path / "zero3pp.json"
    zero = {"stage": 3, "zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0}
    path.write_text(json.dumps({"zero_optimization": zero}))
    want = one_process(single_run, "adamw", CLIP, 2, seed)
    for got in ranks(4).run(hpz_runs, str(path), seed)[0]:
        loss, norm, weight = differences(got, want)
        assert loss <= 1e-6 and norm <= 1e-6 and weight <= 5e-6, (loss, norm, weight)


def offload_resumed(mesh: Mesh, dtype: str, path: str, seed: int) -> Any:
    """Two steps, the state into a fresh engine, two more: losses of both engines. With the file, weights are offloaded too."""
    defaults = ParallelConfig()
    published = {"deepspeed": path, "zero_stage": defaults.zero_stage, "zero_keep_whole": defaults.zero_keep_whole}
    results = []
    for stage, settings in (*((stage, {"offload_optimizer": True}) for stage in (1, 2, 3)), (3, published)):
        train = train_config("adamw", CLIP, dtype)
        engine = build(mesh, stage, train, seed, **settings)
        train_steps(engine, mesh, train, range(2), 2, seed)
        state = broadcast_object(mesh, whole_state(engine, mesh))
        rest = train_steps(engine, mesh, train, range(2, STEPS), 2, seed)
        engine.close()
        engine = build(mesh, stage, train, seed + 1, Memory(state), **settings)
        results.append((rest, train_steps(engine, mesh, train, range(2, STEPS), 2, seed)))
        engine.close()
    return results


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_optimizer_in_host_memory_goes_on_bit_by_bit(ranks, tmp_path, dtype, seed) -> None:
    path = tmp_path / "zero3_offload.json"
    path.write_text(json.dumps(PUBLISHED_OFFLOAD))
    for uninterrupted, resumed in ranks(2).run(offload_resumed, dtype, str(path), seed)[0]:
        assert uninterrupted == resumed
