"""What a pack costs to compute: from the model's configuration as FLOPs, or fitted to measured steps.

A matrix weight costs 2 operations per token forward and 4 backward, 2 of them only when it is trained (Kaplan et al. 2020,
arXiv:2001.08361, section 2.1). Causal attention over a document of L tokens costs 2 * L^2 * width forward and twice that
backward, per layer; a tower's attention is not causal and costs 4 * n^2 * width. Towers that are frozen have no backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from mmscale.config.flops import PartWork, audio_work, connector_work, vision_work
from mmscale.config.llm import read_llm_sizes
from mmscale.config.schema import Config, CostConfig, LlmConfig, ModelConfig, PartConfig, PartsConfig
from mmscale.config.specs import tower_config
from mmscale.errors import ConfigError, DataError
from mmscale.types import MediaSpecs

FEATURES = ("fixed", "token", "pair", "vision_input", "audio_input")
"""The keys of `CostConfig` in the order of the features of a pack."""

_FULL_PACK = float(1 << 50)
_WARM_UP = 10
_LEAST_STEPS = 20

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def pack_cost(
    model: ModelConfig, specs: MediaSpecs, parts: PartsConfig | None = None, vocab_size: int | None = None
) -> CostConfig:
    """FLOPs of a pack, forward and backward, from the configuration alone.

    Args:
        model: LLM, towers and connectors.
        specs: from `media_specs`.
        parts: what is trained; None = everything.
        vocab_size: rows of the head; None = those of the LLM's configuration.

    Raises:
        ConfigError: an LLM configuration that does not give its sizes.
    """
    llm, width, pair = _llm_flops(model.llm, vocab_size)
    trained = {name: _is_trained(getattr(parts, name) if parts else None) for name in PartsConfig.model_fields}
    cost = {"token": llm * (6 if trained["llm"] else 4), "pair": 3.0 * pair}
    if model.vision is not None and specs.image is not None:
        raw = tower_config(model.vision, "model.vision")
        tower = vision_work(raw, model.vision.select_layer)
        connector = connector_work(model.vision.connector, int(raw["hidden_size"]), width, specs.image.tokens)
        cost["vision_input"] = _media_flops(tower, connector, trained["vision"], trained["vision_connector"])
    if model.audio is not None and specs.audio is not None:
        raw, rows = tower_config(model.audio, "model.audio"), specs.audio.tokens
        tower = audio_work(raw, model.audio.select_layer, specs.audio.window_samples, rows)
        hidden = int(raw["d_model" if raw["model_type"] == "whisper" else "hidden_size"])
        connector = connector_work(model.audio.connector, hidden, width, rows)
        cost["audio_input"] = _media_flops(tower, connector, trained["audio"], trained["audio_connector"])
    return CostConfig(**cost)


def run_cost(config: Config, specs: MediaSpecs, vocab_size: int) -> CostConfig:
    """The cost of a run's packs: `data.cost`, or FLOPs with a head of `vocab_size` rows. Raises ConfigError like `pack_cost`."""
    return config.data.cost or pack_cost(config.model, specs, config.train.parts, vocab_size)


def integer_coefficients(cost: CostConfig, seq_len: int) -> tuple[int, ...]:
    """Costs per token, pair, vision input and audio input as integers, so that all machines sum and sort them alike.

    They are scaled so that the tokens and pairs of one pack-long document come to 2^50. What every pack costs is left out.

    Raises:
        ConfigError: neither tokens nor pairs cost anything.
    """
    full = cost.token * seq_len + cost.pair * float(seq_len) ** 2
    if full <= 0:
        raise ConfigError(
            f"data.cost: expected a cost per token or per pair above 0, found token={cost.token:g} and pair={cost.pair:g}; "
            "set one of them, or remove data.cost"
        )
    scale = _FULL_PACK / full
    return tuple(round(value * scale) for value in (cost.token, cost.pair, cost.vision_input, cost.audio_input))


