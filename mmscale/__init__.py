"""mmscale trains large multimodal language models from sharded WebDataset tars. `import mmscale` imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from mmscale.serve.generate import Generator

__version__ = "0.1.0"


def load(path: str | Path, device: str = "cpu", dtype: str | None = None) -> Generator:
    """Opens an exported model folder (ours or a stock LLaVA) with its tokenizer, processor and chat template.

    Args:
        path: folder written by `mmscale consolidate`.
        device: torch device such as `cpu` or `cuda:0`.
        dtype: `fp32` or `bf16`; None keeps the stored type.

    Raises:
        ConfigError: the folder is not such an export; the text says what is missing.
    """
    from mmscale.serve.generate import Generator

    return Generator.from_folder(path, device=device, dtype=dtype)
