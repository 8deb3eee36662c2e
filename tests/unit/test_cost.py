"""The cost of a pack: the analytic one counts the weights of the real model, the fitted one predicts times it has not seen."""

import numpy as np
import pytest
import torch

from mmscale.config.cost import (
    FEATURES,
    document_costs,
    fit_cost,
    integer_coefficients,
    pack_cost,
    predict_cost,
)
from mmscale.config.schema import CostConfig, PartsConfig
from mmscale.config.specs import media_specs
from mmscale.errors import ConfigError, DataError
from mmscale.model.composite import skeleton
from mmscale.model.description import describe

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 160,
    "vocab_size": 320,
}
LLMS = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 4},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 24},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},
    "stablelm": {"num_key_value_heads": 4},
    "phi": {},
}


def whole(config, vocab=320):
    specs = media_specs(config.model, config.data)
    with torch.device("meta"):
        return skeleton(describe(config.model, vocab, specs)), specs


@pytest.mark.parametrize("kind", LLMS)
def test_tokens_cost_the_matrix_weights_of_the_language_model(kind, tiny_config):
    config = tiny_config(llm={"model_type": kind, **SMALL, **LLMS[kind]}, vision=None, audio=None)
    model, specs = whole(config)
    cost, config = pack_cost(config.model, specs), model.llm.config
    weights = sum(m.weight.numel() for m in model.llm.modules() if isinstance(m, torch.nn.Linear))
    assert cost.token == 6 * weights
    heads = config.num_attention_heads * (getattr(config, "head_dim", None) or 16)
    assert cost.pair == 6 * 3 * heads
    assert cost.vision_input == cost.audio_input == 0


def test_of_a_mixture_of_experts_only_the_experts_of_a_token_count(tiny_config):
    experts = {"model_type": "mixtral", **SMALL, "num_local_experts": 8, "num_experts_per_tok": 2}
    sparse = tiny_config(llm={**experts, "num_key_value_heads": 2}, vision=None, audio=None)
    dense = tiny_config(llm={"model_type": "llama", **SMALL, "num_key_value_heads": 2}, vision=None, audio=None)
    one, two = (pack_cost(c.model, media_specs(c.model, c.data)).token for c in (dense, sparse))
    assert two - one == 6 * 3 * (3 * 64 * 160 + 64 * 8)


