"""Checks between keys, made before anything heavy starts. Each refusal names the keys, their values and a way out."""

from __future__ import annotations

import os
from collections.abc import Mapping

from mmscale.config.mixture import check_mixture, is_stream_mode, leaf_sources
from mmscale.config.schema import Config, ParallelConfig, SourceConfig
from mmscale.errors import ConfigError
from mmscale.types import MediaSpecs


def data_parallel_size(p: ParallelConfig, world_size: int) -> int:
    """Ranks that see different packs. Raises ConfigError when the degrees do not fit the world size."""
    model_ranks = p.tensor * p.ulysses * p.ring
    if world_size % model_ranks:
        raise ConfigError(
            f"parallel.tensor={p.tensor} x parallel.ulysses={p.ulysses} x parallel.ring={p.ring} = {model_ranks} must divide the "
            f"{world_size} processes of this run; start a multiple of {model_ranks} processes or lower a degree"
        )
    return world_size // model_ranks


def check_config(config: Config, world_size: int) -> None:
    """Refuses combinations of keys that cannot work on `world_size` processes. Raises ConfigError."""
    dp_size = data_parallel_size(config.parallel, world_size)
    check_parallel(config.parallel)
    _check_batch(config, dp_size)
    _check_parts(config)
    _check_validation(config)
    _check_sources("data.sources", config.data.sources)
    _check_sources("eval.sources", config.eval.sources)


def check_parallel(parallel: ParallelConfig) -> None:
    """Refuses the degrees and engines that this version does not have. Raises ConfigError."""
    for name in ("tensor", "ulysses", "ring"):
        degree = getattr(parallel, name)
        if degree > 1:
            raise ConfigError(
                f"parallel.{name}={degree}: this version trains data-parallel only; set parallel.{name}=1"
            )
    if parallel.engine == "fsdp":
        raise ConfigError(
            "parallel.engine=fsdp: this version has the engines auto and deepspeed; for fully sharded weights set "
            "parallel.engine=deepspeed and parallel.zero_stage=3"
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
