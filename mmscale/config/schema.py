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
        description="Connector from tower to LLM width: linear, mlpNx_gelu, mlp_downsample, mlp_downsample_3x3, pixel_shuffle (InternVL), patch_merger (Qwen2-VL), token_merge (vision only; merges similar rows, then two layers like mlp2x_gelu).",
    )


class TokenMergeConfig(Section):
    ratio: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        None, description="Share of the tower's rows of an image, tile or frame that is left, rounded up to whole rows."
    )
    tokens: PositiveInt | None = Field(
        None, description="Rows of an image, tile or frame that are left; instead of `ratio`."
    )


class VisionConfig(TowerConfig):
    select_feature: Literal["patch", "cls_patch"] = Field(
        "patch",
        description="`patch` drops the tower's class and register tokens when it has some, `cls_patch` keeps them.",
    )
    token_merge: TokenMergeConfig | None = Field(
        None,
        description="How far `connector: token_merge` merges the most similar rows: exactly one of `ratio` and `tokens`.",
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
    path: str | None = Field(
        None,
        description="Dataset folder with `manifest.json` (written by `mmscale-data build` or `index`), relative to `data.root`; a local path or a URL (http, https, or any scheme of fsspec). `folder/{000..009}.tar` takes some of its shards only.",
    )
    sources: dict[str, SourceConfig] | None = Field(
        None,
        description="Instead of `path`: a mixture inside the mixture; its `weight` is shared out among its own sources.",
    )
    weight: PositiveFloat | None = Field(
        None,
        description="Share of the samples drawn, relative to the other weights beside it; null on all of them = by size, each sample once per epoch.",
    )
    repeat: PositiveInt = Field(
        1, description="How often each sample comes while a source of `repeat: 1` comes once; only without weights."
    )
    max_samples: PositiveInt | None = Field(
        None, description="At most so many samples of the source are used, always the same ones, chosen by `data.seed`."
    )
    max_epochs: PositiveInt | None = Field(
        None, description="The source ends after so many epochs of its own; the others go on in their proportions."
    )
    template: str | None = Field(None, description="Chat template of this source; null = `data.template`.")
    mode: Literal["indexed", "stream"] = Field(
        "indexed",
        description="`stream` reads tars without an index through the webdataset library: `path` is a folder, a pattern such as `web/{000..041}.tar` or `web/*.tar`, http(s) URLs or a command; without weights a source counts by its shards. A resume reads the shards in work again from their start.",
    )
    allow_commands: bool = Field(
        False, description="Lets `path` of a `stream` source be a `pipe:` command, which runs in a shell."
    )


class TilesConfig(Section):
    min: PositiveInt = Field(1, description="Fewest tiles of an image.")
    max: PositiveInt = Field(12, description="Most tiles of an image.")
    thumbnail: bool = Field(True, description="Adds the whole image as one more tile when there are several.")


class AnyresConfig(Section):
    grids: tuple[tuple[PositiveInt, PositiveInt], ...] | None = Field(
        None,
        description="Resolutions (height, width) in pixels, multiples of the tower's; null = 1x2, 2x1, 2x2, 3x1 and 1x3 tiles.",
    )
    merge: Literal["flat", "spatial", "spatial_unpad"] = Field(
        "spatial_unpad",
        description="Order of the tiles' rows, as in LLaVA: `flat` tile by tile, `spatial` line by line over the whole picture, `spatial_unpad` likewise without the lines that are padding and with a newline token after each line.",
    )


class ImageDataConfig(Section):
    mode: Literal["resize", "square", "pad", "tiles", "anyres"] = Field(
        "resize",
        description="How an image becomes squares: `resize` stretches, `square` cuts the centre, `pad` pads to a square with `fill`, `tiles` cuts it into a grid of like aspect (InternVL), `anyres` fits it into one of some resolutions (LLaVA-NeXT).",
    )
    fill: tuple[int, int, int] = Field((127, 127, 127), description="RGB fill of mode `pad`, 0 to 255.")
    max_pixels: PositiveInt = Field(
        64_000_000, description="Images with more pixels (width x height) are skipped before decoding."
    )
    tiles: TilesConfig = Field(default_factory=TilesConfig, description="Mode `tiles`.")
    anyres: AnyresConfig = Field(default_factory=AnyresConfig, description="Mode `anyres`.")


class VideoDataConfig(Section):
    mode: Literal["uniform", "fps", "keyframes", "history"] = Field(
        "uniform",
        description="Which frames of a clip are taken: `uniform` over the whole clip, `fps` at a fixed rate (uniform when that gives more than `frames`), `keyframes` those that decode without others, `history` evenly from the past plus the last one (navigation).",
    )
    frames: PositiveInt = Field(8, description="Most frames taken from a clip.")
    fps: PositiveFloat = Field(1.0, description="Frames per second of mode `fps`.")
    max_s: PositiveFloat = Field(3600.0, description="Clips that are longer, in seconds, are skipped before decoding.")


class CacheConfig(Section):
    dir: str | None = Field(
        None, description="Folder on a node-local disk for blocks of remote shards and for lengths; null = no cache."
    )
    max_gb: PositiveFloat = Field(
        100.0, description="Size of the cache in GB; the blocks used least recently go first."
    )


class CostConfig(Section):
    """What a pack costs to compute; `mmscale-data plan CONFIG --fit RUN` prints fitted values."""

    fixed: Annotated[float, Field(ge=0.0)] = Field(0.0, description="Per pack.")
    token: Annotated[float, Field(ge=0.0)] = Field(description="Per token of the pack.")
    pair: Annotated[float, Field(ge=0.0)] = Field(
        description="Per pair of tokens of one document (its length squared)."
    )
    vision_input: Annotated[float, Field(ge=0.0)] = Field(0.0, description="Per image, tile or frame.")
    audio_input: Annotated[float, Field(ge=0.0)] = Field(0.0, description="Per audio window.")


class DataConfig(Section):
    root: str = Field(".", description="Folder or URL that source paths are relative to.")
    sources: dict[str, SourceConfig] = Field(min_length=1, description="Training data: name -> source.")
    seq_len: PositiveInt = Field(description="Tokens per pack (text and media rows together).")
    plan_group: PositiveInt = Field(
        8,
        description="Packs of like cost that are kept together; choose at least the largest data-parallel size you intend.",
    )
    window: PositiveInt | None = Field(
        None,
        description="Samples planned at a time; null = enough for 16 groups of packs, at least 4096. Never more than 49152, nor more than helps in a small set.",
    )
    shuffle_block: PositiveInt = Field(
        64,
        description="Neighbouring samples that are drawn together, so that reads stay long; small sources use shorter blocks.",
    )
    max_images_per_pack: PositiveInt | None = Field(
        None, description="Most tower inputs (images, tiles, frames) in a pack; null = no limit."
    )
    cost: CostConfig | None = Field(
        None, description="Cost of a pack, in any unit; null = FLOPs from the model's configuration."
    )
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
    max_bad_in_a_row: PositiveInt = Field(
        200, description="Bad samples of one source in a row (in the order of the plan) at which the run stops."
    )
    sample_timeout_s: PositiveFloat = Field(
        60.0,
        description="Seconds after which a sample that is still being decoded is given up; needs `workers` of 1 or more.",
    )
    image: ImageDataConfig = Field(default_factory=ImageDataConfig, description="Image preparation.")
    video: VideoDataConfig = Field(default_factory=VideoDataConfig, description="Video preparation.")
    cache: CacheConfig = Field(default_factory=CacheConfig, description="Node-local cache of remote data.")


class ParallelConfig(Section):
    tensor: PositiveInt = Field(1, description="Tensor-parallel degree.")
    ulysses: PositiveInt = Field(
        1, description="Ulysses sequence-parallel degree: attention heads are exchanged for tokens."
    )
    ring: PositiveInt = Field(
        1, description="Outer sequence-parallel degree: keys and values are exchanged as `parallel.sp` says."
    )
    sp: Literal["auto", "exchange", "gather", "ring"] = Field(
        "exchange",
        description="How the `ring` ranks get keys and values: `exchange` sends what each needs, `gather` everything, `ring` passes blocks round (least memory). `auto` chooses it from heads, lengths and cost, and `ulysses` and `ring` too when both are 1.",
    )
    sp_layout: Literal["auto", "contiguous", "zigzag", "per_document", "planned"] = Field(
        "auto",
        description="Which tokens the `ring` ranks hold: equal pieces in order, zigzag over the pack or over each document, or `planned` for equal cost and little exchange. `auto` = `per_document` for `sp: ring`, else `planned`.",
    )
    tensor_sequence: bool = Field(
        False,
        description="Between the tensor-parallel layers each rank keeps its share of the tokens only (Megatron's sequence-parallel regions); needs `tensor` above 1.",
    )
    attention: Literal["auto", "cpu_aten", "torch_flash", "flash_attn", "efficient", "math"] = Field(
        "auto", description="Attention kernel of the LLM; `auto` takes the best for device and type, and logs it."
    )
    engine: Literal["auto", "deepspeed", "fsdp"] = Field(
        "auto", description="`auto` uses no engine on one process and DeepSpeed on several."
    )
    zero_stage: Literal[1, 2, 3] = Field(1, description="DeepSpeed ZeRO stage.")
    zero_keep_whole: Count = Field(
        100_000, description="ZeRO-3 keeps parameters with fewer elements than this whole on every rank."
    )
    offload_optimizer: bool = Field(False, description="DeepSpeed keeps optimizer state in host memory.")
    deepspeed: str | None = Field(
        None,
        description="DeepSpeed JSON file; its `auto` values are taken from this configuration, and a value that contradicts it is refused.",
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


class GuardConfig(Section):
    max_nonfinite: PositiveInt = Field(
        3,
        description="Steps in a row without a finite loss or gradient at which the run rolls back; each of them makes no update.",
    )
    spike_sigma: PositiveFloat | None = Field(
        None,
        description="Standard deviations (each at least 1 % of the mean) above the mean of the last `spike_window` losses at which the run rolls back; null = never.",
    )
    spike_window: Annotated[int, Field(ge=8)] = Field(
        128, description="Losses by which a spike is judged, once a quarter of them is there."
    )
    pass_over: PositiveInt = Field(
        1,
        description="Batches before the bad ones that a rollback passes over with them; doubled at each further rollback.",
    )
    max_rollbacks: Count = Field(3, description="Rollbacks in a run; at the next one it stops. 0 = stop at once.")


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
    z_loss: Annotated[float, Field(ge=0.0)] = Field(
        0.0,
        description="Weight of the z-loss, log(Z)^2 per target with Z the sum of the exponentials of its logits: keeps logits near 0, PaLM took 1e-4. In the training loss, not in validation losses.",
    )
    loss_memory_mb: PositiveInt = Field(
        4000,
        description="Megabytes that the output head and the loss may take besides weights and gradients: logits exist for as many targets at a time as fit.",
    )
    checkpoint_activations: bool = Field(
        False, description="Recompute layer activations in the backward pass (LLM and towers)."
    )
    seed: int = Field(0, description="Seed of weights and of any randomness in the model.")
    deterministic: bool = Field(False, description="Refuse nondeterministic kernels; equal runs are equal to the bit.")
    save_every: PositiveInt = Field(
        100, description="Steps between checkpoints; the last step and every signal save too."
    )
    keep_last: Annotated[int, Field(ge=1)] = Field(2, description="Newest verified checkpoints kept.")
    keep_every: PositiveInt | None = Field(
        None, description="Checkpoints at multiples of this many steps are kept for good; null = none of them."
    )
    async_save: bool = Field(
        True,
        description="Write checkpoints in the background, from a copy in host memory (12 bytes per parameter, divided by the ranks).",
    )
    guard: GuardConfig = Field(default_factory=GuardConfig, description="What happens when training goes wrong.")


class EvalConfig(Section):
    every: Count = Field(0, description="Steps between validation losses; 0 = never.")
    sources: dict[str, SourceConfig] = Field(default_factory=dict, description="Validation data: name -> source.")
    max_packs: PositiveInt | None = Field(None, description="Packs per validation; null = all.")


class WatchConfig(Section):
    hang_floor_s: PositiveFloat = Field(
        300.0,
        description="Shortest time in seconds without progress after which a rank counts as hung (three times that in a save, whose disk others use too). Below `parallel.timeout_s`, so that the slow rank is named before the collective of another one fails.",
    )
    hang_factor: Annotated[float, Field(ge=1.0)] = Field(
        10.0, description="A phase that takes this many times its longest so far counts as hung."
    )
    setup_limit_s: PositiveFloat = Field(
        1800.0,
        description="Longest start-up, first step, first save and the like, in seconds. Samples whose lengths are not stored yet are counted at the start-up: for a large data set run `mmscale-data plan CONFIG` before, or raise this.",
    )
    straggler_every: Count = Field(100, description="Steps between looks for slow ranks; 0 = never.")
    straggler_ratio: Annotated[float, Field(gt=1.0)] = Field(
        1.3, description="A rank this many times slower than the median rank is named."
    )
    min_free_gb: Annotated[float, Field(ge=0.0)] = Field(
        1.0,
        description="Free GB that a node must have before the first step: in its memory and its temporary directory, else it is left out; in the run directory, else there is a warning.",
    )


class RunConfig(Section):
    dir: str = Field(description="Run directory: config, metrics, ledger, checkpoints.")
    log_every: PositiveInt = Field(
        10, description="Steps between printed step lines when there is no terminal for a progress bar."
    )
    tensorboard: bool = Field(True, description="Write TensorBoard events into the run directory.")
    threads: Count = Field(0, description="CPU threads per process; 0 = torch's choice.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="`auto` uses CUDA when there is a GPU.")
    watch: WatchConfig = Field(default_factory=WatchConfig, description="Hangs, slow ranks, bad nodes.")
    accept_changes: bool = Field(
        False,
        description="Go on in a run directory that was trained with other settings of the model or the optimization.",
    )
    profile: bool = Field(
        False, description="Record a few steps with torch's profiler: a trace per rank and a table in `profile/`."
    )
    peak_tflops: PositiveFloat | None = Field(
        None,
        description="Peak TFLOP/s of one device, for the MFU and HFU figures; null = that of a known GPU in bf16 (B200, H200, H100, A100), else none.",
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
