"""From a checkpoint of any layout to a Hugging Face folder that has proved itself in a fresh process.

Tensors are streamed from the checkpoint to safetensors files. The folder gets its final name only after a new process has
opened it and given the training model's logits for a probe with text, a picture and sound.
"""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig

from mmscale.config.schema import Config
from mmscale.config.specs import extra_tokens, media_specs
from mmscale.errors import CheckpointError, ConfigError
from mmscale.logging import get_logger
from mmscale.model.composite import MultimodalLM, skeleton
from mmscale.model.convert import ExportPlan, Target, export_plan
from mmscale.model.description import MmscaleConfig, describe
from mmscale.model.hub import media_inputs
from mmscale.model.processor import save_llava_processor
from mmscale.streaming.chat import ChatTemplate, load_template, stop_ids, to_jinja
from mmscale.streaming.collate import collate
from mmscale.streaming.encode import DecodedMedia, decode_media, encode_turns
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.train import export_proof
from mmscale.train.checkpoint import CheckpointReader, newest_checkpoint, open_checkpoint
from mmscale.train.safetensors_writer import SafetensorsWriter
from mmscale.train.setup import load_tokenizer
from mmscale.types import MEDIA_TOKENS, MODALITIES, EncodedSample, MediaBytes, MediaSpecs, Turn

log = get_logger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = 1e-4
"""Largest difference of logits between the training model and the reloaded export, both computing in fp32 from the same
stored numbers, relative to the largest logit. Measured 1e-6; a wrong tensor gives 1e-2 and more."""
PIXEL_TOLERANCE = 0.05
"""Largest mean difference, of 255, between our pixels and those of a stock image processor, which resizes by Pillow.
Measured 0.01; bilinear instead of bicubic gives 5 and more."""


@dataclass(frozen=True, slots=True)
class Export:
    """What was written: the class, its tensors, what was left out, and how exactly it agrees with the training model."""

    folder: Path
    target: str
    step: int
    num_tensors: int
    num_bytes: int
    left_out: tuple[str, ...]
    logit_error: float


@dataclass(frozen=True)
class _Source:
    """A trained model on disk: its checkpoint and all that its configuration says."""

    reader: CheckpointReader
    config: Config
    tokenizer: TextTokenizer
    template: ChatTemplate
    specs: MediaSpecs
    description: MmscaleConfig


