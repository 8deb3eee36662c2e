"""A trained model on disk: its checkpoint, all that its configuration says, and its weights one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from mmscale.config.schema import Config
from mmscale.config.specs import media_specs
from mmscale.model.description import MmscaleConfig, describe
from mmscale.model.encoder import build_audio, build_vision
from mmscale.model.llm.load import load_llm
from mmscale.streaming.chat import ChatTemplate, load_template
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.train.checkpoint_reader import CheckpointReader
from mmscale.train.setup import load_tokenizer
from mmscale.types import MODALITIES, MediaSpecs


@dataclass(frozen=True)
class Trained:
    """A checkpoint and what belongs to its model."""

    reader: CheckpointReader
    config: Config
    tokenizer: TextTokenizer
    template: ChatTemplate
    specs: MediaSpecs
    description: MmscaleConfig

    def weights(self) -> Callable[[str], Tensor]:
        """A function from a parameter name to the whole fp32 tensor: from the checkpoint, or of a frozen part from its folder.

        Cost: a frozen part is loaded whole when its first tensor is asked for, and given up for the next part.
        """
        stored = self.reader.names
        loaded: dict[str, dict[str, Tensor]] = {}

        def read(name: str) -> Tensor:
            if f"model.{name}" in stored:
                return self.reader.read(f"model.{name}")
            part, _, rest = name.partition(".")
            if part not in loaded:
                loaded.clear()
                loaded[part] = {n: p.detach() for n, p in _load_part(self, part).named_parameters()}
            return loaded[part][rest]

        return read


def open_trained(reader: CheckpointReader) -> Trained:
    """The model of an open checkpoint. Raises ConfigError when its tokenizer or a part cannot be found any more."""
    config = Config.model_validate(reader.trainer["config"])
    tokenizer = load_tokenizer(config)
    template = load_template(config.data.template)
    specs = media_specs(config.model, config.data)
    media_ids: dict[str, int] = {modality: tokenizer.media_id(modality) for modality in MODALITIES}
    description = describe(config.model, tokenizer.vocab_size, specs, media_ids, template.name)
    return Trained(reader, config, tokenizer, template, specs, description)


def _load_part(trained: Trained, part: str) -> nn.Module:
    """One part with the weights of its folder."""
    model, description = trained.config.model, trained.description
    if part == "llm":
        return load_llm(description.text_config, model.llm.path)
    tower = model.vision if part == "vision" else model.audio
    build = build_vision if part == "vision" else build_audio
    encoder = build(description, tower.path if tower is not None else None)
    assert encoder is not None, f"only parts of the model are asked for, found {part}"
    return encoder
