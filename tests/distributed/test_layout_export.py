"""An export does not depend on the layout that wrote the checkpoint: its files are those of one process, to the bit.

Real tensor-parallel models: fused projections, key/value heads that ranks hold twice, tied heads, experts, towers.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from grids import grid
from safetensors import safe_open
from tiny_multimodal import tiny_config

from mmscale.config.env import Launch
from mmscale.config.schema import Config, ParallelConfig
from mmscale.config.specs import media_specs
from mmscale.model.composite import build_model
from mmscale.parallel.apply import make_engine
from mmscale.parallel.mesh import Mesh, init_mesh
from mmscale.parallel.tensor.shard import shard_tensor
from mmscale.train.checkpoint import save_checkpoint
from mmscale.train.consolidate import consolidate
from mmscale.train.optim import build_optimizer, param_groups
from mmscale.train.setup import load_tokenizer

FAMILIES = ("llama", "phi3", "qwen2", "gemma", "gpt_oss")
LAYOUTS: list[tuple[str, dict[str, int], dict[str, Any]]] = [
    ("tp2-dp2-fsdp", {"tensor": 2}, {"engine": "fsdp"}),
    ("tp2-sp2-zero3", {"tensor": 2, "ulysses": 2}, {"engine": "deepspeed", "zero_stage": 3, "zero_keep_whole": 0}),
    ("tp2-dp2-zero1", {"tensor": 2}, {"engine": "deepspeed", "zero_stage": 1}),
    ("tp4-fsdp", {"tensor": 4}, {"engine": "fsdp"}),
    ("sp4-fsdp", {"ulysses": 2, "ring": 2}, {"engine": "fsdp"}),
]
FEW = LAYOUTS[:2]
ALONE = init_mesh(ParallelConfig(), "cpu", Launch())


def config_of(family: str, tokenizer: str, seed: int) -> Config:
    config = tiny_config(family, seed=seed).model_dump(mode="json")
    # 252 rows would not divide among 4 ranks
    config["model"]["tokenizer"] = {"path": tokenizer, "pad_to_multiple": 64}
    return Config.model_validate(config)


def save_with(mesh: Mesh, root: Path, config: Config, engine_keys: dict[str, Any]) -> None:
    """A checkpoint of the model with random weights, by an engine of this layout."""
    specs = media_specs(config.model, config.data)
    model = build_model(config, load_tokenizer(config).vocab_size, specs)
    generator = torch.Generator().manual_seed(config.train.seed)
    with torch.no_grad():  # biases and norms too, which start as constants
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
    parallel = ParallelConfig(tensor=mesh.tensor.size, **engine_keys)
    layouts = shard_tensor(model, mesh, parallel)
    optimizer = build_optimizer(param_groups(model, config.train), config.train)
    engine = make_engine(model, optimizer, parallel, config.train, mesh, layouts=layouts)
    trainer = {"config": config.model_dump(mode="json"), "external_parts": {}}
    save_checkpoint(root, 1, engine, trainer, mesh, keep_last=1)
    engine.close()


def save_layouts(mesh: Mesh, root: str, family: str, tokenizer: str, seed: int, layouts: list[Any]) -> None:
    for name, degrees, engine_keys in layouts:
        save_with(
            grid(mesh, **degrees), Path(root) / name / "checkpoints", config_of(family, tokenizer, seed), engine_keys
        )


def export(run: Path, dtype: str = "fp32") -> dict[str, str]:
    """The digests of the files that hold tensors, and the index."""
    out = run / f"out-{dtype}"
    consolidate(run, out, target="mmscale", dtype=dtype, max_shard_bytes=150_000, proof=False)
    files = [*sorted(out.glob("*.safetensors")), out / "model.safetensors.index.json"]
    assert len(files) > 3
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("family", FAMILIES)
def test_files_are_those_of_one_process(ranks, demo_data, tmp_path, seed, family) -> None:
    tokenizer = str(demo_data / "tokenizer")
    save_with(ALONE, tmp_path / "one/checkpoints", config_of(family, tokenizer, seed), {})
    want = export(tmp_path / "one")
    layouts = LAYOUTS if family in ("llama", "phi3") else FEW
    ranks(4).run(save_layouts, str(tmp_path), family, tokenizer, seed, layouts)
    for name, *_ in layouts:
        assert export(tmp_path / name) == want, name
    if family == "phi3":
        assert export(tmp_path / "tp2-dp2-fsdp", "bf16") == export(tmp_path / "one", "bf16")
    other = config_of(family, tokenizer, seed + 1)
    save_with(ALONE, tmp_path / "other/checkpoints", other, {})
    assert not set(export(tmp_path / "other").values()) & {v for k, v in want.items() if k.endswith(".safetensors")}


def test_pieces_of_a_fused_projection_stand_in_order(ranks, demo_data, tmp_path, seed) -> None:
    """The comparison above can fail: the queries of the fused weight alone are other bits than its keys."""
    tokenizer = str(demo_data / "tokenizer")
    ranks(4).run(save_layouts, str(tmp_path), "phi3", tokenizer, seed, LAYOUTS[:1])
    run = tmp_path / LAYOUTS[0][0]
    consolidate(run, tmp_path / "out", target="mmscale", proof=False)
    config = config_of("phi3", tokenizer, seed)
    model = build_model(config, load_tokenizer(config).vocab_size, media_specs(config.model, config.data))
    generator = torch.Generator().manual_seed(config.train.seed)
    wanted = {name: torch.randn(param.shape, generator=generator) for name, param in model.named_parameters()}
    name = "llm.model.layers.0.self_attn.qkv_proj.weight"
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor(name), wanted[name])
        assert not torch.equal(file.get_tensor(name)[:32], wanted[name][32:64])
