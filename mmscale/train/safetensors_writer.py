"""Writes tensors one by one into safetensors files of a bounded size, with the index that Hugging Face reads."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


class SafetensorsWriter:
    """Collects tensors up to `max_bytes` per file; memory stays at one file (or one tensor that is larger)."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._parts: list[tuple[Path, list[str]]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes one tensor; its memory belongs to the writer from now on."""
        size = tensor.numel() * tensor.element_size()
        if self._held and self._held_bytes + size > self._max_bytes:
            self._flush()
        self._held[name] = tensor.contiguous()
        self._held_bytes += size
        self.total_bytes += size

    def close(self) -> int:
        """Writes what is left, gives the files their final names (now that their number is known) and the index.

        Returns:
            The number of tensors written.
        """
        self._flush()
        count = len(self._parts)
        weight_map: dict[str, str] = {}
        for i, (path, names) in enumerate(self._parts, start=1):
            final = "model.safetensors" if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors"
            path.rename(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
        return len(weight_map)

    def _flush(self) -> None:
        if not self._held:
            return
        path = self._folder / f"part-{len(self._parts):05d}.safetensors"
        save_file(self._held, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors creates files that only their owner may read
        self._parts.append((path, list(self._held)))
        self._held, self._held_bytes = {}, 0
