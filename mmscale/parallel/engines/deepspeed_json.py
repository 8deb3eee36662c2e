"""DeepSpeed's configuration, decided from ours and from a user's JSON file; nothing is left to "auto".

A number in the file that contradicts our configuration is refused by both names. Where our key still has its default value,
the file wins: `zero_stage`, `zero_keep_whole`, `offload_optimizer`. Keys that mean nothing to us go to DeepSpeed as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from mmscale.config.schema import ParallelConfig, TrainConfig
from mmscale.errors import ConfigError

Value: TypeAlias = "bool | int | float | str | list[Value] | dict[str, Value] | None"
Json = dict[str, Value]

_BUCKET_ELEMENTS = 50_000_000
_SECTIONS = ("zero_optimization", "bf16", "fp16", "optimizer", "scheduler", "data_types")
_SCHEDULES = {"constant": "WarmupLR", "linear": "WarmupDecayLR", "cosine": "WarmupCosineLR"}
# Dotted keys, or whole sections, that would take something out of our hands without saying so.
_REFUSED = {
    "amp": "the precision is train.dtype",
    "torch_autocast": "the precision is train.dtype",
    "sequence_parallel_size": "the layout is parallel.ulysses and parallel.ring",
    "data_parallel_size": "the layout follows from the number of processes",
    "tensor_parallel": "the layout is parallel.tensor",
    "pipeline": "pipelines are not supported",
    "elasticity": "the batch is train.global_batch",
}


@dataclass(frozen=True, slots=True)
class Known:
    """What the values come from. `dp_size`: ranks that see different packs. `hidden_size`: width of the language model."""

    parallel: ParallelConfig
    train: TrainConfig
    dp_size: int
    hidden_size: int
    is_cuda: bool = False


@dataclass(frozen=True, slots=True)
class _Rule:
    """`value` stands for "auto"; with `key`, the name of ours, any other value is refused."""

    value: Value
    key: str | None = None


def deepspeed_config(known: Known) -> Json:
    """The complete configuration for `deepspeed.initialize`.

    Raises:
        ConfigError: the file of `parallel.deepspeed` cannot be read, contradicts our configuration, asks for what is not
            supported, or leaves a value open that we do not know.
    """
    path = known.parallel.deepspeed
    given = {} if path is None else dict(_flat(_read(path)))
    for key, value in given.items():
        _refuse_foreign(known.parallel, key, value)
    rules = _rules(known, given)
    resolved = {key: _resolve(str(path), key, value, rules.get(key)) for key, value in given.items()}
    dropped = ("optimizer.", "scheduler.", "fp16.", "train_", "gradient_accumulation_steps")
    kept = {key: value for key, value in resolved.items() if not key.startswith(dropped)}
    content = _nested({**_defaults(known), **kept, **_fixed(known)})
    assert '"auto"' not in json.dumps(content), "every value is decided"
    return content


def zero_stage(parallel: ParallelConfig) -> int:
    """The ZeRO stage of a run: the JSON file's where `parallel.zero_stage` has its default value."""
    given = {} if parallel.deepspeed is None else dict(_flat(_read(parallel.deepspeed)))
    stage = given.get("zero_optimization.stage")
    return stage if _is_default(parallel, "zero_stage") and isinstance(stage, int) else parallel.zero_stage


def offloads_optimizer(parallel: ParallelConfig) -> bool:
    """Whether optimizer state is in host memory, by our key or by the JSON file."""
    given = {} if parallel.deepspeed is None else dict(_flat(_read(parallel.deepspeed)))
    return parallel.offload_optimizer or given.get("zero_optimization.offload_optimizer.device") == "cpu"


