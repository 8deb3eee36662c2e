"""`mmscale consolidate`: a checkpoint becomes a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import cast, get_args

from mmscale import logging
from mmscale.errors import ConfigError
from mmscale.model.convert import Target
from mmscale.train.consolidate import consolidate


def run(source: str, out: str, target: str, drop: list[str], dtype: str, max_shard_gb: float, proof: bool) -> None:
    """Exports, proves the export and says what was written and what was left out."""
    logging.setup()
    if target not in get_args(Target):
        raise ConfigError(f"--target: expected {', '.join(get_args(Target))}, found {target!r}")
    export = consolidate(Path(source), Path(out), cast(Target, target), drop, dtype, int(max_shard_gb * 1e9), proof)
    kind = "stock LlavaForConditionalGeneration" if export.target == "llava" else "mmscale's own class"
    print(
        f"{export.folder}: {kind} of step {export.step}, {export.num_tensors} tensors, {export.num_bytes / 1e6:.1f} MB"
    )
    if export.left_out:
        print(f"left out: {', '.join(export.left_out)} (tower and connector)")
    if export.logit_error is None:
        print("not proved: --no-proof was given, so nothing has opened this export yet")
        return
    print(f"proved in a fresh process: logits equal the training model's, relative difference {export.logit_error:.1e}")
