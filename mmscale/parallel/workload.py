"""What a run asks of one rank, in numbers: the input of the estimates of memory and traffic. No weights, no process groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mmscale.config.layouts import data_parallel_size
from mmscale.config.llm import LlmSizes
from mmscale.config.schema import Config, TowerConfig
from mmscale.config.specs import tower_config, vision_grid
from mmscale.parallel.engines.deepspeed_json import offloads_optimizer, zero_stage
from mmscale.parallel.mesh import resolve_engine
from mmscale.parallel.sp.plan import Kind
from mmscale.types import MediaSpecs


@dataclass(frozen=True, slots=True)
class PartSize:
    """Parameters of a part of the model, and whether they are trained."""

    parameters: int
    is_trained: bool


@dataclass(frozen=True, slots=True)
class TowerSizes:
    """A tower: its layers, the tokens and bytes of one input, channels between and inside its layers, connector rows."""

    layers: int
    tokens: int
    width: int
    inner: int
    rows: int
    input_bytes: int


@dataclass(frozen=True, slots=True)
class Workload:
    """One rank's share of a run.

    engine         `single`, `deepspeed` or `fsdp`; `stage` is ZeRO's and counts for DeepSpeed only
    data           ranks that see different packs
    tensor, ulysses, ring, tensor_sequence, sp, offload   as in `parallel`
    seq_len        tokens of a pack; `packs`: packs of one data rank per step, one after the other
    parts          part name -> size, whole and before any cut
    llm, vocab     sizes of the language model and rows of its head; `embeddings`: matrices of that many rows, 1 when tied
    towers         part name -> sizes of a tower; `media_inputs`: most inputs of each in a pack
    is_bf16, checkpoint_activations, is_adam, loss_memory_mb   as in `train`
    """

    engine: Literal["single", "deepspeed", "fsdp"]
    stage: int
    data: int
    tensor: int
    ulysses: int
    ring: int
    sp: Kind
    tensor_sequence: bool
    offload: bool
    seq_len: int
    packs: int
    parts: Mapping[str, PartSize]
    llm: LlmSizes
    vocab: int
    embeddings: int
    towers: Mapping[str, TowerSizes]
    media_inputs: Mapping[str, int]
    is_bf16: bool
    checkpoint_activations: bool
    is_adam: bool
    loss_memory_mb: int

    @property
    def sequence(self) -> int:
        """P, the ranks that share one pack."""
        return self.ulysses * self.ring

    @property
    def tokens(self) -> int:
        """Tokens of one rank's part of a pack, padding included."""
        return -(-self.seq_len // self.sequence)

    @property
    def shards(self) -> int:
        """Ranks over which gradients are averaged and engines shard: data x sequence."""
        return self.data * self.sequence

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.tensor * self.shards

    @property
    def bytes_each(self) -> int:
        """Bytes of one number of an activation."""
        return 2 if self.is_bf16 else 4

    @property
    def kv_heads(self) -> int:
        """Key/value heads of one tensor-parallel rank."""
        return max(1, self.llm.kv_heads // self.tensor)


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """A model without its weights: see the fields of `Workload`."""

    parts: Mapping[str, PartSize]
    llm: LlmSizes
    vocab: int
    embeddings: int


def make_workload(config: Config, world_size: int, model: ModelSizes, specs: MediaSpecs) -> Workload:
    """What `config` asks of each of `world_size` ranks. Raises ConfigError like `data_parallel_size` and
    `tower_sizes`, and for a DeepSpeed JSON file that cannot be read."""
    p, train = config.parallel, config.train
    data, towers = data_parallel_size(p, world_size), tower_sizes(config, specs)
    return Workload(
        engine=_engine(resolve_engine(p, world_size)),
        stage=zero_stage(p),
        data=data,
        tensor=p.tensor,
        ulysses=p.ulysses,
        ring=p.ring,
        sp="exchange" if p.sp == "auto" else p.sp,
        tensor_sequence=p.tensor_sequence,
        offload=offloads_optimizer(p),
        seq_len=config.data.seq_len,
        packs=-(-train.global_batch // data),
        parts=model.parts,
        llm=model.llm,
        vocab=model.vocab,
        embeddings=model.embeddings,
        towers=towers,
        media_inputs=most_inputs(config, towers),
        is_bf16=train.dtype == "bf16",
        checkpoint_activations=train.checkpoint_activations,
        is_adam=train.optimizer == "adamw",
        loss_memory_mb=train.loss_memory_mb,
    )


def _engine(name: str) -> Literal["single", "deepspeed", "fsdp"]:
    known: dict[str, Literal["single", "deepspeed", "fsdp"]] = {"deepspeed": "deepspeed", "fsdp": "fsdp"}
    return known.get(name, "single")


def tower_sizes(config: Config, specs: MediaSpecs) -> dict[str, TowerSizes]:
    """The towers of a run by part name. Raises ConfigError like `tower_config`."""
    found: dict[str, TowerSizes] = {}
    if config.model.vision is not None and specs.image is not None:
        raw = tower_config(config.model.vision, "model.vision")
        grid, width = vision_grid(raw), int(raw["hidden_size"])
        inner = int(raw.get("intermediate_size") or raw.get("mlp_ratio", 4) * width)
        layers = _layers_used(config.model.vision, int(raw["num_hidden_layers"]))
        found["vision"] = TowerSizes(
            layers, grid.side**2 + grid.prefix, width, inner, specs.image.tokens, 3 * grid.size**2
        )
    if config.model.audio is not None and specs.audio is not None:
        raw, audio = tower_config(config.model.audio, "model.audio"), specs.audio
        is_whisper = raw["model_type"] == "whisper"
        width = int(raw["d_model" if is_whisper else "hidden_size"])
        inner = int(raw.get("encoder_ffn_dim" if is_whisper else "intermediate_size") or 4 * width)
        layers = int(raw["encoder_layers" if is_whisper else "num_hidden_layers"])
        values = audio.mel_bins * audio.window_samples // audio.hop_samples if is_whisper else audio.window_samples
        layers = _layers_used(config.model.audio, layers)
        found["audio"] = TowerSizes(layers, audio.tokens, width, inner, audio.tokens, 4 * values)
    return found


def most_inputs(config: Config, towers: Mapping[str, TowerSizes]) -> dict[str, int]:
    """Inputs of each tower in a pack that holds nothing else; images at most as many as `data.max_images_per_pack`."""
    counts = {name: config.data.seq_len // tower.rows for name, tower in towers.items()}
    if config.data.max_images_per_pack is not None and "vision" in counts:
        counts["vision"] = min(counts["vision"], config.data.max_images_per_pack)
    return counts


def _layers_used(part: TowerConfig, layers: int) -> int:
    select = part.select_layer
    return layers if select is None else select if select >= 0 else layers + 1 + select
