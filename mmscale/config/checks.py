"""Checks between keys, made before anything heavy starts. Each refusal names the keys, their values and a way out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from mmscale.config.layouts import check_model, data_parallel_size, is_undecided
from mmscale.config.mixture import check_mixture, is_stream_mode, leaf_sources
from mmscale.config.schema import Config, ParallelConfig, SourceConfig
from mmscale.errors import ConfigError
from mmscale.redact import HIDDEN, hidden_keys
from mmscale.types import MediaSpecs

__all__ = ["check_config", "check_engine_keys", "check_lengths", "check_parallel", "data_parallel_size"]


def check_config(config: Config, world_size: int) -> None:
    """Refuses combinations of keys that cannot work on `world_size` processes. Raises ConfigError."""
    dp_size = data_parallel_size(config.parallel, world_size, config.model.llm)
    _check_nothing_hidden(config)
    check_parallel(config.parallel)
    check_engine_keys(config.parallel, world_size)
    check_model(config)
    if not is_undecided(config.parallel):  # else once the degrees are chosen
        _check_batch(config, dp_size)
    _check_stream_mode(config)
    _check_parts(config)
    _check_validation(config)
    _check_sources("data.sources", config.data.sources)
    _check_sources("eval.sources", config.eval.sources)


def _check_nothing_hidden(config: Config) -> None:
    """Refuses the copy in a run directory where secrets were left out of it."""
    hidden = hidden_keys({"data": config.data.model_dump(mode="json"), "eval": config.eval.model_dump(mode="json")})
    if hidden:
        raise ConfigError(
            f"{', '.join(hidden)}: expected a whole address or command, found one whose secrets were left out ({HIDDEN}) when the run "
            f"directory was written; start from your own config, or give the key again: {hidden[0]}=..."
        )


def check_parallel(parallel: ParallelConfig) -> None:
    """Refuses keys of one engine beside another engine, and keys without a use. Raises ConfigError."""
    if parallel.engine == "fsdp":
        defaults = ParallelConfig()
        only_deepspeed = ("zero_stage", "zero_keep_whole", "offload_optimizer", "deepspeed")
        found = [
            f"{key}={getattr(parallel, key)}"
            for key in only_deepspeed
            if getattr(parallel, key) != getattr(defaults, key)
        ]
        if found:
            raise ConfigError(
                f"parallel.engine=fsdp shards weights, gradients and optimizer state by itself, found parallel.{found[0]}, which "
                "DeepSpeed alone reads; remove it, or set parallel.engine=deepspeed"
            )
    if parallel.tensor_sequence and parallel.tensor == 1:
        raise ConfigError(
            "parallel.tensor_sequence=true divides tokens over tensor-parallel ranks, found parallel.tensor=1; set parallel.tensor to 2 "
            "or more, or remove it"
        )
    if parallel.deepspeed is not None and not Path(parallel.deepspeed).is_file():
        raise ConfigError(
            f"parallel.deepspeed: a DeepSpeed JSON file is expected, found no file {parallel.deepspeed} (relative to the folder that "
            "the command runs in); correct the path, or remove it"
        )


def check_engine_keys(parallel: ParallelConfig, world_size: int) -> None:
    """Refuses DeepSpeed's keys on one process that `parallel.engine: auto` leaves without an engine. Raises ConfigError."""
    if parallel.engine != "auto" or world_size > 1:
        return
    for key, value in (("deepspeed", parallel.deepspeed), ("offload_optimizer", parallel.offload_optimizer)):
        if value:
            raise ConfigError(
                f"parallel.{key}={value} is DeepSpeed's, found one process, which parallel.engine=auto leaves without an engine; start "
                "several processes (mmscale check: --world-size), set parallel.engine=deepspeed, or remove it"
            )


def _check_stream_mode(config: Config) -> None:
    p = config.parallel
    if is_stream_mode("data.sources", config.data.sources) and p.tensor * p.ulysses * p.ring > 1:
        raise ConfigError(
            f"data.sources: `mode: stream` gives every process packs of its own, found parallel.tensor={p.tensor}, "
            f"parallel.ulysses={p.ulysses}, parallel.ring={p.ring}, whose ranks share packs; index the data (mmscale-data index DIR) and "
            "leave out `mode`, or set these degrees to 1"
        )


def _check_batch(config: Config, dp_size: int) -> None:
    batch, group = config.train.global_batch, config.data.plan_group
    if batch % dp_size:
        lower, upper = batch - batch % dp_size, batch + dp_size - batch % dp_size
        near = f"{lower} or {upper}" if lower else str(upper)
        raise ConfigError(
            f"train.global_batch={batch} packs must be a multiple of the {dp_size} data-parallel ranks; set it to {near}"
        )
    if batch % group and group % batch:
        raise ConfigError(
            f"train.global_batch={batch} must be a multiple or a divisor of data.plan_group={group}; "
            f"set data.plan_group={batch}"
        )


def _check_parts(config: Config) -> None:
    parts = config.train.parts
    for name in ("vision", "audio"):
        for part in (name, f"{name}_connector"):
            present, named = getattr(config.model, name) is not None, getattr(parts, part) is not None
            if present and not named:
                raise ConfigError(
                    f"train.parts.{part} is missing: say what is trained, {{tune: full}} or {{tune: frozen}}"
                )
            if named and not present:
                raise ConfigError(f"train.parts.{part} is set but the model has no model.{name}; remove it")
    if all(part is None or part.tune == "frozen" for _, part in parts):
        raise ConfigError(
            "train.parts: every part is frozen, so nothing would be trained; set tune: full on one of them"
        )


def _check_sources(key: str, sources: Mapping[str, SourceConfig]) -> None:
    """Refuses what is no mixture, and a dataset under two names, whose samples would come twice."""
    check_mixture(key, sources)
    names: dict[str, str] = {}
    for name, source in leaf_sources(sources).items():
        path = os.path.normpath(source.path or "")
        if path in names:
            raise ConfigError(
                f"{key}.{name}: its path {source.path} is also the path of {key}.{names[path]}; remove one, and raise the "
                "other's weight or repeat"
            )
        names[path] = name


def _check_validation(config: Config) -> None:
    is_stream_mode("data.sources", config.data.sources)
    if any(source.mode == "stream" for source in leaf_sources(config.eval.sources).values()):
        raise ConfigError(
            "eval.sources: `mode: stream` cannot give every sample exactly once to any number of ranks; index the validation "
            "data (mmscale-data index DIR) and leave out `mode`"
        )
    if config.eval.every and not config.eval.sources:
        raise ConfigError(
            f"eval.every={config.eval.every} but eval.sources is empty; name a source or set eval.every=0"
        )


def check_lengths(config: Config, specs: MediaSpecs, max_positions: int | None) -> None:
    """Refuses packs that cannot hold one medium, and documents longer than the LLM's positions. Raises ConfigError."""
    seq_len = config.data.seq_len
    for name, spec in (("image", specs.image), ("audio", specs.audio)):
        if spec is not None and spec.tokens >= seq_len:
            raise ConfigError(
                f"data.seq_len={seq_len} tokens cannot hold one {name} of {spec.tokens} tokens and its text; raise data.seq_len "
                f"or choose a connector that merges tokens"
            )
    if max_positions is not None and seq_len > max_positions:
        raise ConfigError(
            f"data.seq_len={seq_len} exceeds the LLM's max_position_embeddings={max_positions}; lower data.seq_len, since one "
            f"document may fill a whole pack"
        )
