from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from mmscale.config.env import Launch
from mmscale.config.schema import ModelConfig, ParallelConfig, TrainConfig
from mmscale.errors import ConfigError
from mmscale.parallel.apply import external_parts, make_engine
from mmscale.parallel.mesh import init_mesh
from mmscale.train.optim import build_optimizer, param_groups


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.llm = nn.ModuleDict(
            {
                "bias_free_norm_proj": nn.Linear(4, 6),
                "embed": nn.Embedding(9, 4),
                "scale": nn.LayerNorm(4),
                "head": nn.Linear(4, 9),
            }
        )
        self.llm["head"].weight = self.llm["embed"].weight
        self.vision = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Linear(4, 4))
        self.vision[1].weight.requires_grad_(False)  # such as Whisper's sinusoidal positions: fixed by the model
        self.connector = nn.Linear(4, 4)

    def parts(self) -> dict[str, nn.Module]:
        return {"llm": self.llm, "vision": self.vision, "vision_connector": self.connector}


def config(**parts: dict) -> TrainConfig:
    full = {"llm": {"tune": "full"}, "vision": {"tune": "full", "lr": 1e-5}, "vision_connector": {"tune": "full"}}
    return TrainConfig(steps=1, global_batch=1, lr=1e-3, weight_decay=0.1, parts={**full, **parts})


def test_every_trained_parameter_is_in_one_group_with_its_rate_and_decay() -> None:
    groups = param_groups(Net(), config())
    assert [(g.part, g.lr, g.weight_decay, set(g.names)) for g in groups] == [
        ("llm", 1e-3, 0.1, {"llm.bias_free_norm_proj.weight"}),
        ("llm", 1e-3, 0.0, {"llm.bias_free_norm_proj.bias", "llm.embed.weight", "llm.scale.weight", "llm.scale.bias", "llm.head.bias"}),
        ("vision", 1e-5, 0.1, {"vision.0.weight"}),
        ("vision", 1e-5, 0.0, {"vision.0.bias", "vision.1.bias"}),
        ("vision_connector", 1e-3, 0.1, {"connector.weight"}),
        ("vision_connector", 1e-3, 0.0, {"connector.bias"}),
    ]  # fmt: skip
    for group in groups:
        assert len(group.names) == len(group.params)


def test_frozen_parts_have_no_group_and_a_frozen_run_is_refused() -> None:
    frozen = {"tune": "frozen"}
    assert {g.part for g in param_groups(Net(), config(vision=frozen, llm=frozen))} == {"vision_connector"}
    with pytest.raises(ConfigError, match="something to train"):
        param_groups(Net(), config(vision=frozen, llm=frozen, vision_connector=frozen))


def test_parts_and_entries_must_match() -> None:
    with pytest.raises(ConfigError, match=re.escape("found none for ['vision_connector']")):
        param_groups(Net(), config(vision_connector=None))
    with pytest.raises(ConfigError, match=re.escape("without a part ['audio']")):
        param_groups(Net(), config(audio={"tune": "full"}))


def test_a_parameter_outside_all_parts_is_named() -> None:
    net = Net()
    net.lost = nn.Parameter(torch.zeros(2))
    with pytest.raises(ConfigError, match="first lost"):
        param_groups(net, config())


def test_parts_that_share_a_weight_must_be_tuned_alike() -> None:
    net = Net()
    net.connector.weight = net.llm["bias_free_norm_proj"].weight
    names = [name for g in param_groups(net, config()) for name in g.names]
    assert len(names) == len(set(names)), "a tied weight stands in one group"
    with pytest.raises(ConfigError, match="tied parts"):
        param_groups(net, config(vision_connector={"tune": "frozen"}))


def test_optimizers_take_the_groups_in_order() -> None:
    groups = param_groups(Net(), config())
    adamw = build_optimizer(groups, config())
    assert [(g["lr"], g["weight_decay"]) for g in adamw.param_groups] == [(g.lr, g.weight_decay) for g in groups]
    sgd = build_optimizer(groups, config().model_copy(update={"optimizer": "sgd"}))
    assert isinstance(sgd, torch.optim.SGD) and all(
        g["weight_decay"] == 0 and g["momentum"] == 0 for g in sgd.param_groups
    )


def test_the_engine_freezes_what_the_optimizer_does_not_hold() -> None:
    net, train = Net(), config(vision={"tune": "frozen"})
    mesh = init_mesh(ParallelConfig(), "cpu", Launch())
    optimizer = build_optimizer(param_groups(net, train), train)
    names = {name for name, _ in make_engine(net, optimizer, ParallelConfig(), train, mesh, ["vision"]).state_views()}
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == [
        "vision.0.weight",
        "vision.0.bias",
        "vision.1.weight",
        "vision.1.bias",
    ]
    assert not any("vision" in name for name in names) and "optim.state.connector.bias.exp_avg" in names
    with pytest.raises(ConfigError, match="build the optimizer from this model"):
        make_engine(Net(), optimizer, ParallelConfig(), train, mesh)


def test_frozen_parts_with_a_path_are_external() -> None:
    model = ModelConfig(llm={"path": "/w/llm"}, vision={"path": "/w/vit"}, tokenizer={"path": "t"})
    frozen = {"tune": "frozen"}
    assert external_parts(model, config(vision=frozen)) == {"vision": "/w/vit"}
    assert external_parts(model, config(llm=frozen)) == {"llm": "/w/llm"}
    random_vision = model.model_copy(update={"vision": model.vision.model_copy(update={"path": None, "config": {}})})
    assert external_parts(random_vision, config(vision=frozen)) == {}
