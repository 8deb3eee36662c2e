"""Media placement against masked_scatter and index_copy.

Shapes: T tokens, M media rows, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.measure import Bench, backward, relative
from mmscale.kernels.placement import embed_and_place, media_positions, place_media

SIZES = ((32_768, 4096, 152_064), (131_072, 4096, 152_064), (32_768, 2048, 128_256), (8192, 4096, 152_064))
TINY = ((40, 16, 50),)
SHARE = 0.6
"""Of the tokens that are media rows."""


@dataclass(frozen=True)
class Pack:
    """Inputs of one size; `at_M` and `is_media_T1` are what the peers need instead of the two indices."""

    text_TD: Tensor
    weight_VD: Tensor
    ids_T: Tensor
    media_MD: Tensor
    source_T: Tensor
    positions_M: Tensor
    at_M: Tensor
    is_media_T1: Tensor
    upstream_TD: Tensor

    def ours(self) -> Tensor:
        """Rows already looked up, media rows placed among them."""
        return place_media(self.text_TD, self.media_MD, self.source_T, self.positions_M)

    def ours_embedded(self, weight_VD: Tensor) -> Tensor:
        """Lookup and placement at once."""
        return embed_and_place(weight_VD, self.ids_T, self.media_MD, self.source_T, self.positions_M)

    def masked_scatter(self, text_TD: Tensor) -> Tensor:
        """As Hugging Face's models do it."""
        return text_TD.masked_scatter(self.is_media_T1.expand_as(text_TD), self.media_MD)

    def index_copy(self, text_TD: Tensor) -> Tensor:
        """The best single call of torch."""
        return text_TD.index_copy(0, self.at_M, self.media_MD)


def run(bench: Bench) -> None:
    """Checks and times each size; the first one is held against the targets."""
    for number, (num_tokens, width, vocab) in enumerate(TINY if bench.dry else SIZES):
        pack = make_pack(bench, num_tokens, width, vocab)
        check(bench, pack)
        _time(bench, pack, f"{num_tokens}x{width}", is_headline=number == 0)


def make_pack(bench: Bench, num_tokens: int, width: int, vocab: int) -> Pack:
    """A pack with media rows at random places, in order."""
    num_media = int(SHARE * num_tokens)
    at_M = torch.randperm(num_tokens)[:num_media].sort().values
    source_T = torch.arange(num_tokens)
    source_T[at_M] = num_tokens + torch.arange(num_media)
    positions_M = media_positions(source_T, num_media)
    is_media = source_T >= num_tokens
    return Pack(
        text_TD=bench.randn(num_tokens, width, grad=True),
        weight_VD=bench.randn(vocab, width, grad=True),
        ids_T=torch.randint(0, vocab, (num_tokens,)).to(bench.device),
        media_MD=bench.randn(num_media, width, grad=True),
        source_T=source_T.to(bench.device),
        positions_M=positions_M.to(bench.device),
        at_M=at_M.to(bench.device),
        is_media_T1=is_media[:, None].to(bench.device),
        upstream_TD=bench.randn(num_tokens, width),
    )


