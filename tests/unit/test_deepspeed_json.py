"""Published DeepSpeed JSON files are taken as they are; contradictions are refused by both names; no "auto" is left."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest

from mmscale.config.schema import ParallelConfig, TrainConfig
from mmscale.errors import ConfigError
from mmscale.parallel.engines.deepspeed_json import Known, deepspeed_config

HIDDEN = 64
FP16 = {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1}  # fmt: skip
BATCH = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "fp16": FP16,
    "bf16": {"enabled": "auto"},
}
STAGE_2 = {"stage": 2, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto"}  # fmt: skip
STAGE_3 = {
    **STAGE_2,
    "stage": 3,
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}
OFFLOAD = {
    "offload_optimizer": {"device": "cpu", "pin_memory": True},
    "offload_param": {"device": "cpu", "pin_memory": True},
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "zero2": {**BATCH, "zero_optimization": STAGE_2},
    "zero3": {**BATCH, "zero_optimization": STAGE_3},
    "zero3pp": {**BATCH, "zero_optimization": {**STAGE_3, "zero_hpz_partition_size": 8, "reduce_bucket_size": 1e6}},
    "zero3_gradient_clipping": {**BATCH, "gradient_clipping": "auto", "zero_optimization": STAGE_3},
    "zero3_offload": {
        **BATCH,
        "gradient_clipping": "auto",
        "steps_per_print": 1e5,
        "wall_clock_breakdown": False,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
        },
        "zero_optimization": {**STAGE_3, **OFFLOAD},
    },
}


def train(**settings: Any) -> TrainConfig:
    return TrainConfig(
        **{"steps": 9, "global_batch": 8, "lr": 1e-3, "clip": 0.5, "parts": {"llm": {"tune": "full"}}, **settings}
    )


@pytest.fixture
def resolve(tmp_path):
    """`resolve(content, train settings, parallel settings)` through a file."""

    def run(content: Any, settings: Any = None, parallel: Any = None) -> dict[str, Any]:
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        chosen = ParallelConfig(deepspeed=str(path), **(parallel or {}))
        return deepspeed_config(Known(chosen, train(**(settings or {})), dp_size=2, hidden_size=HIDDEN))

    return run


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_published_files_resolve_and_keep_their_values(resolve, name, dtype) -> None:
    got = resolve(PUBLISHED[name], {"dtype": dtype, "schedule": "constant"})
    assert "auto" not in json.dumps(got)
    assert got["bf16"]["enabled"] == (dtype == "bf16") and got["gradient_clipping"] == 0.5
    assert (got["train_micro_batch_size_per_gpu"], got["gradient_accumulation_steps"]) == (1, 1)
    assert not {"train_batch_size", "optimizer", "scheduler", "fp16"} & set(got), "these stay ours"
    zero, given = got["zero_optimization"], PUBLISHED[name]["zero_optimization"]
    assert zero["reduce_bucket_size"] == (1e6 if name == "zero3pp" else HIDDEN**2)
    assert all(zero[key] == value for key, value in given.items() if value != "auto")
    if given["stage"] == 3:
        assert zero["stage3_prefetch_bucket_size"] == int(0.9 * HIDDEN**2)
        assert zero["stage3_param_persistence_threshold"] == 10 * HIDDEN


def test_without_a_file_our_keys_decide() -> None:
    parallel = ParallelConfig(zero_stage=3, zero_keep_whole=7, offload_optimizer=True)
    got = deepspeed_config(Known(parallel, train(), 2, HIDDEN))
    zero = got["zero_optimization"]
    assert (zero["stage"], zero["stage3_param_persistence_threshold"]) == (3, 7)
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": False}


def test_the_file_decides_what_our_keys_leave_at_their_default(resolve) -> None:
    zero = {"stage": 2, "stage3_param_persistence_threshold": 11}
    got = resolve({"zero_optimization": zero})["zero_optimization"]
    assert (got["stage"], got["stage3_param_persistence_threshold"]) == (2, 11)
    got = resolve({"zero_optimization": {**STAGE_3}}, parallel={"zero_stage": 3, "zero_keep_whole": 5})
    assert got["zero_optimization"]["stage3_param_persistence_threshold"] == 5


@pytest.mark.parametrize("content", [{"bf16": {}}, {"data_types": {}}, {"zero_optimization": {}}, {"zero_optimization": {"offload_optimizer": {}}}, {"zero_optimization": {"offload_optimizer": None}}])  # fmt: skip
def test_an_empty_section_takes_nothing_away_from_ours(resolve, content) -> None:
    parallel = ParallelConfig(offload_optimizer=True, zero_keep_whole=7)
    assert resolve(content, parallel={"offload_optimizer": True, "zero_keep_whole": 7}) == deepspeed_config(
        Known(parallel, train(), 2, HIDDEN)
    )


def test_keys_that_mean_nothing_to_us_go_through(resolve) -> None:
    got = resolve({"wall_clock_breakdown": True, "zero_optimization": {"stage": 1, "round_robin_gradients": True}})
    assert got["wall_clock_breakdown"] is True and got["zero_optimization"]["round_robin_gradients"] is True


CONTRADICTIONS: list[tuple[Any, Any, Any, tuple[str, ...]]] = [
    ({"train_batch_size": 16}, {}, {}, ("train_batch_size=16", "train.global_batch = 8")),
    ({"gradient_accumulation_steps": 3}, {}, {}, ("gradient_accumulation_steps=3", "= 4")),
    ({"train_micro_batch_size_per_gpu": 4}, {}, {}, ("train_micro_batch_size_per_gpu=4", "packs per forward = 1")),
    ({"gradient_clipping": 1.0}, {}, {}, ("gradient_clipping=1.0", "train.clip = 0.5")),
    ({"bf16": {"enabled": True}}, {"dtype": "fp32"}, {}, ("bf16.enabled=true", "train.dtype")),
    ({"bfloat16": {"enabled": False}}, {}, {}, ("bf16.enabled=false", "train.dtype")),
    ({"fp16": {"enabled": True}}, {}, {}, ("fp16.enabled=true", "train.dtype=bf16")),
    ({"zero_optimization": {"stage": 2}}, {}, {"zero_stage": 3}, ("stage=2", "parallel.zero_stage = 3")),
    ({"zero_optimization": {"stage": 0}}, {}, {}, ("zero_optimization.stage=0", "1, 2 or 3")),
    ({"zero_optimization": {"stage3_param_persistence_threshold": 4}}, {}, {"zero_keep_whole": 3}, ("=4", "parallel.zero_keep_whole = 3")),
    ({"zero_optimization": {"offload_optimizer": {"device": "none"}}}, {}, {"offload_optimizer": True}, ("device=\"none\"", "offload_optimizer")),
    ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, {}, {}, ("nvme", "cpu")),
    ({"zero_optimization": {"mics_shard_size": 64}}, {}, {}, ("mics_shard_size=64", "removed MiCS")),
    ({"zero_optimization": {"zero_hpz_partition_size": 8}}, {}, {"tensor": 2}, ("zero_hpz_partition_size=8", "parallel.tensor=2")),
    ({"optimizer": {"type": "Lamb"}}, {}, {}, ("optimizer.type=\"Lamb\"", "train.optimizer")),
    ({"optimizer": {"type": "AdamW", "params": {"lr": 2e-5}}}, {}, {}, ("optimizer.params.lr=2e-05", "train.lr = 0.001")),
    ({"scheduler": {"type": "WarmupLR"}}, {}, {}, ("WarmupLR", "train.schedule")),
    ({"tensor_parallel": {"autotp_size": 2}}, {}, {}, ("tensor_parallel", "parallel.tensor")),
    ({"amp": {"enabled": True}}, {}, {}, ("amp.enabled", "train.dtype")),
    ({"something": {"new": "auto"}}, {}, {}, ("something.new", "auto")),
    ({"bf16": True}, {}, {}, ("bf16", "object")),
    ("[1]", {}, {}, ("object", "list")),
    ("{", {}, {}, ("JSON", "check the path")),
]  # fmt: skip


@pytest.mark.parametrize(("content", "settings", "parallel", "words"), CONTRADICTIONS)
def test_contradictions_are_refused_by_both_names(resolve, content, settings, parallel, words) -> None:
    with pytest.raises(ConfigError) as refusal:
        resolve(content, settings, parallel)
    assert "ds.json" in str(refusal.value) and all(word in str(refusal.value) for word in words), refusal.value


def test_a_missing_file_is_refused_by_its_key(tmp_path) -> None:
    parallel = ParallelConfig(deepspeed=str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match=r"parallel\.deepspeed"):
        deepspeed_config(Known(parallel, train(), 1, HIDDEN))


def test_one_auto_anywhere_is_either_known_or_refused(resolve, seed) -> None:
    """Any leaf of a published file may be "auto"; none survives."""
    choose = random.Random(seed)
    for _ in range(200):
        content = copy.deepcopy(PUBLISHED[choose.choice(sorted(PUBLISHED))])
        place: Any = content
        while True:
            key = choose.choice(sorted(place))
            if not isinstance(place[key], dict):
                break
            place = place[key]
        place[key] = "auto"
        try:
            assert '"auto"' not in json.dumps(resolve(content, {"schedule": "constant"}))
        except ConfigError as refusal:
            assert key in str(refusal)
