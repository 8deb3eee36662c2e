"""How much memory it takes to turn a checkpoint into a Hugging Face folder."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.data import write_tokenizer
from benchmarks.result import Result, Settings
from mmscale.config.env import Launch
from mmscale.config.schema import Config, ParallelConfig
from mmscale.config.specs import media_specs
from mmscale.model.composite import skeleton
from mmscale.model.description import describe
from mmscale.parallel.engines.base import Engine
from mmscale.parallel.layout import Chunk
from mmscale.parallel.mesh import init_mesh
from mmscale.train.checkpoint import save_checkpoint
from mmscale.train.setup import load_tokenizer

MB = 1e6
ALLOWED_MB = 200
"""What an export may take beside twice its largest tensor."""
NUM_ROW_CUTS, NUM_COLUMN_CUTS = 16, 2
"""Into so many chunks a matrix is written, as 16 sharding ranks of 2 tensor-parallel parts would."""

_EXPORT = """
import json, sys
from pathlib import Path
from mmscale.train.consolidate import consolidate

def kilobytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))

before = kilobytes("VmRSS")
export = consolidate(Path(sys.argv[1]), Path(sys.argv[2]), proof=sys.argv[3] == "proof")
print(json.dumps([before, kilobytes("VmHWM"), export.num_bytes]))
"""


@dataclass(frozen=True)
class _Writer:
    """What a save needs of an engine."""

    tensors: dict[str, torch.Tensor]

    def state_views(self) -> Iterator[tuple[str, Chunk]]:
        for name, tensor in self.tensors.items():
            for chunk in _chunks(tensor):
                yield f"model.{name}", chunk


def consolidate_rss_ratio(settings: Settings) -> Result:
    """Growth of the exporting process's memory over its bound, twice the largest tensor + 200 MB, for a model of twice that."""
    config = _config(settings.folder)
    largest, total = _write_checkpoint(settings.folder, config)
    grown, imported = _export(settings.folder)
    bound = 2 * largest + ALLOWED_MB
    text = (
        f"loading the model would take {total:.0f} MB; grown by {grown:.0f} MB from {imported:.0f} MB after the imports, "
        f"largest tensor {largest:.0f} MB, {NUM_ROW_CUTS * NUM_COLUMN_CUTS} chunks each; the proof is a process of its own"
    )
    return Result("consolidate_rss_ratio", grown / bound, "x", "<= 1", text)


def _config(folder: Path) -> Config:
    write_tokenizer(folder / "tokenizer")
    llm = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 16_384, "num_hidden_layers": 5}
    llm |= {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": False}
    return Config.model_validate({
        "model": {
            "llm": {"config": llm},
            "tokenizer": {"path": str(folder / "tokenizer"), "pad_to_multiple": 32_768},
        },
        "data": {"sources": {"none": {"path": "none"}}, "seq_len": 256},
        "train": {"steps": 1, "global_batch": 1, "lr": 1e-3, "parts": {"llm": {"tune": "full"}}},
        "run": {"dir": str(folder)},
    })  # fmt: skip


def _write_checkpoint(folder: Path, config: Config) -> tuple[float, float]:
    """MB of the largest tensor and of all of them."""
    specs = media_specs(config.model, config.data)
    description = describe(config.model, load_tokenizer(config).vocab_size, specs)
    with torch.device("meta"):
        shapes = {name: param.shape for name, param in skeleton(description).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}
    engine: Engine = _Writer(tensors)  # type: ignore[assignment]
    mesh = init_mesh(ParallelConfig(), "cpu", Launch())
    trainer = {"config": config.model_dump(mode="json"), "external_parts": {}}
    save_checkpoint(folder / "checkpoints", 1, engine, trainer, mesh, keep_last=1)
    sizes = [tensor.numel() * 4 / MB for tensor in tensors.values()]
    return max(sizes), sum(sizes)


def _chunks(tensor: torch.Tensor) -> Iterator[Chunk]:
    columns = tensor.chunk(NUM_COLUMN_CUTS, 1) if tensor.dim() == 2 else (tensor,)
    column = 0
    for part in columns:
        row = 0
        for rows in part.chunk(NUM_ROW_CUTS):
            yield Chunk(rows, (row, column)[: tensor.dim()], tensor.shape)
            row += len(rows)
        column += part.shape[-1]


def _export(folder: Path) -> tuple[float, float]:
    """MB by which the memory of a new process grows, and MB that it has after the imports."""
    command = [sys.executable, "-c", _EXPORT, str(folder), str(folder / "out"), "proof"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    before, peak, _ = json.loads(done.stdout.splitlines()[-1])
    return (peak - before) * 1024 / MB, before * 1024 / MB
