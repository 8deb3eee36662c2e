"""What passes between the packages: a sample on its way from the shard to the packed batch.

Shapes: T tokens of a pack, S documents of a pack, L tokens of one document, N tower inputs of one modality in a pack,
P rows that the connector gives for one tower input, Nt target tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import numpy as np
    import torch

Modality = Literal["image", "video", "audio"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)
"""The one order in which media features of a pack are concatenated."""

MEDIA_TOKENS: dict[Modality, str] = {modality: f"<{modality}>" for modality in MODALITIES}
"""The placeholder of each modality, in texts and in the vocabulary."""

NEWLINE_TOKEN = "<image_newline>"
"""The vocabulary token behind each line of an `anyres` picture; its embedding is LLaVA-NeXT's `image_newline`."""

Role = Literal["system", "user", "assistant", "document"]
"""`document` is a text without turns, alone in its sample: media stand between its words, and every word is a target."""

Spans = tuple[tuple[tuple[int, int, int], ...], ...]
"""For each outer sequence-parallel rank its sorted, disjoint (document, start, end) in tokens of the document."""

IGNORE = -100
"""The label of a position without a target (the value that torch's cross-entropy ignores by default)."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation. `text` may hold media placeholders such as `<image>` in user turns and documents."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class MediaBytes:
    """One undecoded media file of a sample: its modality, its lower-case extension (`png`) and its bytes."""

    modality: Modality
    ext: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of a shard, parsed but not decoded.

    `id` is `"<shard path relative to data.root>:<key>"`. `media[i]` belongs to the i-th placeholder of its modality.
    `offset` is the byte position of the sample's first member in the tar, for error messages and skip logs.
    """

    id: str
    turns: tuple[Turn, ...]
    media: tuple[MediaBytes, ...]
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Skip:
    """A sample that was not delivered, and why. `reason` is a short fixed word such as `decode_image`.

    `source` and `epoch` say which draw it was: the source's name in the config and its epoch.
    """

    id: str
    reason: str
    detail: str
    offset: int = 0
    source: str = ""
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """How an image becomes tower inputs, known before any model is built.

    `size`: side of the square tower input in pixels. `mode`: `resize` stretches, `square` scales the shortest side and
    cuts the centre, `pad` pads to a square with `fill` (RGB 0-255) and resizes; these give one input per image. `tiles` and
    `anyres` give several, see `mmscale.streaming.decode.tiling`. `tokens`: connector rows per input, P. `side`: rows per side
    when they form a grid (`side * side == tokens`), 0 when class tokens stand among them or rows were merged.

    `min_tiles`, `max_tiles`, `thumbnail`: of mode `tiles`. `grids` ((height, width) in pixels) and `merge`: of mode `anyres`.
    """

    size: int
    tokens: int
    mode: Literal["resize", "square", "pad", "tiles", "anyres"] = "resize"
    fill: tuple[int, int, int] = (127, 127, 127)
    side: int = 0
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    grids: tuple[tuple[int, int], ...] = ()
    merge: Literal["flat", "spatial", "spatial_unpad"] = "spatial_unpad"


