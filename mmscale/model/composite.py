"""The one composite model: towers and connectors, media placement, a Hugging Face language model, the summed loss.

Single-device maths; parallelism lives outside. Every call goes through module forwards, so engines that shard parameters
see all of them. Shapes: T tokens of the pack, N targets, M media rows, D width, V vocabulary.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from mmscale.config.schema import Config, LlmConfig, ModelConfig, TowerConfig
from mmscale.errors import ConfigError
from mmscale.kernels.linear_cross_entropy import take_rows
from mmscale.model.batch import ModelBatch
from mmscale.model.description import MmscaleConfig, describe
from mmscale.model.encoder import MediaEncoder, build_audio, build_vision
from mmscale.model.llm.embedding import embed_pack
from mmscale.model.llm.head import LossOptions, loss_head, put_loss_head
from mmscale.model.llm.layers import replace_layers
from mmscale.model.llm.load import load_llm
from mmscale.types import MediaSpecs, PackedBatch


class MultimodalLM(nn.Module):
    """A language model `llm` that reads rows of `vision` and `audio` encoders in the slots of its input.

    `config` describes it completely and is what an export stores. The head of `llm` becomes a `LossHead`.
    """

    def __init__(
        self,
        config: MmscaleConfig,
        llm: PreTrainedModel,
        vision: MediaEncoder | None,
        audio: MediaEncoder | None,
        loss: LossOptions = LossOptions(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__()
        self.config = config
        self.llm = llm
        self.vision = vision
        self.audio = audio
        put_loss_head(llm, loss)

    def forward(self, batch: PackedBatch | ModelBatch) -> torch.Tensor:
        """The SUM of the token losses over the targets of the pack, or of the part of it, an fp32 scalar.

        Without targets it is exactly 0, connected to every parameter like any other: a modality that does not occur runs one
        zero input of which no row is used.

        Raises:
            ConfigError: media that the model has no encoder for.
        """
        batch = ModelBatch.of(batch) if isinstance(batch, PackedBatch) else batch
        rows_ND = take_rows(self._hidden(batch), batch.target_idx)
        loss: torch.Tensor = loss_head(self.llm)(rows_ND, batch.labels[batch.target_idx])
        return loss

    def logits(self, batch: PackedBatch | ModelBatch, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [N, V] at the targets, or at `positions` (int64); only these rows pass the output head.

        Under tensor parallelism V is this rank's share of the vocabulary.
        """
        batch = ModelBatch.of(batch) if isinstance(batch, PackedBatch) else batch
        keep = batch.target_idx if positions is None else positions
        logits_NV: torch.Tensor = loss_head(self.llm)(self._hidden(batch).index_select(0, keep))
        return logits_NV

    def parts(self) -> dict[str, nn.Module]:
        """The trainable parts by name, only those present: llm, vision, vision_connector, audio, audio_connector.

        They are disjoint and hold every parameter; `part_prefixes` gives their parameter prefixes.
        """
        parts: dict[str, nn.Module] = {"llm": self.llm}
        for name, encoder in (("vision", self.vision), ("audio", self.audio)):
            if encoder is not None:
                parts |= {name: encoder.tower, f"{name}_connector": encoder.connector}
        return parts

    def part_prefixes(self) -> dict[str, str]:
        """Part name -> the exact prefix of its parameter names, such as `vision_connector` -> `vision.connector.`."""
        names = {"llm": "llm.", "vision": "vision.tower.", "vision_connector": "vision.connector."}
        names |= {"audio": "audio.tower.", "audio_connector": "audio.connector."}
        return {part: names[part] for part in self.parts()}

    def checkpoint_activations(self) -> None:
        """Makes the layers of the language model and the towers recompute their activations in the backward pass."""
        models = [self.llm, *(e.tower.model for e in (self.vision, self.audio) if e is not None)]
        for model in models:
            # transformers 5.23 renamed the method; 5.17 has the old name only.
            name = "activation_checkpointing_enable"
            enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
            enable({"use_reentrant": False})

    def _hidden(self, batch: ModelBatch) -> torch.Tensor:
        """[T, D], what the head reads."""
        out = self.llm.base_model(
            inputs_embeds=self._embed(batch)[None],
            position_ids=batch.position_ids.unsqueeze(-2),
            use_cache=False,
            pack=batch.attention,
        )
        hidden_TD: torch.Tensor = out.last_hidden_state.squeeze(0)
        return hidden_TD

    def _embed(self, batch: ModelBatch) -> torch.Tensor:
        images = [batch.inputs[m] for m in ("image", "video") if m in batch.inputs]
        sounds = [batch.inputs["audio"]] if "audio" in batch.inputs else []
        rows: list[torch.Tensor] = []
        for name, encoder, data in (("vision", self.vision, images), ("audio", self.audio, sounds)):
            if encoder is None:
                if data:
                    raise ConfigError(f"a pack without {name} media is expected, the model has none; set model.{name}")
            elif data:
                rows.append(encoder(torch.cat(data)).flatten(0, 1))
            else:  # none of its rows, but its parameters take part: sharded engines wait for them, and so does the route
                rows.append(encoder.zero_rows(batch.input_ids.device).flatten(0, 1)[:0])
        embedding = self.llm.get_input_embeddings()
        if not rows:
            return cast(torch.Tensor, embedding(batch.input_ids))
        media_MD = torch.cat(rows) if len(rows) > 1 else rows[0]
        if batch.route is not None:
            media_MD = batch.route(media_MD)
        return embed_pack(embedding, batch.input_ids, media_MD, batch.source_index, batch.media_positions)


def build_model(config: Config, vocab_size: int, specs: MediaSpecs) -> MultimodalLM:
    """The model of a run in fp32 on the CPU, weights from the configured folders or random under `train.seed`.

    The global random state is left as it was.

    Args:
        vocab_size: rows of the padded vocabulary.
        specs: from `media_specs(config.model, config.data)`.

    Raises:
        ConfigError: a part that cannot be built; the text names its key.
    """
    description = describe(config.model, vocab_size, specs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        loss = LossOptions(config.train.z_loss, config.train.loss_memory_mb * 1_000_000)
        model = skeleton(description, config.model, loss).train()
    if config.train.checkpoint_activations:
        model.checkpoint_activations()
    return model


def skeleton(
    description: MmscaleConfig,
    sources: ModelConfig | None = None,
    loss: LossOptions = LossOptions(),  # noqa: B008 - frozen
) -> MultimodalLM:
    """The modules of a described model, with the weights of the folders in `sources`, else random ones.

    Under `torch.device("meta")` and without `sources` it costs no memory: names and shapes only.
    """

    def path(part: LlmConfig | TowerConfig | None) -> str | None:
        return part.path if part is not None else None

    return MultimodalLM(
        description,
        llm=replace_layers(load_llm(description.text_config, path(sources.llm) if sources else None)),
        vision=build_vision(description, path(sources.vision) if sources else None),
        audio=build_audio(description, path(sources.audio) if sources else None),
        loss=loss,
    )
