"""Learning-rate curves as pure functions of the step."""

from __future__ import annotations

import math

from mmscale.config.schema import TrainConfig


def lr_factor(step: int, train: TrainConfig) -> float:
    """The share of the peak learning rate used in optimizer step `step` (1 = the first step).

    Linear warm-up reaches 1 at step `warmup_steps`; then the curve falls towards `min_lr_ratio`, which it would reach one
    step after the last, so that no step is spent at a rate of zero.

    Example:
        >>> from types import SimpleNamespace
        >>> train = SimpleNamespace(warmup_steps=2, steps=4, schedule="linear", min_lr_ratio=0.0)
        >>> [lr_factor(step, train) for step in (1, 2, 3, 4)]
        [0.5, 1.0, 1.0, 0.5]
    """
    if step <= train.warmup_steps:
        return step / train.warmup_steps
    if train.schedule == "constant":
        return 1.0
    done = min(1.0, (step - 1 - train.warmup_steps) / max(1, train.steps - train.warmup_steps))
    fall = 1.0 - done if train.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return train.min_lr_ratio + (1.0 - train.min_lr_ratio) * fall
