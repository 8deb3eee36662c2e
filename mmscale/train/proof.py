"""Whether an export is the training model: both compute the logits of a probe with text, a picture and sound.

    this process            writes the probe
    a fresh process         opens the export and computes its logits, see export_proof.py
    the same, afterwards    builds the training model from the checkpoint and compares

This process holds no model, so an export takes the memory of a tensor here, and that of one model there.
"""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from mmscale.config.specs import extra_tokens
from mmscale.errors import CheckpointError
from mmscale.model.composite import MultimodalLM, skeleton
from mmscale.model.description import MmscaleConfig
from mmscale.model.hub import media_inputs
from mmscale.streaming.collate import collate
from mmscale.streaming.encode import DecodedMedia, decode_media, encode_turns
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.train import export_proof
from mmscale.train.checkpoint_reader import open_checkpoint
from mmscale.train.trained import Trained, open_trained
from mmscale.types import MEDIA_TOKENS, MODALITIES, EncodedSample, MediaBytes, MediaSpecs, Turn

TOLERANCE = 1e-4
"""Largest difference of logits between the training model and the reloaded export, both computing in fp32 from the same
stored numbers, relative to the largest logit. Measured 1e-6; a wrong tensor gives 1e-2 and more."""
PIXEL_TOLERANCE = 0.05
"""Largest mean difference, of 255, between our pixels and those of a stock image processor, which resizes by Pillow.
Measured 0.01; bilinear instead of bicubic gives 5 and more."""


def prove(trained: Trained, left_out: Sequence[str], folder: Path, dtype: torch.dtype) -> float:
    """The logit error of the export in `folder`, computed in a fresh process.

    Args:
        left_out: modalities that the export does not have.
        dtype: the stored type, to which the training model's weights are rounded.

    Raises:
        CheckpointError: the export does not open, or it is not the training model.
    """
    probe = _probe(trained, left_out)
    with tempfile.TemporaryDirectory() as scratch:
        probe_path, result_path = Path(scratch) / "probe.safetensors", Path(scratch) / "result.json"
        save_file(_probe_tensors(probe, trained.specs), probe_path)
        job = {"checkpoint": str(trained.reader.path), "left_out": list(left_out), "dtype": str(dtype)}
        paths = (str(folder), str(probe_path), str(result_path))
        command = [sys.executable, "-P", export_proof.__file__, *paths, json.dumps(job)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CheckpointError(
                f"expected a fresh process to open the export, found:\n{done.stderr[-2000:]}\nnothing was kept"
            )
        result = json.loads(result_path.read_text())
    if result["refusal"] is not None:
        raise CheckpointError(result["refusal"])
    return float(result["error"])


def compare(job: dict[str, Any], found: dict[str, Tensor]) -> dict[str, Any]:
    """`{"error": relative logit error, "refusal": None}`, or why the export is not the training model.

    Called by the fresh process.

    Args:
        job: which checkpoint, what was left out and the stored type, as `prove` gives them.
        found: what the export made of the probe: `logits` fp32 [L, V], `input_ids`, and its processor's `pixel_values`.
    """
    trained = open_trained(open_checkpoint(Path(job["checkpoint"]), verify=False))
    dtype = {str(d): d for d in (torch.float32, torch.bfloat16)}[job["dtype"]]
    try:
        return {"error": _logit_error(trained, job["left_out"], dtype, found), "refusal": None}
    except CheckpointError as error:
        return {"error": None, "refusal": str(error)}


@dataclass(frozen=True)
class _Probe:
    """A conversation with a picture and sound as far as the export takes them, and what the training model makes of it."""

    messages: list[dict[str, Any]]
    picture: bytes
    document: EncodedSample


def _probe(trained: Trained, left_out: Sequence[str]) -> _Probe:
    generator = torch.Generator().manual_seed(trained.reader.step)
    buffer = io.BytesIO()
    pixels = torch.randint(0, 256, (37, 53, 3), dtype=torch.uint8, generator=generator)
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    specs = trained.specs
    media: list[DecodedMedia] = []
    if specs.image is not None and "vision" not in left_out:
        media.append(decode_media(MediaBytes("image", "png", buffer.getvalue()), specs, pixels.numel()))
    if specs.audio is not None and "audio" not in left_out:
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


def _logit_error(trained: Trained, left_out: Sequence[str], dtype: torch.dtype, found: dict[str, Tensor]) -> float:
    probe = _probe(trained, left_out)
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
def _training_logits(trained: Trained, document: EncodedSample, dtype: torch.dtype) -> Tensor:
    """Logits fp32 [L, V] of the training model, with weights rounded to the stored type."""
    model: MultimodalLM = skeleton(trained.description, trained.config.model).eval()
    stored = trained.reader.names
    for name, parameter in model.named_parameters():
        whole = trained.reader.read(f"model.{name}") if f"model.{name}" in stored else parameter
        parameter.copy_(whole.to(dtype))
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
