"""Files of bounded size that other software reads, written without holding them."""

from __future__ import annotations

import itertools
import json
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mmscale.train import safetensors_writer
from mmscale.train.safetensors_writer import Entry, SafetensorsWriter, split_files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_tensors_are_read_back_by_safetensors(tmp_path, seed, monkeypatch, dtype) -> None:
    monkeypatch.setattr(safetensors_writer, "_BLOCK_ELEMENTS", 7)  # blocks end inside of rows
    rng = random.Random(seed)
    shapes = [tuple(rng.choice((0, 1, 2, 3, 8)) for _ in range(rng.randrange(4))) for _ in range(40)]
    tensors = {f"layer.{i}.\u00fc": torch.randn(shape) for i, shape in enumerate(shapes)}
    tensors["turned"] = torch.randn(5, 3).T
    max_bytes = rng.choice((1, 200, 1000, 10**6))
    entries = [Entry(name, tuple(t.shape), dtype) for name, t in tensors.items()]
    writer = SafetensorsWriter(tmp_path, entries, max_bytes)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    assert writer.close() == len(tensors)
    files = sorted(tmp_path.glob("*.safetensors"))
    seen = {}
    for path in files:
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        own = load_file(path)
        size = sum(t.numel() * t.element_size() for t in own.values())
        assert size <= max_bytes or len(own) == 1
        seen |= dict.fromkeys(own, path.name)
        assert all(t.dtype == dtype and torch.equal(t, tensors[name].to(dtype)) for name, t in own.items())
    assert seen.keys() == tensors.keys()
    assert writer.total_bytes == sum(entry.num_bytes for entry in entries)
    index = tmp_path / "model.safetensors.index.json"
    if len(files) == 1:
        assert files[0].name == "model.safetensors" and not index.exists()
    else:
        assert files[-1].name == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
        content = json.loads(index.read_text())
        assert content["weight_map"] == seen and content["metadata"]["total_size"] == writer.total_bytes


def test_files_are_filled_in_order(seed) -> None:
    rng = random.Random(seed)
    entries = [Entry(str(i), (rng.randrange(40),), torch.float32) for i in range(200)]
    files = split_files(entries, 100)
    assert [entry for file in files for entry in file] == entries
    for file, after in itertools.pairwise(files):
        assert sum(e.num_bytes for e in file) + after[0].num_bytes > 100
        assert sum(e.num_bytes for e in file) <= 100 or len(file) == 1


def test_another_order_or_shape_is_refused(tmp_path) -> None:
    entries = [Entry("a", (2,), torch.float32), Entry("b", (2,), torch.float32)]
    with pytest.raises(ValueError, match="expected a"):
        SafetensorsWriter(tmp_path, entries, 100).write("b", torch.ones(2))
    with pytest.raises(ValueError, match="expected a"):
        SafetensorsWriter(tmp_path, entries, 100).write("a", torch.ones(3))