def consolidate(
    source: Path,
    out: Path,
    target: Target = "auto",
    drop: Sequence[str] = (),
    dtype: str = "fp32",
    max_shard_bytes: int = 4 * 10**9,
) -> Export:
    """The export of a run's newest verified checkpoint, or of one checkpoint, in the new folder `out`.

    Args:
        target: `llava` (stock class), `mmscale` (our class), or `auto`: stock when everything fits.
        drop: modalities to leave out, `audio` or `vision`.
        dtype: stored type, `fp32` or `bf16`.
        max_shard_bytes: largest safetensors file.

    Raises:
        CheckpointError: no checkpoint verifies, or the reloaded export does not give the training model's logits.
        ConfigError: `out` exists, or the model does not fit the target; the text gives every reason.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype: expected {' or '.join(DTYPES)}, found {dtype!r}")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"expected a new folder for the export, found files in {out}; give another folder")
    trained = _open(source)
    plan = export_plan(trained.description, target, tuple(drop))
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        writer = SafetensorsWriter(work, max_shard_bytes)
        _write_tensors(trained, plan, DTYPES[dtype], writer)
        num_tensors = writer.close()
        _write_texts(trained, plan, work, dtype)
        error = _prove(trained, plan, work, DTYPES[dtype])
        if out.exists():
            out.rmdir()
        work.chmod(0o755)
        work.rename(out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return Export(out, plan.target, trained.reader.step, num_tensors, writer.total_bytes, plan.left_out, error)


def _open(source: Path) -> _Source:
    root = source / "checkpoints"
    reader = newest_checkpoint(root) if root.is_dir() else open_checkpoint(source)
    config = Config.model_validate(reader.trainer["config"])
    tokenizer = load_tokenizer(config)
    template = load_template(config.data.template)
    specs = media_specs(config.model, config.data)
    media_ids: dict[str, int] = {modality: tokenizer.media_id(modality) for modality in MODALITIES}
    description = describe(config.model, tokenizer.vocab_size, specs, media_ids, template.name)
    return _Source(reader, config, tokenizer, template, specs, description)


def _tensor_reader(trained: _Source) -> Callable[[str], Tensor]:
    """Whole fp32 tensors by parameter name: from the checkpoint, or of a frozen part from the folder it came from."""
    stored = trained.reader.names
    outside: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        if f"model.{name}" in stored:
            return trained.reader.read(f"model.{name}")
        if not outside:
            outside.update(skeleton(trained.description, trained.config.model).named_parameters())
        return outside[name].detach()

    return read


def _write_tensors(trained: _Source, plan: ExportPlan, dtype: torch.dtype, writer: SafetensorsWriter) -> None:
    with torch.device("meta"):
        model = skeleton(trained.description)
    parameters = dict(model.named_parameters())
    extra = sorted(set(model.state_dict(keep_vars=True)) - set(dict(model.named_parameters(remove_duplicate=False))))
    if extra:
        raise CheckpointError(
            f"expected a model whose state is its parameters, found the stored buffers {extra[:3]}; export is not possible"
        )
    read = _tensor_reader(trained)
    for name, expected in parameters.items():
        final = plan.rename(name)
        if final is None:
            continue
        tensor = read(name)
        if tensor.shape != expected.shape:
            raise CheckpointError(
                f"{name}: expected shape {list(expected.shape)} from the config, found {list(tensor.shape)} in the checkpoint"
            )
        writer.add(final, tensor.to(dtype))
    for final, (shape, value) in plan.constants.items():
        writer.add(final, torch.full(shape, value, dtype=dtype))


def _write_texts(trained: _Source, plan: ExportPlan, folder: Path, dtype: str) -> None:
    """Configuration, tokenizer, processor, chat template and generation defaults."""
    tokenizer, template = trained.tokenizer, trained.template
    plan.config.dtype = DTYPES[dtype]
    plan.config.save_pretrained(folder)
    jinja = to_jinja(template)
    tokenizer.save(folder, jinja)
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(template).items() if k != "name"}
    (folder / "chat.yaml").write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    # rows that only pad the vocabulary stand for no token
    padding = list(range(tokenizer.num_tokens, tokenizer.vocab_size))
    GenerationConfig(
        eos_token_id=list(stop_ids(template, tokenizer)), pad_token_id=tokenizer.pad_id, suppress_tokens=padding or None
    ).save_pretrained(folder)
    if plan.target == "llava":
        save_llava_processor(folder, trained.description, jinja)


@dataclass(frozen=True)
class _Probe:
    """A conversation with a picture and sound as far as the export takes them, and what the training model makes of it."""

    messages: list[dict[str, Any]]
    picture: bytes
    document: EncodedSample


def _probe(trained: _Source, plan: ExportPlan) -> _Probe:
    generator = torch.Generator().manual_seed(trained.reader.step)
    buffer = io.BytesIO()
    pixels = torch.randint(0, 256, (37, 53, 3), dtype=torch.uint8, generator=generator)
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    specs = trained.specs
    media: list[DecodedMedia] = []
    if specs.image is not None and "vision" not in plan.left_out:
        media.append(decode_media(MediaBytes("image", "png", buffer.getvalue()), specs, pixels.numel()))
    if specs.audio is not None and "audio" not in plan.left_out:
        a = specs.audio
        shape = (1, a.mel_bins, a.window_samples // a.hop_samples) if a.features == "log_mel" else (1, a.window_samples)
        windows = torch.randn(shape, generator=generator)
        media.append(DecodedMedia("audio", windows, a.num_tokens(a.window_samples // 2 + 1)))
    text = "".join(f"{MEDIA_TOKENS[item.modality]}\n" for item in media) + "What is this? Answer in one word."
    turns = (Turn("user", text),)
    chat, placed = encode_turns(trained.template, trained.tokenizer, turns, media, generation_prompt=True)
    ids = torch.from_numpy(chat.input_ids)
    document = EncodedSample("probe", ids, torch.zeros(len(ids), dtype=torch.bool), placed)
    return _Probe([{"role": "user", "content": text}], buffer.getvalue(), document)


def _prove(trained: _Source, plan: ExportPlan, folder: Path, dtype: torch.dtype) -> float:
    """The logit error of the export in a fresh process. Raises CheckpointError when it is not the training model."""
    probe = _probe(trained, plan)
    found = _probe_export(folder, _probe_tensors(probe, trained.specs))
    wanted_ids, found_ids = (
        _collapsed(ids.tolist(), trained.tokenizer, extra_tokens(trained.config.data))
        for ids in (probe.document.input_ids, found["input_ids"])
    )
    if wanted_ids != found_ids:
        raise CheckpointError(
            f"expected the export's tokenizer and chat template to give {wanted_ids} for {probe.messages[0]['content']!r}, "
            f"found {found_ids}; nothing was kept"
        )
    document = probe.document
    if "pixel_values" in found:
        _check_pixels(document.media[0].data, found["pixel_values"], trained.description)
        document = dataclasses.replace(
            document, media=(dataclasses.replace(document.media[0], data=found["pixel_values"]),)
        )
    expected = _training_logits(trained, document, dtype)
    error = ((found["logits"] - expected).abs().max() / expected.abs().max()).item()
    if not error <= TOLERANCE:
        raise CheckpointError(
            f"expected the training model's logits from the export, found a relative difference of {error:.1e}; nothing was kept"
        )
    return error


def _probe_export(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the export makes of the probe in a fresh process: `logits`, `input_ids`, and its own processor's `pixel_values`."""
    with tempfile.TemporaryDirectory() as scratch:
        probe_path, result_path = Path(scratch) / "probe.safetensors", Path(scratch) / "result.safetensors"
        save_file(tensors, probe_path)
        command = [sys.executable, "-P", export_proof.__file__, str(folder), str(probe_path), str(result_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CheckpointError(
                f"expected a fresh process to open the export, found:\n{done.stderr[-2000:]}\nnothing was kept"
            )
        return load_file(result_path)


def _check_pixels(ours: Tensor, theirs: Tensor, description: MmscaleConfig) -> None:
    """Raises CheckpointError unless normalised pixels [1, 3, S, S] are the uint8 ones but for the rounding of resizing."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (description.image_mean, description.image_std))
    difference = ((theirs * std + mean) * 255 - ours).abs() if theirs.shape == ours.shape else torch.tensor(torch.inf)
    if not (difference.mean() <= PIXEL_TOLERANCE and difference.max() <= 2.5):
        raise CheckpointError(
            f"expected the training model's pixels {list(ours.shape)} from the export's image processor, found "
            f"{list(theirs.shape)}, other by {difference.mean():.2g} of 255 on average; nothing was kept"
        )


@torch.no_grad()
def _training_logits(trained: _Source, document: EncodedSample, dtype: torch.dtype) -> Tensor:
    """Logits fp32 [L, V] of the training model, with weights rounded to the stored type."""
    model: MultimodalLM = skeleton(trained.description, trained.config.model).eval()
    read = _tensor_reader(trained)
    for name, parameter in model.named_parameters():
        parameter.copy_(read(name).to(dtype))
    return model.logits(collate([document], trained.specs), torch.arange(len(document)))


def _probe_tensors(probe: _Probe, specs: MediaSpecs) -> dict[str, Tensor]:
    def as_bytes(data: bytes) -> Tensor:
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    tensors = {
        "messages": as_bytes(json.dumps(probe.messages).encode()),
        "picture": as_bytes(probe.picture),
        "input_ids": probe.document.input_ids[None],
    }
    return {**tensors, **media_inputs(probe.document.media, specs)}


def _collapsed(ids: Sequence[int], tokenizer: TextTokenizer, newlines: Sequence[str]) -> list[int]:
    """The ids with every run of one medium's slots as a single id, without the newline tokens inside."""
    gone = {tokenizer.special_id(token) for token in newlines}
    media = {tokenizer.media_id(modality) for modality in MODALITIES}
    kept = [token for token in ids if token not in gone]
    return [token for i, token in enumerate(kept) if not (i and token in media and kept[i - 1] == token)]
