"""The token embedding of a language model that puts media rows into the pack while it looks up the text.

Shapes: T tokens of the pack or of one rank's part of it, M media rows, D width.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from mmscale.kernels.placement import embed_and_place, place_media


class PlacingEmbedding(nn.Embedding):
    """torch's embedding, whose forward also takes media rows: `embed_and_place` in one pass.

    It is a module because engines that shard parameters gather them when the forward of their module is called.
    """

    @classmethod
    def like(cls, table: nn.Embedding) -> PlacingEmbedding:
        """The same embedding with the same parameter, which may be tied to a head."""
        rows, width = table.weight.shape
        made = cls(rows, width, table.padding_idx, _weight=table.weight.detach())
        made.weight = table.weight
        return made.train(table.training)

    def forward(
        self,
        input: Tensor,
        media_MD: Tensor | None = None,
        source_index_T: Tensor | None = None,
        media_positions_M: Tensor | None = None,
    ) -> Tensor:
        """Embeddings of ids of any shape, or the pack [T, D] of ids [T] and media rows, see `embed_and_place`."""
        if media_MD is None:
            return F.embedding(input, self.weight, self.padding_idx)
        assert source_index_T is not None and media_positions_M is not None, "media rows come with their places"
        return embed_and_place(self.weight, input, media_MD, source_index_T, media_positions_M, self.padding_idx)


def place_in_lookup(llm: PreTrainedModel) -> None:
    """Puts a `PlacingEmbedding` in place of a plain embedding of `llm`; names and parameters stay.

    Other embeddings stay as they are, such as Gemma 3's, which scales its rows: media rows are not scaled.
    """
    table = llm.get_input_embeddings()
    if not isinstance(table, nn.Embedding) or type(table) is not nn.Embedding:
        return
    if table.max_norm is None and not table.scale_grad_by_freq and not table.sparse:
        llm.set_input_embeddings(PlacingEmbedding.like(table))


def embed_pack(
    embedding: nn.Module, ids_T: Tensor, media_MD: Tensor, source_index_T: Tensor, media_positions_M: Tensor
) -> Tensor:
    """The embedded pack [T, D]: looked up and placed in one pass by a `PlacingEmbedding`, in two after any other."""
    places = (media_MD, source_index_T, media_positions_M)
    if isinstance(embedding, PlacingEmbedding):
        rows_TD: Tensor = embedding(ids_T, *places)
        return rows_TD
    return place_media(embedding(ids_T), *places)
