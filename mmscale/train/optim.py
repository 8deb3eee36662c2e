"""Which parameters are trained, at which learning rate and weight decay, and the optimizer over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from mmscale.config.schema import PartConfig, TrainConfig
from mmscale.errors import ConfigError

_EMBEDDING_FACTS = {"num_embeddings", "embedding_dim"}
"""What tells an embedding, torch's or a vocabulary-parallel one, from other modules."""


class HasParts(Protocol):
    """A model that names its parts, such as `llm` and `vision_connector`; together they hold every parameter."""

    def parts(self) -> Mapping[str, nn.Module]:
        """Part name -> module."""
        ...


@dataclass(frozen=True, slots=True)
class ParamGroup:
    """Parameters of one part with one learning rate and weight decay. `lr` is the peak; `names[i]` is `params[i]`'s name.

    `size`: numbers in all of them, counted before an engine shards them and leaves `params` empty.
    """

    part: str
    lr: float
    weight_decay: float
    names: tuple[str, ...]
    params: tuple[nn.Parameter, ...]
    size: int


def param_groups(model: HasParts, train: TrainConfig) -> list[ParamGroup]:
    """The groups of all trained parameters, each parameter in exactly one; no empty group.

    Per part first those with weight decay, then those without: vectors and scalars (norms, biases), and embeddings, also
    where an embedding is tied to an output matrix. Parameters that the model itself holds fixed stay out.

    Raises:
        ConfigError: a part without a `train.parts` entry or the other way round, a parameter in no part, a parameter
            shared by a trained and a frozen part, or nothing to train.
    """
    assert isinstance(model, nn.Module), "a model with parts is a module"
    parts = dict(model.parts())
    settings = part_settings(parts, train)
    tables = [m for m in model.modules() if vars(m).keys() >= _EMBEDDING_FACTS]
    embeddings = {id(p) for m in tables for p in m.parameters(recurse=False)}
    names = {id(param): name for name, param in model.named_parameters()}
    groups: list[ParamGroup] = []
    owner: dict[int, str] = {}
    for part, module in parts.items():
        for param in module.parameters():
            first = owner.setdefault(id(param), part)
            if settings[first].tune != settings[part].tune:
                raise ConfigError(
                    f"expected tied parts to be tuned alike, found {names[id(param)]} in train.parts.{first} "
                    f"({settings[first].tune}) and {part} ({settings[part].tune}); give both the same `tune`"
                )
        own = [p for p in module.parameters() if owner[id(p)] == part and p.requires_grad]
        if settings[part].tune == "full":
            plain = [p for p in own if p.dim() < 2 or id(p) in embeddings]
            plain_ids = {id(p) for p in plain}
            decayed = [p for p in own if id(p) not in plain_ids]
            lr = settings[part].lr or train.lr
            for params, weight_decay in ((decayed, train.weight_decay), (plain, 0.0)):
                if params:
                    found = tuple(names[id(p)] for p in params)
                    groups.append(
                        ParamGroup(part, lr, weight_decay, found, tuple(params), sum(p.numel() for p in params))
                    )
    _require_complete(names, owner, groups)
    return groups


def part_settings(parts: Mapping[str, nn.Module], train: TrainConfig) -> dict[str, PartConfig]:
    """The `train.parts` entry of each part. Raises ConfigError unless parts and entries match one to one."""
    settings = {name: value for name, value in train.parts if value is not None}
    missing, unknown = sorted(set(parts) - set(settings)), sorted(set(settings) - set(parts))
    if missing or unknown:
        raise ConfigError(
            f"expected one entry in train.parts for each part of the model ({', '.join(parts)}), found none for "
            f"{missing or 'no part'} and entries without a part {unknown or 'nowhere'}; add or remove them"
        )
    return {name: settings[name] for name in parts}


def build_optimizer(groups: Sequence[ParamGroup], train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW or plain SGD over the groups, in their order.

    AdamW runs fused: one pass over weights, gradients and moments, on the CPU too, and elementwise, so that flat
    partitions of sharded engines are updated to the same bits as whole tensors. `foreach` would hold temporary copies.
    """
    settings = [{"params": list(g.params), "lr": g.lr, "weight_decay": g.weight_decay} for g in groups]
    if train.optimizer == "sgd":
        return torch.optim.SGD([{**s, "weight_decay": 0.0} for s in settings], lr=train.lr)
    return torch.optim.AdamW(settings, lr=train.lr, betas=train.betas, eps=train.eps, fused=True)


def _require_complete(names: Mapping[int, str], owner: Mapping[int, str], groups: Sequence[ParamGroup]) -> None:
    lost = sorted(name for key, name in names.items() if key not in owner)
    if lost:
        raise ConfigError(
            f"expected every parameter in a part of the model, found {len(lost)} outside, first {lost[0]}; "
            "add the module that holds it to the model's parts()"
        )
    if not groups:
        raise ConfigError(
            "expected something to train, found every part of train.parts frozen; set `tune: full` on at least one part"
        )
