"""DeepSpeed ZeRO-1, 2 and 3 as an engine; the only module that imports deepspeed.

DeepSpeed is given one flat data-parallel group, our optimizer and a loss that is already scaled. Accumulation, schedule,
step count and checkpoints stay ours. Written for deepspeed 0.19.8, whose bf16 leaves fp32 buffers such as rotary
frequencies alone; a test holds it to that.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

from mmscale.config.env import set_env_default
from mmscale.errors import ConfigError, MissingExtraError
from mmscale.parallel.engines.base import (
    Batch,
    EngineBase,
    EngineSpec,
    StateReader,
    StepResult,
    create_moments,
    moment_names,
    set_learning_rates,
)
from mmscale.parallel.engines.deepspeed_json import Json
from mmscale.parallel.layout import Chunk
from mmscale.parallel.mesh import Mesh


class DeepSpeedEngine(EngineBase):
    """ZeRO over the data and sequence ranks of the mesh, on tensor-parallel parts of the weights.

    Live weights are fp32 or, with `train.dtype: bf16`, bf16 with fp32 masters; gradients are added up and reduced in fp32.
    """

    def __init__(self, spec: EngineSpec, stage: int, config: Json, timeout: timedelta) -> None:
        """Wraps `spec.model`, whose weights must be final.

        Args:
            stage: 1 shards optimizer state, 2 gradients too, 3 weights too.
            config: from `deepspeed_config`.
            timeout: after which a collective that does not complete ends the run.

        Raises:
            ConfigError: DeepSpeed does not take the config.
            MissingExtraError: DeepSpeed is not installed.
        """
        super().__init__(spec)
        self._stage = stage
        self._params = list(spec.model.named_parameters())
        self._shapes = {n: p.shape for n, p in self._params}  # ZeRO-3 empties the parameters themselves
        for name, param in self._params:
            # what deepspeed looks at when it adds up the norm over tensor-parallel ranks
            param.tensor_model_parallel = spec.is_writer(name)  # type: ignore[attr-defined]
        # in bf16 it rounds what is not trained too, and there are no masters of that
        self._frozen = {
            name: param.detach().to("cpu", copy=True)
            for index, (name, param) in enumerate(self._params)
            if name in spec.stored and not param.requires_grad and self._is_owner(index)
        }
        deepspeed = _import_deepspeed(spec.mesh.device)
        _check_config(config)
        with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints memory figures per group
            self._engine, *_ = deepspeed.initialize(
                model=spec.model,
                optimizer=spec.optimizer,
                model_parameters=[p for _, p in self._params if p.requires_grad],
                config=config,
                dist_init_required=False,
                # without tensor ranks its bf16 norm would be summed over the default group, which is all ranks
                mpu=_Groups(spec.mesh) if spec.mesh.tensor.size > 1 else None,
            )
        # it makes a group of its own, with torch's time-out of half an hour
        _set_pg_timeout(timeout, self._engine.data_parallel_group)
        self._module = self._engine
        self._fill_moments(0)
        self._engine.train()

    def _add_gradient(self, batch: Batch, scale: float, is_last: bool) -> Tensor:
        self._engine.set_gradient_accumulation_boundary(is_last)
        loss = self._forward(batch)
        self._engine.backward(loss * scale, scale_wrt_gas=False)
        return loss.detach()

    def step(self, lrs: Sequence[float]) -> StepResult:
        """See `Engine.step`."""
        set_learning_rates(self._spec.optimizer, lrs)
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        skipped = not self._engine.was_step_applied()
        self._num_updates += not skipped
        return StepResult(math.inf if skipped else norm, skipped)

    def _chunks(self) -> Iterator[tuple[str, Chunk]]:
        """Each tensor is gathered over the ranks that shard it; every one keeps its share on the CPU."""
        from deepspeed import utils

        for index, (name, param) in enumerate(self._params):
            if name in self._frozen:
                yield from self._own_chunks(f"model.{name}", index, self._frozen[name])
            elif name in self._spec.stored and param.requires_grad:
                yield from self._own_chunks(f"model.{name}", index, utils.safe_get_full_fp32_param(param))
            for moment in moment_names(self._spec.optimizer) if param.requires_grad else ():
                whole = utils.safe_get_full_optimizer_state(param, moment)
                yield from self._own_chunks(f"optim.state.{name}.{moment}", index, whole)

    def _own_chunks(self, state: str, index: int, whole: Tensor) -> Iterator[tuple[str, Chunk]]:
        name = self._params[index][0]
        if self._is_owner(index):
            for chunk in self._spec.chunks(name, whole.float(), self._shapes[name]):
                yield state, chunk

    def _is_owner(self, index: int) -> bool:
        """True on the one of the ranks that shard the parameter with this index that writes it into checkpoints."""
        return index % self._spec.mesh.grads.size == self._spec.mesh.grads.rank

    def _load(self, reader: StateReader) -> None:
        """Moments and masters; the live weights must have been loaded before the engine was made."""
        self._fill_moments(self._num_updates)
        for name, param in self._params:
            if param.requires_grad:
                shape = self._shapes[name]
                self._set_local(param, None, self._spec.read(reader, f"model.{name}", name, shape))
                for moment in moment_names(self._spec.optimizer):
                    value = self._spec.read(reader, f"optim.state.{name}.{moment}", name, shape)
                    self._set_local(param, moment, value)

    def close(self) -> None:
        """See `Engine.close`."""
        self._engine.destroy()
        _forget_engine()

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
        start = min(part.numel() * self._spec.mesh.grads.rank, whole.numel())
        own = whole.flatten()[start : start + part.numel()]
        part[: own.numel()] = own
        if moment is None:
            utils.safe_set_local_fp32_param(param, part)
        else:
            utils.safe_set_local_optimizer_state(param, part, moment)


def _forget_engine() -> None:
    """Empties the globals in which deepspeed would keep an engine for ever.

    The next engine would take the groups for its own, whose ranks may be others. ZeRO-3 would never give back the memory of
    the model, its masters and moments.
    """
    from deepspeed import comm
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
    from deepspeed.utils import groups

    groups.mpu = None
    second_partition = groups._get_zero_param_intra_parallel_group()
    if second_partition is not None:
        comm.destroy_process_group(second_partition)  # which forgets it, too
    parameter_offload.FWD_MODULE_STACK.clear()
    # a method with a cache of its arguments, behind a decorator without `__wrapped__`
    to_release = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(to_release).nonlocals["func"].cache_clear()


class _Groups:
    """Our groups under the names that deepspeed asks for ("mpu").

    Sequence ranks are data-parallel ranks to it: its own methods for them give wrong gradients with ZeRO-3.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._data, self._tensor = mesh.grads, mesh.tensor

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self._data.group

    def get_data_parallel_rank(self) -> int:
        return self._data.rank

    def get_data_parallel_world_size(self) -> int:
        return self._data.size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._tensor.group

    def get_model_parallel_rank(self) -> int:
        return self._tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self._tensor.size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


def check_config(config: Json) -> None:
    """Refuses, on any machine, a configuration that DeepSpeed itself does not take.

    Raises:
        ConfigError: a key it does not know, or a value it cannot use.
        MissingExtraError: it is not installed.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # its import says on which device it is
        _import_deepspeed(torch.device("cpu"))
    _check_config(config)


def _check_config(config: Json) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(dict(config))
    except ValueError as error:
        raise ConfigError(
            f"parallel.deepspeed: a configuration that DeepSpeed takes is expected, found: {' '.join(str(error).split())}; correct "
            "the file"
        ) from error


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
