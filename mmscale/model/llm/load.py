"""Opens the language model: any supported Hugging Face causal LM, from a folder or with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from mmscale.errors import ConfigError
from mmscale.model.description import read_config
from mmscale.model.llm.attention import ATTENTION, carry_pack, check_llm, register
from mmscale.model.llm.embedding import place_in_lookup


def load_llm(config: PretrainedConfig, path: str | None = None, attention: str = ATTENTION) -> PreTrainedModel:
    """A causal LM in fp32 with `config.vocab_size` rows; code in a folder is never run.

    Args:
        config: from `llm_config`, with the padded vocabulary.
        path: folder with weights; None = random weights. Rows that the vocabulary has more than the weights start as the
            mean of the old rows (embeddings, and an untied head with its bias).
        attention: name of the attention implementation; with the default one the model takes `pack=`, and a plain embedding
            takes media rows.

    Raises:
        ConfigError: a family that is refused, or weights that do not fit.
    """
    if attention == ATTENTION:
        register()
        check_llm(config)
    if path is None:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    else:
        model = _open(path, int(config.vocab_size), attention)
    if attention == ATTENTION:
        carry_pack(model)
        place_in_lookup(model)
    return model


def _open(path: str, vocab_size: int, attention: str) -> PreTrainedModel:
    stored = read_config(path, "model.llm.path")
    stored.pad_token_id = None
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        *(path,),
        config=stored,
        attn_implementation=attention,
        dtype=torch.float32,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    model, info = loaded
    if info["missing_keys"] or info["mismatched_keys"]:
        found = sorted(info["missing_keys"]) or sorted(info["mismatched_keys"])
        raise ConfigError(
            f"model.llm.path: every weight is expected in {path}, missing or of another shape: {found[:3]}"
        )
    _grow_vocabulary(model, vocab_size)
    return model


@torch.no_grad()
def _grow_vocabulary(model: PreTrainedModel, vocab_size: int) -> None:
    old = int(model.config.vocab_size)
    if vocab_size == old:
        return
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    for module in {model.get_input_embeddings(), model.get_output_embeddings()}:
        for tensor in (module.weight, getattr(module, "bias", None)):
            if isinstance(tensor, nn.Parameter):
                tensor[old:] = tensor[:old].mean(dim=0)