def _rules(known: Known, given: Mapping[str, Value]) -> dict[str, _Rule]:
    """By dotted key: what "auto" means, and which of our keys must not be contradicted."""
    train, parallel, hidden = known.train, known.parallel, known.hidden_size
    adam: dict[str, Value] = {
        "lr": train.lr,
        "betas": [*train.betas],
        "eps": train.eps,
        "weight_decay": train.weight_decay,
    }
    warmup: dict[str, tuple[Value, str]] = {
        "warmup_min_lr": (0, "the start of our warm-up"),
        "warmup_max_lr": (train.lr, "train.lr"),
        "warmup_num_steps": (train.warmup_steps, "train.warmup_steps"),
        "total_num_steps": (train.steps, "train.steps"),
    }
    accumulation = max(train.global_batch // known.dp_size, 1)
    zero = "zero_optimization."
    rules = {
        "train_batch_size": _Rule(train.global_batch, "train.global_batch"),
        "train_micro_batch_size_per_gpu": _Rule(1, "packs per forward"),
        "gradient_accumulation_steps": _Rule(accumulation, "train.global_batch / data-parallel ranks"),
        "gradient_clipping": _Rule(train.clip, "train.clip"),
        "bf16.enabled": _Rule(train.dtype == "bf16", "train.dtype == bf16"),
        "fp16.enabled": _Rule(False),
        "zero_allow_untested_optimizer": _Rule(True, "use of torch's optimizers"),
        "zero_force_ds_cpu_optimizer": _Rule(False, "use of deepspeed's own optimizer"),
        "optimizer.type": _Rule("AdamW" if train.optimizer == "adamw" else "SGD", "train.optimizer"),
        "scheduler.type": _Rule(_SCHEDULES[train.schedule], "train.schedule"),
        zero + "stage": _Rule(zero_stage(parallel), "parallel.zero_stage"),
        zero + "reduce_bucket_size": _Rule(hidden * hidden),
        zero + "stage3_prefetch_bucket_size": _Rule(int(0.9 * hidden * hidden)),
        zero + "stage3_param_persistence_threshold": _keep_whole(known),
    }
    rules |= {f"optimizer.params.{name}": _Rule(value, f"train.{name}") for name, value in adam.items()}
    rules |= {f"scheduler.params.{name}": _Rule(value, key) for name, (value, key) in warmup.items()}
    if parallel.offload_optimizer:
        rules[zero + "offload_optimizer.device"] = _Rule("cpu", "the place of parallel.offload_optimizer")
    return rules


def _keep_whole(known: Known) -> _Rule:
    if _is_default(known.parallel, "zero_keep_whole"):
        return _Rule(10 * known.hidden_size)
    return _Rule(known.parallel.zero_keep_whole, "parallel.zero_keep_whole")


def _defaults(known: Known) -> dict[str, Value]:
    """What holds unless the file says otherwise."""
    zero = "zero_optimization."
    values: dict[str, Value] = {
        "steps_per_print": None,
        "bf16.check_grad_overflow": True,
        # DeepSpeed's own defaults would add up micro-batches and ranks in bf16.
        "data_types.grad_accum_dtype": "fp32",
        "communication_data_type": "fp32",
        zero + "overlap_comm": known.is_cuda,
        zero + "contiguous_gradients": True,
        zero + "reduce_scatter": True,
        zero + "reduce_bucket_size": _BUCKET_ELEMENTS,
        zero + "allgather_bucket_size": _BUCKET_ELEMENTS,
        zero + "stage3_prefetch_bucket_size": _BUCKET_ELEMENTS,
        zero + "stage3_param_persistence_threshold": known.parallel.zero_keep_whole,
        zero + "stage3_max_live_parameters": 1_000_000_000,
        zero + "stage3_max_reuse_distance": 1_000_000_000,
    }
    if known.parallel.offload_optimizer:
        values |= {zero + "offload_optimizer.device": "cpu", zero + "offload_optimizer.pin_memory": known.is_cuda}
    return values


def _fixed(known: Known) -> dict[str, Value]:
    return {
        # One pack per micro-batch and our own boundaries: its batch arithmetic never enters a gradient.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": known.train.clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16.enabled": known.train.dtype == "bf16",
        "zero_optimization.stage": zero_stage(known.parallel),
    }


def _resolve(path: str, key: str, value: Value, rule: _Rule | None) -> Value:
    if value == "auto":
        if rule is None:
            raise ConfigError(
                f'{path}: {key} is "auto", and no key of ours says what it is; write a value or remove it'
            )
        return rule.value
    if rule is not None and rule.key is not None and value != rule.value:
        raise ConfigError(
            f"{path}: {key}={json.dumps(value)} contradicts {rule.key} = {json.dumps(rule.value)}; change one of them, or "
            'write "auto" in the file'
        )
    return value


def _refuse_foreign(parallel: ParallelConfig, key: str, value: Value) -> None:
    path = parallel.deepspeed
    for name, instead in _REFUSED.items():
        if key == name or key.startswith(f"{name}."):
            raise ConfigError(f"{path}: {key} is not taken over; {instead}; remove `{name}` from the file")
    if key == "fp16.enabled" and value not in (False, "auto"):
        raise ConfigError(
            f"{path}: {key}={json.dumps(value)}: fp16 and its loss scaling are not supported; set train.dtype=bf16 and write "
            'false or "auto" here'
        )
    zero = "zero_optimization."
    if key == zero + "stage" and value not in (1, 2, 3):
        raise ConfigError(
            f"{path}: {key}={json.dumps(value)}, expected 1, 2 or 3; without ZeRO there is no engine, write 1"
        )
    if key in (zero + "offload_optimizer.device", zero + "offload_param.device") and value not in ("cpu", "none"):
        raise ConfigError(
            f'{path}: {key}={json.dumps(value)}, expected "cpu" or "none"; checkpoints are read from memory'
        )
    if key == zero + "mics_shard_size":
        raise ConfigError(f"{path}: {key}={json.dumps(value)}: DeepSpeed has removed MiCS; use zero_hpz_partition_size")
    if key == zero + "zero_hpz_partition_size" and value != 1 and parallel.tensor > 1:
        raise ConfigError(
            f"{path}: {key}={json.dumps(value)} with parallel.tensor={parallel.tensor}: DeepSpeed forms these groups of "
            "neighbouring ranks, which hold different parts of the weights; remove the key or set parallel.tensor=1"
        )


def _is_default(parallel: ParallelConfig, key: str) -> bool:
    return bool(getattr(parallel, key) == ParallelConfig.model_fields[key].default)


def _read(path: str) -> Json:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"parallel.deepspeed={path}: expected a JSON file, found: {error}; check the path") from error
    if not isinstance(content, dict):
        raise ConfigError(f"parallel.deepspeed={path}: expected a JSON object, found a {type(content).__name__}")
    if "bfloat16" in content:  # DeepSpeed's older name
        content["bf16"] = content.pop("bfloat16")
    for name in _SECTIONS:
        if not isinstance(content.get(name, {}), dict):
            raise ConfigError(f"parallel.deepspeed={path}: expected an object under {name}, found {content[name]!r}")
    return content


def _flat(content: Mapping[str, Value], prefix: str = "") -> Iterator[tuple[str, Value]]:
    """(dotted key, value) of every leaf; an empty object is a leaf."""
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _nested(flat: Mapping[str, Value]) -> Json:
    content: Json = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        place = content
        for name in path:
            inner = place.setdefault(name, {})
            assert isinstance(inner, dict), key
            place = inner
        if value or not isinstance(place.get(last), dict):  # an empty section of the file takes nothing away from ours
            place[last] = value
    return content