@dataclass(frozen=True, slots=True)
class VideoSpec:
    """Which frames of a clip are taken: at most `frames`, at `fps` per second in mode `fps`; clips over `max_s` are refused.

    Each frame is one tower input, prepared like an image of the mode `resize`, `square` or `pad` (`tiles` and `anyres` frames
    are stretched), and gives `ImageSpec.tokens` tokens.
    """

    frames: int = 8
    mode: Literal["uniform", "fps", "keyframes", "history"] = "uniform"
    fps: float = 1.0
    max_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class AudioSpec:
    """How a clip becomes tower input: mono at `rate_hz`, cut into windows of `window_samples`, the last one padded.

    `features`: `log_mel` gives float32 [mel_bins, window_samples / hop_samples] per window (Whisper's log-mel),
    `waveform` gives float32 [window_samples] with zero mean and unit variance (wav2vec2).
    `tokens`: connector rows of one full window, P. A shorter window keeps its first `ceil(samples / samples_per_token)`.
    """

    rate_hz: int
    window_samples: int
    tokens: int
    features: Literal["log_mel", "waveform"] = "log_mel"
    mel_bins: int = 80
    hop_samples: int = 160
    fft_samples: int = 400

    @property
    def samples_per_token(self) -> float:
        """Audio samples that one connector row stands for."""
        return self.window_samples / self.tokens

    def num_tokens(self, num_samples: int) -> int:
        """Connector rows for a clip of `num_samples` samples at `rate_hz`: every window but the last is full.

        Example:
            >>> AudioSpec(rate_hz=16000, window_samples=32000, tokens=50).num_tokens(48000)
            75
        """
        full, rest = divmod(num_samples, self.window_samples)
        return full * self.tokens + -(-rest * self.tokens // self.window_samples)


@dataclass(frozen=True, slots=True)
class MediaSpecs:
    """The media that a run's model takes; a modality that is None is refused in the data."""

    image: ImageSpec | None = None
    audio: AudioSpec | None = None
    video: VideoSpec | None = None

    def rows_per_input(self, modality: Modality) -> int:
        """P of `modality`: connector rows of one tower input. Raises KeyError when the model lacks the modality."""
        spec = {"image": self.image, "video": self.image, "audio": self.audio}[modality]
        if spec is None:
            raise KeyError(modality)
        return spec.tokens


@dataclass(frozen=True, slots=True)
class EncodedMedia:
    """One decoded media item inside a document.

    `data`: image and video uint8 [frames, 3, size, size] (an image has one frame), audio float32 [windows, ...] as
    `AudioSpec` says. The item's tokens stand at `slot .. slot + num_tokens` of its document. `rows` int64 [num_tokens]: which
    of the item's `len(data) * P` connector rows stands there, -1 = none (a newline token, embedded like text); None = the
    first `num_tokens` rows in order.
    """

    modality: Modality
    data: torch.Tensor
    slot: int
    num_tokens: int
    rows: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """One document: token ids int64 [L], `is_target` bool [L] (this token is to be predicted), its media in slot order."""

    id: str
    input_ids: torch.Tensor
    is_target: torch.Tensor
    media: tuple[EncodedMedia, ...] = ()

    def __len__(self) -> int:
        return int(self.input_ids.numel())


@dataclass(frozen=True, slots=True)
class MediaBatch:
    """All items of one modality in a pack.

    `data`: tower inputs [N, ...], an item's frames or windows side by side. Per item, int64 [items]: `document` index,
    `slot` = first token in the pack, `num_tokens`, `num_inputs`.
    """

    data: torch.Tensor
    document: torch.Tensor
    slot: torch.Tensor
    num_tokens: torch.Tensor
    num_inputs: torch.Tensor


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One pack, final when the collator returns: nobody downstream edits it.

    input_ids     int64 [T]
    position_ids  int64 [T], restart at 0 in every document
    cu_seqlens    int32 [S + 1], document s is `cu_seqlens[s]:cu_seqlens[s + 1]`
    labels        int64 [T], already shifted: `labels[t]` is the token that position t predicts, -100 = no target. The
                  last token of a document has none.
    target_idx    int64 [Nt], the positions with a target, ascending
    source_index  int64 [T], row of `cat([text embeddings [T], image rows [N*P], video rows, audio rows])` for each position;
                  its own position's row for text, and each media row stands at one position at most
    media_positions  int32 [M], the inverse: where each of the M media rows stands, -1 = nowhere
    media         modality -> MediaBatch, only modalities that occur
    lengths       document lengths as host integers, the same facts as `cu_seqlens` without a device sync
    ids           sample ids in document order; `skipped` names those that are loss-masked filler
    tokens        host counts: `{"text": n, "image": n, ...}`, positions by what they hold; filler is not counted
    spans         how sequence parallelism divides the pack, planned where the pack was made; None = it is not divided.
                  Padding that makes the parts equal is one more document at the end, and not in any tensor here
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    labels: torch.Tensor
    target_idx: torch.Tensor
    source_index: torch.Tensor
    media_positions: torch.Tensor
    media: dict[Modality, MediaBatch]
    lengths: tuple[int, ...]
    ids: tuple[str, ...]
    tokens: dict[str, int]
    skipped: tuple[Skip, ...] = field(default=())
    spans: Spans | None = None

    @property
    def num_tokens(self) -> int:
        """T, including filler."""
        return sum(self.lengths)

    @property
    def num_targets(self) -> int:
        """Nt, the number of loss terms in this pack."""
        return int(self.target_idx.numel())

    def tensors(self) -> Iterable[torch.Tensor]:
        """All tensors of the batch."""
        batches: list[PackedBatch | MediaBatch] = [self, *self.media.values()]
        for batch in batches:
            for f in fields(batch):
                value = getattr(batch, f.name)
                if hasattr(value, "device"):
                    yield value

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with every tensor on `device` (asynchronous from pinned memory)."""

        def move(batch: PackedBatch | MediaBatch) -> dict[str, torch.Tensor]:
            tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
            return {k: v.to(device, non_blocking=True) for k, v in tensors.items() if hasattr(v, "device")}

        media = {m: replace(b, **move(b)) for m, b in self.media.items()}
        return replace(self, media=media, **move(self))  # type: ignore[arg-type]