def check(bench: Bench, pack: Pack) -> None:
    """Forward and the gradient of the media must be exact, that of the table within rounding; nothing waits."""
    rows = torch.cat([pack.text_TD, pack.media_MD])[pack.source_T]
    assert torch.equal(pack.ours(), rows), "the placed rows are not the inputs'"
    text = F.embedding(pack.ids_T, pack.weight_VD)
    want = torch.where(pack.is_media_T1, rows, text)
    assert torch.equal(pack.ours_embedded(pack.weight_VD), want), (
        "the embedded rows are not the table's and the media's"
    )
    dtext, dmedia = torch.autograd.grad(pack.ours(), (pack.text_TD, pack.media_MD), pack.upstream_TD)
    assert torch.equal(dmedia, pack.upstream_TD[pack.at_M]), "wrong gradient of the media"
    assert torch.equal(dtext, pack.upstream_TD.masked_fill(pack.is_media_T1, 0)), "wrong gradient of the text"
    dweight, dmedia = torch.autograd.grad(
        pack.ours_embedded(pack.weight_VD), (pack.weight_VD, pack.media_MD), pack.upstream_TD
    )
    assert torch.equal(dmedia, pack.upstream_TD[pack.at_M]), "wrong gradient of the media"
    exact = torch.zeros(pack.weight_VD.shape, dtype=torch.float64, device=bench.device)
    exact.index_add_(0, pack.ids_T, pack.upstream_TD.masked_fill(pack.is_media_T1, 0).double())
    assert relative(dweight, exact) <= 4e-3, "wrong gradient of the table"
    bench.require_no_sync(backward(pack.ours, (pack.text_TD, pack.media_MD), pack.upstream_TD))
    frozen = pack.weight_VD.detach()
    bench.require_no_sync(backward(lambda: pack.ours_embedded(frozen), (pack.media_MD,), pack.upstream_TD))


def _time(bench: Bench, pack: Pack, size: str, *, is_headline: bool) -> None:
    item = pack.text_TD.element_size()
    rows, media = pack.text_TD.numel() * item, pack.media_MD.numel() * item
    frozen = pack.weight_VD.detach()

    def lookup(weight: Tensor) -> Tensor:
        return F.embedding(pack.ids_T, weight)

    forwards = {
        "masked_scatter": lambda: pack.masked_scatter(lookup(frozen)),
        "index_copy": lambda: pack.index_copy(lookup(frozen)),
        "compile": bench.compiled(lambda: pack.index_copy(lookup(frozen))),
        "ours": lambda: pack.ours_embedded(frozen),
    }
    fwd = bench.case(f"embed+place {size} fwd", forwards, 2 * rows)
    both = {name: backward(f, (pack.media_MD,), pack.upstream_TD) for name, f in forwards.items()}
    all_of_it = bench.case(f"embed+place {size} fwd+bwd, table frozen", both, 2 * rows + 2 * media)
    placed = {
        "masked_scatter": lambda: pack.masked_scatter(pack.text_TD),
        "index_copy": lambda: pack.index_copy(pack.text_TD),
        "ours": pack.ours,
    }
    leaves = (pack.text_TD, pack.media_MD)
    local = bench.case(
        f"place {size} fwd+bwd", {name: backward(f, leaves, pack.upstream_TD) for name, f in placed.items()}, 4 * rows
    )
    leaves = (pack.weight_VD, pack.media_MD)
    trained = {
        "masked_scatter": lambda: pack.masked_scatter(lookup(pack.weight_VD)),
        "index_copy": lambda: pack.index_copy(lookup(pack.weight_VD)),
        "ours": lambda: pack.ours_embedded(pack.weight_VD),
    }
    table = bench.case(
        f"embed+place {size} fwd+bwd, table trained",
        {name: backward(f, leaves, pack.upstream_TD) for name, f in trained.items()},
        2 * rows + 2 * media + pack.weight_VD.numel() * item,
    )
    if is_headline:
        if "ours" in fwd:
            bench.report.claim(f"embed+place {size} fwd", fwd["ours"].ms * 1e3, " us", "<= 180")
            bench.report.claim("extra", fwd["ours"].extra_mb, " MB", "<= 8")
        bench.claim_ratio("fwd+bwd", all_of_it, "masked_scatter", ">= 5")
        bench.claim_ratio("fwd+bwd", all_of_it, "index_copy", ">= 1.8")
        bench.claim_ratio("place fwd+bwd", local, "masked_scatter")
        bench.claim_ratio("place fwd+bwd", local, "index_copy")
        bench.claim_ratio("table trained", table, "index_copy")
        bench.report.claim("waits for the device", 0, "", "== 0")  # the check has raised otherwise
