"""From a checkpoint of any layout to a Hugging Face folder that has proved itself in a fresh process.

Tensors are streamed from the checkpoint to safetensors files: this process holds one of them, in fp32, and one chunk of the
checkpoint beside it, however large the model is. The folder gets its final name only after a new process has opened it and
given the training model's logits for a probe with text, a picture and sound.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from transformers import GenerationConfig

from mmscale.errors import CheckpointError, ConfigError
from mmscale.logging import get_logger
from mmscale.model.composite import skeleton
from mmscale.model.convert import ExportPlan, Target, export_plan
from mmscale.model.processor import save_llava_processor
from mmscale.streaming.chat import stop_ids, to_jinja
from mmscale.train.checkpoint import newest_checkpoint, open_checkpoint
from mmscale.train.proof import prove
from mmscale.train.safetensors_writer import Entry, SafetensorsWriter
from mmscale.train.trained import Trained, open_trained

log = get_logger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Export:
    """What was written: the class, its tensors, what was left out, and how exactly it agrees with the training model.

    `logit_error` is None when no proof was asked for.
    """

    folder: Path
    target: str
    step: int
    num_tensors: int
    num_bytes: int
    left_out: tuple[str, ...]
    logit_error: float | None


def consolidate(
    source: Path,
    out: Path,
    target: Target = "auto",
    drop: Sequence[str] = (),
    dtype: str = "fp32",
    max_shard_bytes: int = 4 * 10**9,
    proof: bool = True,
) -> Export:
    """The export of a run's newest verified checkpoint, or of one checkpoint, in the new folder `out`.

    Args:
        target: `llava` (stock class), `mmscale` (our class), or `auto`: stock when everything fits.
        drop: modalities to leave out, `audio` or `vision`.
        dtype: stored type, `fp32` or `bf16`.
        max_shard_bytes: largest safetensors file.
        proof: False leaves out the comparison of logits, for which another process needs memory for the model in fp32.

    Raises:
        CheckpointError: no checkpoint verifies, or the reloaded export does not give the training model's logits.
        ConfigError: `out` exists, or the model does not fit the target; the text gives every reason.

    Cost: memory of twice the largest tensor at most, and of a frozen part that is not in the checkpoint, which is loaded
    whole from the folder it came from.
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
        tensors = _tensors(trained, plan, DTYPES[dtype])
        writer = SafetensorsWriter(work, tensors.entries, max_shard_bytes)
        _write_tensors(trained, plan, tensors, writer)
        num_tensors = writer.close()
        _write_texts(trained, plan, work, dtype)
        error = prove(trained, plan.left_out, work, DTYPES[dtype]) if proof else None
        if out.exists():
            out.rmdir()
        work.chmod(0o755)
        work.rename(out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return Export(out, plan.target, trained.reader.step, num_tensors, writer.total_bytes, plan.left_out, error)


def _open(source: Path) -> Trained:
    root = source / "checkpoints"
    return open_trained(newest_checkpoint(root) if root.is_dir() else open_checkpoint(source))


@dataclass(frozen=True, slots=True)
class _Tensors:
    """What is written: parameter name by final name, and the tensors in order."""

    sources: dict[str, str]
    entries: list[Entry]


def _tensors(trained: Trained, plan: ExportPlan, dtype: torch.dtype) -> _Tensors:
    """Names, shapes and types of the export. Raises CheckpointError when the checkpoint's shapes are not the model's."""
    with torch.device("meta"):
        model = skeleton(trained.description)
    extra = sorted(set(model.state_dict(keep_vars=True)) - set(dict(model.named_parameters(remove_duplicate=False))))
    if extra:
        raise CheckpointError(
            f"expected a model whose state is its parameters, found the stored buffers {extra[:3]}; export is not possible"
        )
    stored = trained.reader.names
    tensors = _Tensors({}, [])
    for name, parameter in model.named_parameters():
        final = plan.rename(name)
        if final is None:
            continue
        if f"model.{name}" in stored and trained.reader.shape(f"model.{name}") != parameter.shape:
            found = list(trained.reader.shape(f"model.{name}"))
            raise CheckpointError(
                f"{name}: expected shape {list(parameter.shape)} from the config, found {found} in the checkpoint; "
                "use the version of mmscale that wrote it"
            )
        tensors.sources[final] = name
        tensors.entries.append(Entry(final, tuple(parameter.shape), dtype))
    tensors.entries.extend(Entry(final, shape, dtype) for final, (shape, _) in plan.constants.items())
    return tensors


def _write_tensors(trained: Trained, plan: ExportPlan, tensors: _Tensors, writer: SafetensorsWriter) -> None:
    read = trained.weights()
    for entry in tensors.entries:
        if entry.name in tensors.sources:
            writer.write(entry.name, read(tensors.sources[entry.name]))
        else:
            shape, value = plan.constants[entry.name]
            writer.write(entry.name, torch.full(shape, value))


def _write_texts(trained: Trained, plan: ExportPlan, folder: Path, dtype: str) -> None:
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