def document_costs(coefficients: Sequence[int], tokens: Ints, vision: Ints, audio: Ints) -> Ints:
    """Cost of each document [n] from `integer_coefficients`; the cost of a pack is the sum over its documents."""
    token, pair, vision_input, audio_input = coefficients
    return token * tokens + pair * tokens * tokens + vision_input * vision + audio_input * audio


def predict_cost(cost: CostConfig, features: Floats) -> Floats:
    """Cost [n] of packs or steps with some features [n, 5], in the unit of `cost`."""
    return np.asarray(features, np.float64) @ np.array([getattr(cost, name) for name in FEATURES])


@dataclass(frozen=True)
class FittedCost:
    """A fit, and the relative error of its predictions for steps that it has not seen: on average and at worst."""

    cost: CostConfig
    mean_error: float
    worst_error: float


def fit_cost(features: Floats, seconds: Floats) -> FittedCost:
    """The costs with which the features explain the measured times best, by relative error; none is negative.

    The error is that of the odd steps under a fit of the even ones; the fit itself is of all. When tokens never vary, `fixed`
    and `token` cannot be told apart: their sum is still right.

    Args:
        features: [n, 5] per step or pack: how often each of `FEATURES` occurs (the first is the number of packs).
        seconds: [n], all above 0; the first 10 are left out, they are slower.

    Raises:
        DataError: fewer than 20 steps are left.
    """
    rows, times = np.asarray(features, np.float64)[_WARM_UP:], np.asarray(seconds, np.float64)[_WARM_UP:]
    if len(rows) < _LEAST_STEPS:
        raise DataError(
            f"expected at least {_WARM_UP + _LEAST_STEPS} measured steps to fit the cost, found {len(features)}; "
            "train some more steps and fit again"
        )
    relative = rows / times[:, None]
    held_out = np.abs(relative[1::2] @ _non_negative_fit(relative[::2]) - 1)
    cost = CostConfig(**dict(zip(FEATURES, _non_negative_fit(relative).tolist(), strict=True)))
    return FittedCost(cost, float(held_out.mean()), float(held_out.max()))


def _non_negative_fit(rows: Floats) -> Floats:
    """The x >= 0 with the least |rows @ x - 1|^2: of 5 columns every subset is tried, the best that stays positive wins."""
    scale = np.where(rows.any(0), np.abs(rows).max(0), 1.0)
    target = np.ones(len(rows))
    best, found = float(len(rows)), np.zeros(rows.shape[1])
    for size in range(1, rows.shape[1] + 1):
        for subset in map(list, combinations(range(rows.shape[1]), size)):
            x = np.linalg.lstsq(rows[:, subset] / scale[subset], target, rcond=None)[0]
            error = float(np.square(rows[:, subset] / scale[subset] @ x - target).sum())
            if (x >= 0).all() and error < best:
                best, found = error, np.zeros(rows.shape[1])
                found[subset] = x / scale[subset]
    return found


def _is_trained(part: PartConfig | None) -> bool:
    return part is None or part.tune != "frozen"


def _media_flops(tower: PartWork, connector: PartWork, tower_trained: bool, connector_trained: bool) -> float:
    """FLOPs of one tower input, rounded up to whole passes through a part."""
    passes = 3 if connector_trained else 2 if tower_trained else 1
    return tower.forward * (3 if tower_trained else 1) + connector.forward * passes


def _llm_flops(llm: LlmConfig, vocab_size: int | None) -> tuple[float, int, float]:
    """(matrix weights that a token meets, head included; width; forward FLOPs of attention per squared length)."""
    sizes = read_llm_sizes(llm)
    rows = vocab_size or sizes.vocab
    if rows is None:
        raise ConfigError(
            "model.llm.config: expected `vocab_size` in the Hugging Face configuration, found none; add it"
        )
    weights = sizes.layers * (sizes.attention_weights + sizes.mlp_weights) + sizes.width * rows
    return float(weights), sizes.width, 2.0 * sizes.layers * sizes.heads * sizes.head_size
