"""The Hugging Face processor of a stock LLaVA export: the same pixels and slots that the model was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer, LlavaProcessor

from mmscale.model.convert import LLAVA_IMAGE_MODES
from mmscale.model.description import MmscaleConfig

_BICUBIC = 3


def save_llava_processor(folder: Path, config: MmscaleConfig, chat_template: str) -> None:
    """Writes `processor_config.json` and the chat template beside the tokenizer that is already in `folder`."""
    spec = config.specs.image
    assert spec is not None, "export_plan refuses a LLaVA export without images"
    assert spec.mode in LLAVA_IMAGE_MODES, "export_plan refuses other modes"
    common: dict[str, Any] = {
        "resample": _BICUBIC,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
    }
    if spec.mode == "resize":
        image = _image_processor("Siglip")(size={"height": spec.size, "width": spec.size}, **common)
    else:
        crop = {"height": spec.size, "width": spec.size}
        image = _image_processor("CLIP")(size={"shortest_edge": spec.size}, crop_size=crop, **common)
    has_class_token = config.vision_config.model_type == "clip_vision_model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    LlavaProcessor(
        image_processor=image,
        tokenizer=tokenizer,
        patch_size=int(config.vision_config.patch_size),
        vision_feature_select_strategy="default"
        if has_class_token and config.vision_select_feature == "patch"
        else "full",
        num_additional_image_tokens=int(has_class_token),
        image_token=tokenizer.convert_ids_to_tokens(config.media_token_ids["image"]),
        chat_template=chat_template,
    ).save_pretrained(folder)


def _image_processor(family: str) -> type[Any]:
    """The Pillow-based image processor of a family: the default one of newer versions needs torchvision."""
    plain = f"{family}ImageProcessor"
    return getattr(transformers, f"{plain}Pil", None) or getattr(transformers, plain)
