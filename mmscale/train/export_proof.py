"""Opens an export in a fresh process and computes the logits of a probe; run as a script by the export itself.

    python -P export_proof.py FOLDER PROBE RESULT JOB

For a stock LLaVA folder nothing of mmscale is imported until the logits are there: transformers alone must open weights,
tokenizer, processor and chat template, and must turn the probe's conversation and picture into the same input. Only then, and
with the export's model given up, the training model is built for the comparison.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer


def main(folder: str, probe_path: str, result_path: str, job: str) -> None:
    """Writes what `mmscale.train.proof.compare` makes of the export's answer as JSON."""
    found = answer(folder, load_file(probe_path))
    from mmscale.train.proof import compare

    Path(result_path).write_text(json.dumps(compare(json.loads(job), found)))


def answer(folder: str, probe: dict[str, Tensor]) -> dict[str, Tensor]:
    """`logits` fp32 [L, V], and the `input_ids` [L] and `pixel_values` that the folder's own processor gives.

    Of an own export the `input_ids` are those of its tokenizer, with one id per medium; pixels are the probe's.
    """
    messages = json.loads(bytes(probe["messages"].tolist()))
    is_own = json.loads((Path(folder) / "config.json").read_text())["model_type"] == "mmscale"
    if is_own:
        from mmscale.model.hub import register

        register()
    loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, loading = loaded
    bad = {name: sorted(keys)[:3] for name, keys in loading.items() if keys}
    if bad:
        raise SystemExit(f"the weights do not fit the class {type(model).__name__}: {bad}")
    if is_own:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        names = ("input_ids", "pixel_values", "image_rows", "input_features", "feature_rows")
        inputs = {name: probe[name] for name in names if name in probe}
    else:
        processor = AutoProcessor.from_pretrained(folder)
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        picture = Image.open(io.BytesIO(bytes(probe["picture"].tolist()))).convert("RGB")
        inputs = dict(processor(text=[text], images=[picture], return_tensors="pt"))
        ids = inputs["input_ids"]
    with torch.no_grad():
        logits = model.eval()(**inputs).logits[0].float()
    assert is_own or "mmscale" not in sys.modules, "a stock export must not need mmscale"
    return {"logits": logits, "input_ids": ids[0], **({} if is_own else {"pixel_values": inputs["pixel_values"]})}


if __name__ == "__main__":
    main(*sys.argv[1:])
