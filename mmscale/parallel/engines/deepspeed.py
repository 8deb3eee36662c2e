"""DeepSpeed ZeRO-1, 2 and 3 as an engine; the only module that imports deepspeed.

DeepSpeed is given one flat data-parallel group, our optimizer and a loss that is already scaled. Accumulation, schedule,
step count and checkpoints stay ours. Written for deepspeed 0.19.8, whose bf16 leaves fp32 buffers such as rotary
frequencies alone; a test holds it to that.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mmscale.config.env import set_env_default
from mmscale.errors import MissingExtraError
from mmscale.parallel.engines.base import (
    NUM_UPDATES,
    EngineSpec,
    StateReader,
    StepResult,
    check_names,
    create_moments,
    loss_scale,
    moment_names,
    read_checked,
    set_learning_rates,
    state_names,
)
from mmscale.types import PackedBatch

_BUCKET_ELEMENTS = 50_000_000


class DeepSpeedEngine:
    """ZeRO over all ranks of the mesh.

    Live weights are fp32 or, with `train.dtype: bf16`, bf16 with fp32 masters; gradients are added up and reduced in fp32.
    """

    def __init__(self, spec: EngineSpec, stage: int, keep_whole: int) -> None:
        """Wraps `spec.model`, whose weights must be final.

        Args:
            stage: 1 shards optimizer state, 2 gradients too, 3 weights too.
            keep_whole: ZeRO-3 keeps parameters with fewer elements than this whole on every rank.
        """
        self._spec = spec
        self._stage = stage
        self._params = list(spec.model.named_parameters())
        self._shapes = {n: p.shape for n, p in self._params}  # ZeRO-3 empties the parameters themselves
        self._deepspeed = _import_deepspeed(spec.mesh.device)
        with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints memory figures per group
            self._engine, *_ = self._deepspeed.initialize(
                model=spec.model,
                optimizer=spec.optimizer,
                model_parameters=[p for _, p in self._params if p.requires_grad],
                config=_resolved_config(spec, stage, keep_whole),
                dist_init_required=False,
            )
        self._num_updates = 0
        self._fill_moments(0)
        self._engine.train()

    def forward_backward(self, micro_batches: Sequence[PackedBatch], num_targets: int) -> float:
        """See `Engine.forward_backward`."""
        scale = loss_scale(self._spec.mesh, num_targets)
        total = torch.zeros((), dtype=torch.float64, device=self._spec.mesh.device)
        for index, batch in enumerate(micro_batches, start=1):
            self._engine.set_gradient_accumulation_boundary(index == len(micro_batches))
            loss = self._engine(batch.to(self._spec.mesh.device))
            self._engine.backward(loss * scale, scale_wrt_gas=False)
            total += loss.detach()
        return total.item()

    def step(self, lrs: Sequence[float]) -> StepResult:
        """See `Engine.step`."""
        set_learning_rates(self._spec.optimizer, lrs)
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        skipped = not self._engine.was_step_applied()
        self._num_updates += not skipped
        return StepResult(math.inf if skipped else norm, skipped)

    def evaluate(self, batch: PackedBatch) -> float:
        """See `Engine.evaluate`. Under ZeRO-3 every rank must evaluate equally often, as weights are gathered."""
        self._engine.eval()
        try:
            with torch.no_grad():
                return float(self._engine(batch.to(self._spec.mesh.device)))
        finally:
            self._engine.train()

    def state_views(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine.state_views`. Each tensor is gathered on all ranks; every rank keeps its share on the CPU."""
        from deepspeed import utils

        mesh = self._spec.mesh
        if mesh.is_main:
            yield NUM_UPDATES, torch.tensor(self._num_updates)
        for index, (name, param) in enumerate(self._params):
            is_owner = index % mesh.world_size == mesh.rank
            if name in self._spec.stored:
                whole = utils.safe_get_full_fp32_param(param) if param.requires_grad else self._whole_frozen(param)
                if is_owner:
                    yield f"model.{name}", whole.float().cpu()
            for moment in moment_names(self._spec.optimizer) if param.requires_grad else ():
                whole = utils.safe_get_full_optimizer_state(param, moment)
                if is_owner:
                    yield f"optim.state.{name}.{moment}", whole.float().cpu()

    def load_state(self, reader: StateReader) -> None:
        """See `Engine.load_state`. The live weights must have been loaded before the engine was made."""
        check_names(reader, state_names(self._spec))
        self._num_updates = int(reader.read(NUM_UPDATES))
        self._fill_moments(self._num_updates)
        for name, param in self._params:
            if param.requires_grad:
                shape = self._shapes[name]
                self._set_local(param, None, read_checked(reader, f"model.{name}", shape))
                for moment in moment_names(self._spec.optimizer):
                    self._set_local(param, moment, read_checked(reader, f"optim.state.{name}.{moment}", shape))

    def close(self) -> None:
        """See `Engine.close`."""
        self._engine.destroy()

    def _fill_moments(self, num_updates: int) -> None:
        """Creates the optimizer state of the flat partitions and links it to the parameters, without taking a step."""
        zero, optimizer = self._engine.optimizer, self._spec.optimizer
        if self._stage == 3:
            flat = zero.fp32_partitioned_groups_flat
        else:
            flat = [param for group in optimizer.param_groups for param in group["params"]]
        create_moments(optimizer, flat, num_updates)
        if self._stage < 3:
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def _set_local(self, param: Any, moment: str | None, whole: Tensor) -> None:
        """Writes this rank's part of a whole master weight or moment."""
        from deepspeed import utils

        if self._stage < 3:
            if moment is None:
                utils.safe_set_full_fp32_param(param, whole)
            else:
                utils.safe_set_full_optimizer_state(param, whole, moment)
            return
        # Partitions are equal and the last one is padded; deepspeed's own setter of whole tensors overruns it.
        part = torch.zeros_like(param.ds_tensor, dtype=torch.float32).flatten()
        start = min(part.numel() * self._spec.mesh.dp_rank, whole.numel())
        own = whole.flatten()[start : start + part.numel()]
        part[: own.numel()] = own
        if moment is None:
            utils.safe_set_local_fp32_param(param, part)
        else:
            utils.safe_set_local_optimizer_state(param, part, moment)

    def _whole_frozen(self, param: nn.Parameter) -> Tensor:
        with self._deepspeed.zero.GatheredParameters([param], enabled=self._stage == 3):
            return param.detach().clone()


