"""Parts that are loaded from a folder and frozen: not stored in checkpoints, exported all the same, and held to their hash."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

RECIPE = Path(__file__).parents[2] / "configs/recipes/digits.yaml"
WORDS = [
    "train.save_every=2", "train.warmup_steps=0", "train.global_batch=2", "data.plan_group=1", "data.seq_len=384", "data.window=64",
    "data.workers=0", "eval.every=0", "run.tensorboard=false", "run.threads=1", "run.device=cpu", "train.parts.vision.tune=frozen",
    "model.vision.config=null",
]  # fmt: skip


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """A SigLIP tower saved in the real format."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    folder = tmp_path_factory.mktemp("tower")
    torch.manual_seed(3)
    shape = {
        "hidden_size": 96,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    SiglipVisionModel(SiglipVisionConfig(**shape)).save_pretrained(folder)
    return folder


def train_here(*words):
    from mmscale.config.load import load_config
    from mmscale.config.schema import ParallelConfig
    from mmscale.parallel.mesh import init_mesh
    from mmscale.train.loop import train

    train(load_config(RECIPE, words), init_mesh(ParallelConfig(), "cpu"))


def test_frozen_tower_from_a_folder(tower, demo_data, tmp_path):
    from mmscale.errors import CheckpointError
    from mmscale.train.checkpoint import newest_checkpoint
    from mmscale.train.consolidate import consolidate

    run = tmp_path / "run"
    words = [*WORDS, f"data.root={demo_data}", f"run.dir={run}", f"model.vision.path={tower}"]
    train_here(*words, "train.steps=2")
    reader = newest_checkpoint(run / "checkpoints")
    assert not [n for n in reader.names if ".vision.tower." in n], "frozen weights from a folder are named, not stored"
    assert [n for n in reader.names if "vision.connector" in n]
    export = consolidate(run, tmp_path / "llava", target="llava", drop=["audio"])
    exported, original = load_file(export.folder / "model.safetensors"), load_file(tower / "model.safetensors")
    name = "encoder.layers.0.mlp.fc1.weight"
    ours = next(t for n, t in exported.items() if n.startswith("vision_tower") and n.endswith(name))
    assert torch.equal(ours, next(t for n, t in original.items() if n.endswith(name)))

    config_before = (run / "config.yaml").read_text()
    file = tower / "model.safetensors"
    save_file({n: t + 1 for n, t in original.items()}, file, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"model\.vision\.path=.*expected the weights that this run was trained beside"
    ):
        train_here(*words, "train.steps=4")
    assert (run / "DONE").exists(), "a refused start leaves the run directory as it was"
    assert (run / "config.yaml").read_text() == config_before
    save_file(original, file, metadata={"format": "pt"})
    train_here(*words, "train.steps=4")
    assert newest_checkpoint(run / "checkpoints").step == 4
