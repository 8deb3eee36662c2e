"""Every configuration key, once: its type, default, unit and help text. `docs/configuration.md` is generated from here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A frozen group of keys that refuses what it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class TokenizerConfig(Section):
    path: str = Field(
        description="Folder with `tokenizer.json` and `tokenizer_config.json`; relative to `data.root` when not absolute and found there."
    )
    add_tokens: tuple[str, ...] = Field(
        (),
        description="Special tokens to add when the tokenizer lacks them; their embedding rows start as the mean of the old rows.",
    )
    pad_to_multiple: PositiveInt = Field(64, description="The vocabulary is padded to a multiple of this many rows.")


class LlmConfig(Section):
    path: str | None = Field(None, description="Folder of a Hugging Face causal LM to start from.")
    config: dict[str, Any] | None = Field(
        None, description="Hugging Face config (with `model_type`) for random weights, instead of `path`."
    )


class TowerConfig(Section):
    path: str | None = Field(None, description="Folder of a Hugging Face tower to start from.")
    config: dict[str, Any] | None = Field(
        None, description="Hugging Face config (with `model_type`) for random weights, instead of `path`."
    )
    select_layer: int | None = Field(
        None,
        description="Index into the tower's hidden states (0 = embeddings, -1 = after the last layer, -2 = one before it) without the final norm; layers above are not built. null = the tower's own output with its final norm.",
    )
    connector: str = Field(
        "mlp2x_gelu",
        description="Connector from tower to LLM width: linear, mlpNx_gelu, mlp_downsample, mlp_downsample_3x3.",
    )


class VisionConfig(TowerConfig):
    select_feature: Literal["patch", "cls_patch"] = Field(
        "patch",
        description="`patch` drops the tower's class and register tokens when it has some, `cls_patch` keeps them.",
    )


class AudioConfig(TowerConfig):
    features: Literal["log_mel", "waveform"] = Field(
        "log_mel", description="Tower input: Whisper's log-mel spectrogram or the normalised waveform (wav2vec2)."
    )
    rate_hz: PositiveInt = Field(16000, description="Sampling rate of the tower in Hz; clips are resampled to it.")
    window_s: PositiveFloat = Field(
        30.0,
        description="Length of one tower input in seconds; longer clips become several windows. Whisper towers take exactly `max_source_positions / 50`.",
    )


class ModelConfig(Section):
    llm: LlmConfig = Field(description="The language model.")
    vision: VisionConfig | None = Field(None, description="The image and video tower; null = no images.")
    audio: AudioConfig | None = Field(None, description="The audio tower; null = no audio.")
    tokenizer: TokenizerConfig = Field(description="The tokenizer.")


class SourceConfig(Section):
    path: str = Field(
        description="Dataset folder with `manifest.json` (written by `mmscale-data build` or `index`), relative to `data.root`."
    )
    weight: PositiveFloat | None = Field(
        None,
        description="Share of the samples drawn, relative to the other weights; null on every source = by size, each sample once per epoch.",
    )
    template: str | None = Field(None, description="Chat template of this source; null = `data.template`.")


class ImageDataConfig(Section):
    mode: Literal["resize", "square", "pad"] = Field(
        "resize",
        description="How an image becomes a square: `resize` stretches, `square` cuts the centre, `pad` pads to a square with `fill`.",
    )
    fill: tuple[int, int, int] = Field((127, 127, 127), description="RGB fill of mode `pad`, 0 to 255.")
    max_pixels: PositiveInt = Field(
        64_000_000, description="Images with more pixels (width x height) are skipped before decoding."
    )


class DataConfig(Section):
    root: str = Field(".", description="Folder that source paths are relative to.")
    sources: dict[str, SourceConfig] = Field(min_length=1, description="Training data: name -> source.")
    seq_len: PositiveInt = Field(description="Tokens per pack (text and media rows together).")
    plan_group: PositiveInt = Field(
        8,
        description="Packs of like cost that are kept together; choose at least the largest data-parallel size you intend.",
    )
    window: PositiveInt = Field(4096, description="Samples planned at a time.")
    workers: Count = Field(2, description="Loader processes per rank; 0 decodes in the trainer.")
    prefetch: PositiveInt = Field(4, description="Packs that each loader process prepares ahead.")
    seed: int = Field(0, description="Seed of the order and the packing.")
    template: str = Field(
        "chatml", description="Chat template: a name in `configs/chat/` or the path of a template file."
    )
    on_long: Literal["drop", "truncate", "error"] = Field(
        "drop",
        description="What happens to a sample with more tokens than `seq_len`: dropped and counted, cut at the end (text only), or refused.",
    )
    on_error: Literal["skip", "raise"] = Field(
        "skip", description="What happens to a sample that cannot be read: counted and masked, or the run stops."
    )
    max_bad: Fraction = Field(
        0.01, description="Share of bad samples above which the run stops, judged from 1000 samples on."
    )
    image: ImageDataConfig = Field(default_factory=ImageDataConfig, description="Image preparation.")


class ParallelConfig(Section):
    tensor: PositiveInt = Field(1, description="Tensor-parallel degree.")
    ulysses: PositiveInt = Field(1, description="Ulysses sequence-parallel degree.")
    ring: PositiveInt = Field(1, description="Outer (ring or exchange) sequence-parallel degree.")
    engine: Literal["auto", "deepspeed", "fsdp"] = Field(
        "auto", description="`auto` uses no engine on one process and DeepSpeed on several."
    )
    zero_stage: Literal[1, 2, 3] = Field(1, description="DeepSpeed ZeRO stage.")
    zero_keep_whole: Count = Field(
        100_000, description="ZeRO-3 keeps parameters with fewer elements than this whole on every rank."
    )
    timeout_s: PositiveInt = Field(
        600, description="Seconds after which a collective that does not complete ends the run."
    )


class PartConfig(Section):
    tune: Literal["full", "frozen"] = Field(description="Train every weight of the part, or none.")
    lr: PositiveFloat | None = Field(None, description="Peak learning rate of the part; null = `train.lr`.")


class PartsConfig(Section):
    llm: PartConfig = Field(description="The language model.")
    vision: PartConfig | None = Field(None, description="The vision tower; required when `model.vision` is set.")
    vision_connector: PartConfig | None = Field(
        None, description="The vision connector; required when `model.vision` is set."
    )
    audio: PartConfig | None = Field(None, description="The audio tower; required when `model.audio` is set.")
    audio_connector: PartConfig | None = Field(
        None, description="The audio connector; required when `model.audio` is set."
    )


class TrainConfig(Section):
    steps: PositiveInt = Field(description="Optimizer steps of the whole run.")
    global_batch: PositiveInt = Field(description="Packs per optimizer step over all ranks.")
    parts: PartsConfig = Field(description="What is trained; every part of the model must be named.")
    lr: PositiveFloat = Field(description="Peak learning rate.")
    min_lr_ratio: Fraction = Field(0.0, description="Final learning rate as a share of the peak.")
    warmup_steps: Count = Field(0, description="Steps of linear warm-up.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Learning-rate curve after the warm-up."
    )
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="`sgd` is plain, for tests of gradient scale.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's betas.")
    eps: PositiveFloat = Field(1e-8, description="AdamW's epsilon.")
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="AdamW's decoupled weight decay; norms, biases and embeddings are exempt."
    )
    clip: Annotated[float, Field(ge=0.0)] = Field(1.0, description="Largest gradient norm; 0 = no clipping.")
    dtype: Literal["fp32", "bf16"] = Field(
        "bf16", description="Type of activations and matrix products; master weights and moments stay fp32."
    )
    checkpoint_activations: bool = Field(
        False, description="Recompute layer activations in the backward pass (LLM and towers)."
    )
    seed: int = Field(0, description="Seed of weights and of any randomness in the model.")
    deterministic: bool = Field(False, description="Refuse nondeterministic kernels; equal runs are equal to the bit.")
    save_every: PositiveInt = Field(
        100, description="Steps between checkpoints; the last step and every signal save too."
    )
    keep_last: Annotated[int, Field(ge=1)] = Field(2, description="Verified checkpoints kept.")


class EvalConfig(Section):
    every: Count = Field(0, description="Steps between validation losses; 0 = never.")
    sources: dict[str, SourceConfig] = Field(default_factory=dict, description="Validation data: name -> source.")
    max_packs: PositiveInt | None = Field(None, description="Packs per validation; null = all.")


class RunConfig(Section):
    dir: str = Field(description="Run directory: config, metrics, ledger, checkpoints.")
    log_every: PositiveInt = Field(
        10, description="Steps between printed step lines when there is no terminal for a progress bar."
    )
    tensorboard: bool = Field(True, description="Write TensorBoard events into the run directory.")
    threads: Count = Field(0, description="CPU threads per process; 0 = torch's choice.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="`auto` uses CUDA when there is a GPU.")
    peak_tflops: PositiveFloat | None = Field(
        None, description="Peak TFLOP/s of one device, for the MFU figure; null = no MFU."
    )


class Config(Section):
    """A whole run."""

    model: ModelConfig = Field(description="The model.")
    data: DataConfig = Field(description="The training data.")
    parallel: ParallelConfig = Field(
        default_factory=ParallelConfig, description="How the run is spread over processes."
    )
    train: TrainConfig = Field(description="Optimization.")
    eval: EvalConfig = Field(default_factory=EvalConfig, description="Validation during training.")
    run: RunConfig = Field(description="Where results go.")

    @field_validator("model")
    @classmethod
    def _one_source_per_part(cls, model: ModelConfig) -> ModelConfig:
        for name in ("llm", "vision", "audio"):
            part = getattr(model, name)
            if part is not None and (part.path is None) == (part.config is None):
                raise ValueError(f"model.{name}: exactly one of `path` and `config` is expected")
        return model