def _import_deepspeed(device: torch.device) -> ModuleType:
    if device.type == "cpu":
        set_env_default("DS_ACCELERATOR", "cpu")
    set_env_default("LOCAL_RANK", str(device.index or 0))  # srun does not set it, and deepspeed insists
    try:
        import deepspeed
        from deepspeed import ops
        from deepspeed.utils import logger
    except ImportError as error:
        raise MissingExtraError("deepspeed", "deepspeed", "training on several processes", error) from error
    logger.setLevel(logging.ERROR)
    # once per collective and rank: torch has renamed what deepspeed calls
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated", category=FutureWarning)
    # torch 2.13 renamed two collectives that deepspeed calls in every step.
    warnings.filterwarnings("ignore", r".*(all_gather_into_tensor|reduce_scatter_tensor).*deprecated", FutureWarning)
    # On the CPU this op would be compiled at first use, for minutes; gloo does without. A private switch, kept by a test.
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _resolved_config(spec: EngineSpec, stage: int, keep_whole: int) -> dict[str, Any]:
    """DeepSpeed's configuration with every value decided; nothing is left to "auto"."""
    is_bf16 = spec.train.dtype == "bf16"
    return {
        # One pack per micro-batch and our own boundaries: its batch arithmetic never enters a gradient.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": spec.train.clip,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": is_bf16, "check_grad_overflow": True},
        # The defaults would add up micro-batches and ranks in bf16.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": spec.mesh.device.type == "cuda",
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": _BUCKET_ELEMENTS,
            "allgather_bucket_size": _BUCKET_ELEMENTS,
            "stage3_prefetch_bucket_size": _BUCKET_ELEMENTS,
            "stage3_param_persistence_threshold": keep_whole,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
        },
    }