@pytest.mark.parametrize("connector", ["linear", "mlp2x_gelu", "mlp_downsample"])
def test_media_cost_the_real_operations_of_tower_and_connector(connector, tiny_config):
    """Against torch's count of the operations that run."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = tiny_config(vision={"image_size": 56}, vision_keys={"connector": connector, "select_layer": None})
    specs = media_specs(config.model, config.data)
    encoder = skeleton(describe(config.model, 320, specs)).eval().vision
    cost = pack_cost(config.model, specs, vocab_size=320)
    frozen = {"vision": {"tune": "frozen"}, "vision_connector": {"tune": "frozen"}, "llm": {"tune": "full"}}
    forward = pack_cost(config.model, specs, PartsConfig(**frozen), 320)
    # the fused attention of the CPU is not counted
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(torch.zeros(3, 3, 56, 56))
    print(f"{connector}: {forward.vision_input:.0f} estimated, {counter.get_total_flops() / 3:.0f} counted")
    assert forward.vision_input == pytest.approx(counter.get_total_flops() / 3, rel=1e-6)
    assert cost.vision_input == pytest.approx(3 * forward.vision_input)


def test_a_tower_costs_up_to_the_layer_that_is_taken(tiny_config):
    costs = []
    for layer in (None, -1, -2, 1):
        config = tiny_config(audio=None, vision={"num_hidden_layers": 4}, vision_keys={"select_layer": layer})
        costs.append(pack_cost(config.model, media_specs(config.model, config.data), None, 320).vision_input)
    assert costs[0] == costs[1] > costs[2] > costs[3]
    assert costs[1] - costs[2] == pytest.approx((costs[2] - costs[3]) / 2)


def test_frozen_towers_cost_their_forward_pass_and_a_frozen_llm_no_weight_gradients(tiny_config):
    config = tiny_config()
    specs = media_specs(config.model, config.data)
    parts = {name: {"tune": "frozen"} for name in PartsConfig.model_fields}
    tuned = {**parts, "vision_connector": {"tune": "full"}, "audio_connector": {"tune": "full"}}
    everything, some = (pack_cost(config.model, specs, p, 320) for p in (None, PartsConfig(**tuned)))
    assert some.token == everything.token * 4 / 6
    assert everything.vision_input / 3 < some.vision_input < everything.vision_input
    assert everything.audio_input / 3 < some.audio_input < everything.audio_input


def test_an_llm_without_sizes_is_refused(tiny_config):
    config = tiny_config(llm={"hidden_size": None}, vision=None, audio=None)
    with pytest.raises(ConfigError, match=r"model\.llm.*hidden_size.*data\.cost"):
        pack_cost(config.model, media_specs(config.model, config.data))


def test_costs_are_integers_in_any_unit():
    cost = CostConfig(token=14e9, pair=262_144, vision_input=4.6e11, audio_input=1e12)
    documents = np.array([[1, 0, 0], [4096, 0, 0], [700, 1, 0], [700, 0, 1]], np.int64)
    costs = document_costs(integer_coefficients(cost, 4096), *documents.T)
    assert costs.dtype == np.int64
    assert abs(int(costs[1]) - (1 << 50)) < 1 << 26  # one document of the whole pack
    features = np.stack(
        [0 * documents[:, 0], documents[:, 0], documents[:, 0] ** 2, documents[:, 1], documents[:, 2]], 1
    )
    exact = predict_cost(cost, features)
    np.testing.assert_allclose(costs / costs[1], exact / exact[1], rtol=1e-7)
    seconds = CostConfig(**{name: value * 1e-15 for name, value in cost.model_dump().items()})
    np.testing.assert_allclose(document_costs(integer_coefficients(seconds, 4096), *documents.T), costs, rtol=1e-7)


def measured(seed, num_packs, noise, vary=True):
    """Features and seconds of packs with planted costs."""
    rng = np.random.default_rng(seed)
    true = CostConfig(fixed=0.02, token=3e-5, pair=1.5e-9, vision_input=2e-3, audio_input=5e-3)
    tokens = rng.integers(2000, 8192, num_packs) if vary else np.full(num_packs, 8192)
    pairs = tokens * rng.integers(100, 4000, num_packs)
    features = np.stack(
        [np.ones(num_packs), tokens, pairs, rng.integers(0, 30, num_packs), rng.integers(0, 5, num_packs)], 1
    )
    return features, predict_cost(true, features) * (1 + noise * rng.standard_normal(num_packs)), true


@pytest.mark.parametrize("vary", [True, False])
def test_the_fit_predicts_what_it_has_not_seen(seed, vary):
    features, seconds, true = measured(seed, 210, 0.02, vary)
    seconds[:10] *= 5  # the first steps are slow and left out
    fitted = fit_cost(features, seconds)
    fresh = measured(seed + 1, 500, 0.0, vary)[0]
    error = np.abs(predict_cost(fitted.cost, fresh) / predict_cost(true, fresh) - 1)
    print(f"true costs: mean error {error.mean():.4f}, worst {error.max():.4f}; held out {fitted.mean_error:.4f}")
    assert error.mean() < 0.01
    assert fitted.mean_error < 0.03 and fitted.worst_error < 0.15  # of times that are themselves off by 2 %
    assert all(getattr(fitted.cost, name) >= 0 for name in FEATURES)


def test_a_cost_that_is_not_there_comes_out_as_nothing(seed):
    features, _, _ = measured(seed, 200, 0.0)
    fitted = fit_cost(features, features[:, 1] * 2e-5)
    assert fitted.cost.token == pytest.approx(2e-5, rel=1e-6)
    assert fitted.worst_error < 1e-6
    features[:, 4] = 0  # no audio in the run
    assert fit_cost(features, features[:, 1] * 2e-5).cost.audio_input == 0


def test_the_fit_is_the_non_negative_one_with_the_least_error(seed):
    from scipy.optimize import nnls

    rng = np.random.default_rng(seed)
    features, seconds = rng.random((60, 5)) + 0.1, rng.random(60) + 0.5
    fitted = fit_cost(features, seconds).cost
    expected, _ = nnls(features[10:] / seconds[10:, None], np.ones(50))
    np.testing.assert_allclose([getattr(fitted, name) for name in FEATURES], expected, atol=1e-9)


def test_too_few_steps_are_refused(seed):
    features, seconds, _ = measured(seed, 29, 0.0)
    with pytest.raises(DataError, match=r"at least 30 measured steps.*found 29"):
        fit_cost(features, seconds)
