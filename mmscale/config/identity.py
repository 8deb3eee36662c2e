"""Which settings make a run what it is, so that two different runs are never mixed in one directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmscale.config.schema import Config

FREE = (
    "run.", "parallel.", "eval.", "data.", "train.steps", "train.save_every", "train.keep_last", "train.keep_every", "train.async_save",
    "train.guard.", "train.deterministic", "train.checkpoint_activations",
)  # fmt: skip
"""Keys that may change between two starts of a run. Those of `data.` are judged by the data state, which knows what a change of
the mixture means in the middle of a run."""


def identity_changes(before: Config, now: Config) -> list[str]:
    """Each setting that belongs to the run's identity and differs, as `key: old there, new now`."""
    old, new = _flat(before.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    return [
        f"{key}: {old.get(key)} there, {new.get(key)} now"
        for key in sorted({*old, *new})
        if not key.startswith(FREE) and old.get(key) != new.get(key)
    ]


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
