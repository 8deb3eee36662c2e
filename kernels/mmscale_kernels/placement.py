"""Media placement: the rows of a pack, each from the text embeddings or from the media features.

Shapes: T tokens, M media rows, D width.
"""

from __future__ import annotations

import torch


def place_media(text_TD: torch.Tensor, media_MD: torch.Tensor, source_index_T: torch.Tensor) -> torch.Tensor:
    """The embedded pack [T, D]: row t is row `source_index_T[t]` of `cat([text_TD, media_MD])`.

    The torch reference, exact on any device and dtype, without a device-to-host sync. The gradient of a row is the sum of
    the gradients of the positions that took it: zero for text rows under media and for media rows that were cut off.

    Args:
        text_TD: text embeddings [T, D]; the rows under media slots are not used.
        media_MD: media features [M, D], M may be 0; cast to the type of `text_TD`.
        source_index_T: int64 [T], 0 to T + M - 1.

    Cost:
        one transient copy of both inputs, (T + M) x D.
    """
    rows = torch.cat([text_TD, media_MD.to(text_TD.dtype)])
    return rows.index_select(0, source_index_T)
