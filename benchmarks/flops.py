"""The count of operations against torch's, and the share of a step that does not compute the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.result import Result, Settings
from benchmarks.step import SIZES, opened, run_config, write_data
from mmscale.config.schema import Config
from mmscale.train import loop
from mmscale.train.heartbeat import Heartbeat
from mmscale.train.profile import COMPUTE

PACKS = 10
"""Of each kind of run that is counted."""
PROFILES = 7
"""Runs of which the least disturbed one counts."""
_aten = torch.ops.aten


def flop_counter_err(settings: Settings) -> Result:
    """Largest relative difference between `FlopModel` and `torch.utils.flop_counter` over packs of the trainer, forward and
    backward in its engine: with everything trained, and with a frozen tower and recomputed layers."""
    write_data(settings)
    config = run_config(settings, workers=0, head_rows=SIZES[settings.device].head_rows)
    frozen = config.train.parts.model_copy(
        update={"vision": config.train.parts.llm.model_copy(update={"tune": "frozen"})}
    )
    train = config.train.model_copy(update={"parts": frozen, "checkpoint_activations": True})
    folder = config.run.model_copy(update={"dir": f"{config.run.dir}-frozen"})
    errors = [*_errors(config), *_errors(config.model_copy(update={"train": train, "run": folder}))]
    text = f"torch.utils.flop_counter with the CPU's fused attention added; worst of {len(errors)} packs"
    return Result("flop_counter_err", max(errors), "relative", "<= 0.01", text)


def step_not_compute_frac(settings: Settings) -> Result:
    """Share of the training loop's wall time outside operators of forward and backward: data wait, Python, autograd's engine,
    views, clipping and update, metrics. With the profiler on, which makes it larger; of several runs the fastest, as neighbours
    on the machine slow Python down more than matrix products."""
    write_data(settings)
    config = run_config(settings, workers=1, steps=12, head_rows=SIZES[settings.device].head_rows)
    runs = [_profiled(config, number) for number in range(PROFILES)]
    shares = [sum(_beside_compute(found).values()) for found in runs]
    fastest = min(range(PROFILES), key=lambda i: runs[i]["step_s"])
    rest = sorted(_beside_compute(runs[fastest]).items(), key=lambda item: -item[1])
    text = (
        f"none; fastest of {PROFILES} runs, steps of {runs[fastest]['step_s'] * 1e3:.0f} ms: "
        f"{', '.join(f'{kind} {share:.1%}' for kind, share in rest)}; all runs {min(shares):.3f} to {max(shares):.3f}"
    )
    return Result("step_not_compute_frac", shares[fastest], "share", "<= 0.1", text)


def _beside_compute(found: dict[str, Any]) -> dict[str, float]:
    """Kind of work -> its share of the step, of what does not compute the model."""
    return {kind: share for kind, share in found["kinds"].items() if kind not in COMPUTE}


def _profiled(config: Config, number: int) -> dict[str, Any]:
    """What a run of the trainer's loop says of its steps."""
    own = {"profile": True, "dir": f"{config.run.dir}-profile-{number}"}
    with opened(config.model_copy(update={"run": config.run.model_copy(update=own)})) as (run, job):
        with Heartbeat(run.folder, run.mesh.rank, config.run.watch) as beat:
            loop.train_from(run, job, beat)
        found: dict[str, Any] = json.loads((run.folder / "profile/shares.json").read_text())
    return found


def _errors(config: Config) -> list[float]:
    """Relative differences of the packs of a new run."""
    errors = []
    with opened(config) as (run, _):
        steps = run.stream.steps()
        for _ in range(PACKS):
            packs = next(steps).packs
            with FlopCounterMode(display=False, custom_mapping=dict(FORMULAS)) as counter:
                run.engine.forward_backward(packs, sum(pack.num_targets for pack in packs))
            counted = counter.get_total_flops()
            errors.append(abs(sum(run.flops.pack(pack).hardware for pack in packs) / counted - 1))
            run.engine.step([0.0 for _ in run.groups])
        steps.close()
    return errors


def _pairs(q: Tensor, k: Tensor, causal: bool, mask: Tensor | None) -> int:
    """Pairs that a call of the CPU's fused attention sees, from what the call is given."""
    num_q, num_k = q.shape[2], k.shape[2]
    if mask is not None:
        return int(mask.isfinite().sum()) // mask[..., 0, 0].numel()
    return num_q * (num_q + 1) // 2 if causal else num_q * num_k


def _attention(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False, *, attn_mask: Tensor | None = None, **_: Any
) -> int:  # fmt: skip
    return 2 * 2 * q[..., 0, :].numel() * _pairs(q, k, causal, attn_mask)


def _attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dropout: float, causal: bool, *,
    attn_mask: Tensor | None = None, **_: Any,
) -> int:  # fmt: skip
    """The scores once more, then the gradients of weights, values, queries and keys."""
    return 5 * 2 * q[..., 0, :].numel() * _pairs(q, k, causal, attn_mask)


def _convolution_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: Any, extra: Any,
    groups: int, wanted: list[bool], **_: Any,
) -> int:  # fmt: skip
    """Like torch's, which forgets the groups in the gradient of the weight."""
    return (wanted[0] + wanted[1]) * 2 * len(x) * dout[0, 0].numel() * weight.numel()


def _grouped_product(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """Each row of x meets one of the matrices; for a gradient of the matrices, each column of x one group of rows."""
    return 2 * x.numel() * weight.shape[-1]


def _head_and_loss(hidden: Tensor, weight: Tensor, bias: Any, labels: Tensor, *rest: Any, **_: Any) -> int:
    """One operator makes the logits and, where they are wanted, both gradients."""
    return (1 + rest[-3] + rest[-2]) * 2 * len(hidden) * weight.numel()


FORMULAS: Mapping[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten.convolution_backward: _convolution_backward,
    _aten._grouped_mm: _grouped_product,
    torch.ops.mmscale.linear_cross_entropy: _head_and_loss,
}
"""Operations by operator, from the arguments of a call: what torch's counter does not know by itself."""
for _formula in FORMULAS.values():
    _formula._get_raw = True  # type: ignore[attr-defined]  # torch's mark: tensors instead of shapes
