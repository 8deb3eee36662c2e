"""Media placement against float64: both variants, Triton's interpreter and torch, forward and every gradient."""

import pytest
import torch
from torch.nn import functional as F

from mmscale.kernels import placement
from mmscale.kernels.placement import block_columns, embed_and_place, media_positions, place_media
from mmscale.model.llm.embedding import PlacingEmbedding

MODES = ("torch", "triton")
# tokens, media rows, of which used, width, rows of the table
SHAPES = [
    (37, 21, 13, 72, 50),
    (16, 16, 16, 96, 7),
    (1, 3, 0, 5, 3),
    (5, 5, 5, 24, 4),
    (19, 0, 0, 16, 30),
    (0, 4, 0, 16, 9),
    (0, 0, 0, 8, 2),
    (3, 2, 1, 4096, 6),
    (4, 2, 2, 600, 6),
]
BOUND = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float64: 1e-15}


@pytest.fixture(params=MODES)
def mode(request, monkeypatch):
    monkeypatch.setenv("MMSCALE_KERNELS", request.param)
    return request.param


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that kernels are to fill holds NaN."""

    def fill(make):
        return lambda *args, **kwargs: poison(make(*args, **kwargs))

    def poison(made):
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", fill(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", fill(torch.empty_like))


def case(shape, dtype, seed, media_dtype=None):
    tokens, rows, used, width, vocab = shape
    g = torch.Generator().manual_seed(seed)
    source = torch.arange(tokens)
    at = torch.randperm(tokens, generator=g)[:used]
    source[at] = tokens + torch.randperm(rows, generator=g)[:used]
    ids = torch.randint(0, vocab, (tokens,), generator=g)
    weight, text, media, grad = (
        torch.randn(n, width, generator=g).to(kind)
        for n, kind in ((vocab, dtype), (tokens, dtype), (rows, media_dtype or dtype), (tokens, dtype))
    )
    return ids, source, media_positions(source, rows), weight, text, media, grad


def exact(text, media, source):
    return torch.cat([text, media]).index_select(0, source)


def relative(got, want):
    assert got.shape == want.shape
    assert not got.isnan().any()
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-300)).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_and_gradients_equal_float64(shape, dtype, mode, seed, poisoned):
    _, source, positions, _, text, media, grad = case(shape, dtype, seed)
    mine = [x.clone().requires_grad_() for x in (text, media)]
    wide = [x.double().requires_grad_() for x in (text, media)]
    out, want = place_media(*mine, source, positions), exact(*wide, source)
    assert out.dtype == dtype and relative(out, want) == 0.0
    for got, expected in zip(
        torch.autograd.grad(out, mine, grad), torch.autograd.grad(want, wide, grad.double()), strict=True
    ):
        assert got.dtype == dtype and relative(got, expected) == 0.0, "only copies"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padding_idx", [None, 1])
def test_lookup_and_gradients_equal_float64(shape, dtype, padding_idx, mode, seed, poisoned):
    ids, source, positions, weight, _, media, grad = case(shape, dtype, seed)
    mine = [x.clone().requires_grad_() for x in (weight, media)]
    wide = [x.double().requires_grad_() for x in (weight, media)]
    out = embed_and_place(mine[0], ids, mine[1], source, positions, padding_idx)
    want = exact(F.embedding(ids, wide[0], padding_idx), wide[1], source)
    assert out.dtype == dtype and relative(out, want) == 0.0
    got, expected = torch.autograd.grad(out, mine, grad), torch.autograd.grad(want, wide, grad.double())
    assert got[0].dtype == dtype and relative(got[0], expected[0]) <= BOUND[dtype]
    assert relative(got[1], expected[1]) == 0.0


def test_many_equal_ids_are_added_in_fp32(mode, seed):
    g = torch.Generator().manual_seed(seed)
    weight = torch.zeros(3, 8, dtype=torch.bfloat16, requires_grad=True)
    ids, grad = torch.ones(2000 if mode == "torch" else 200, dtype=torch.int64), None
    grad = torch.rand(len(ids), 8, generator=g).to(torch.bfloat16)
    none = torch.zeros(0, dtype=torch.int32)
    out = embed_and_place(weight, ids, torch.zeros(0, 8), torch.arange(len(ids)), none)
    (got,) = torch.autograd.grad(out, weight, grad)
    assert relative(got[1], grad.double().sum(0)) <= BOUND[torch.bfloat16]


def same(got, want, mode):
    """Equal; up to the last bit in Triton's interpreter, which cuts fp32 to bf16 where a GPU rounds."""
    return torch.equal(got, want) if mode == "torch" else torch.allclose(got, want, rtol=2**-7, atol=0)


@pytest.mark.parametrize(("text", "media"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_media_of_another_type_is_cast_and_gets_its_gradient_in_its_own(text, media, mode, seed):
    ids, source, positions, weight, rows, features, grad = case((23, 9, 6, 40, 11), text, seed, media)
    features.requires_grad_()
    for out in (
        place_media(rows, features, source, positions),
        embed_and_place(weight, ids, features, source, positions),
    ):
        assert out.dtype == text
        taken = positions >= 0
        assert same(out[positions[taken].long()], features[taken].to(text), mode)
        (got,) = torch.autograd.grad(out, features, grad)
        want = torch.zeros_like(features)
        want[taken] = grad[positions[taken].long()].to(media)
        assert got.dtype == media and same(got, want, mode)


def test_ids_and_gradients_of_rows_under_media_are_not_used(mode, seed):
    ids, source, positions, weight, text, media, grad = case((30, 12, 12, 16, 20), torch.float32, seed)
    under = source >= 30
    for tensor in (weight, text, media):
        tensor.requires_grad_()
    results = []
    for token in (3, 4):
        ids = torch.where(under, token, ids)
        out = embed_and_place(weight, ids, media, source, positions)
        results.append((out, *torch.autograd.grad(out, (weight, media), grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with torch.no_grad():
        text[under] = torch.nan
    grad = torch.where(under[:, None], torch.inf, grad)
    out = place_media(text, media, source, positions)
    text_grad, _ = torch.autograd.grad(out, (text, media), grad)
    assert not out.isnan().any()
    assert torch.equal(text_grad[under], torch.zeros(12, 16)) and torch.equal(text_grad[~under], grad[~under])


def test_frozen_inputs_cost_nothing(mode, seed, monkeypatch):
    """A frozen table gets no gradient made for it, nor do frozen media."""
    ids, source, positions, weight, text, media, grad = case((12, 6, 4, 8, 5), torch.float32, seed)
    made = []
    for name in ("_embedding_grad", "_media_rows_grad", "_text_rows_grad"):
        whole = getattr(placement, name)
        monkeypatch.setattr(placement, name, lambda *a, whole=whole, name=name: made.append(name) or whole(*a))
    assert not embed_and_place(weight, ids, media, source, positions).requires_grad
    for wanted in (weight, media, text):
        wanted.requires_grad_()
        make = place_media if wanted is text else embed_and_place
        args = (text, media) if wanted is text else (weight, ids, media)
        make(*args, source, positions).backward(grad)
        wanted.requires_grad_(False)
    assert made == ["_embedding_grad", "_media_rows_grad", "_text_rows_grad"]


def test_strided_inputs_and_gradients(mode, seed):
    ids, source, positions, weight, text, media, grad = case((14, 9, 5, 12, 8), torch.float32, seed)
    strided = [torch.stack([x, x], -1)[..., 0].t().contiguous().t() for x in (weight, text, media, grad)]
    assert not any(x.is_contiguous() for x in strided)
    ids2, source2, positions2 = (torch.stack([x, x], -1)[:, 0] for x in (ids, source, positions))
    results = []
    for w, t, m, g, i, s, p in (
        (weight, text, media, grad, ids, source, positions),
        (*strided, ids2, source2, positions2),
    ):
        w, t, m = (x.detach().requires_grad_() for x in (w, t, m))
        one, two = embed_and_place(w, i, m, s, p), place_media(t, m, s, p)
        results.append((one, two, *torch.autograd.grad(one, (w, m), g), *torch.autograd.grad(two, (t, m), g)))
        constant = torch.autograd.grad(place_media(t, m, s, p).sum(), (t, m))  # a gradient without strides
        assert constant[0].sum() + constant[1].sum() == t.numel()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_registration_is_right(mode, seed):
    ids, source, positions, weight, text, media, grad = case((9, 6, 4, 8, 5), torch.float32, seed)
    for tensor in (weight, text, media):
        tensor.requires_grad_()
    ops = torch.ops.mmscale
    torch.library.opcheck(ops.embed_and_place, (weight, ids, media, source, positions, None))
    torch.library.opcheck(ops.embed_and_place, (weight, ids, media, source, positions, 2))
    torch.library.opcheck(ops.place_media, (text, media, source, positions))
    torch.library.opcheck(ops.media_rows_grad, (grad, positions, torch.bfloat16))
    torch.library.opcheck(ops.text_rows_grad, (grad, source))
    torch.library.opcheck(ops.embedding_grad, (grad, ids, source, 5, None))


def test_compiled_whole_equals_eager(mode, seed):
    ids, source, positions, weight, text, media, grad = case((9, 6, 4, 8, 5), torch.float32, seed)
    leaves = [x.requires_grad_() for x in (weight, text, media)]

    def both(ids, source, positions, weight, text, media):
        return embed_and_place(weight, ids, media, source, positions) * 2 + place_media(text, media, source, positions)

    args = (ids, source, positions, *leaves)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    want, got = both(*args), compiled(*args)
    assert torch.equal(want, got)
    for a, b in zip(*(torch.autograd.grad(out, leaves, grad) for out in (want, got)), strict=True):
        assert torch.equal(a, b)


def test_runs_are_bit_identical(mode, seed):
    ids, source, positions, weight, _, media, grad = case((60, 20, 20, 24, 4), torch.float32, seed)
    weight.requires_grad_()
    grads = [
        torch.autograd.grad(embed_and_place(weight, ids, media, source, positions), weight, grad) for _ in range(5)
    ]
    assert all(torch.equal(grads[0][0], other[0]) for other in grads)


def test_second_derivatives_are_refused(mode, seed):
    ids, source, positions, weight, text, media, _ = case((9, 6, 4, 8, 5), torch.float32, seed)
    for tensor in (weight, text, media):
        tensor.requires_grad_()
    for out, leaves in (
        (embed_and_place(weight, ids, media, source, positions), (weight, media)),
        (place_media(text, media, source, positions), (text, media)),
    ):
        for leaf in leaves:
            (first,) = torch.autograd.grad((out**2).sum(), leaf, create_graph=True)
            with pytest.raises(RuntimeError, match="second"):
                first.sum().backward()


def test_int32_indices(mode, seed):
    ids, source, positions, weight, text, media, _ = case((13, 8, 5, 16, 5), torch.float32, seed)
    small = (source.int(), positions.long())
    assert torch.equal(place_media(text, media, *small), place_media(text, media, source, positions))
    want = embed_and_place(weight, ids, media, source, positions)
    assert torch.equal(embed_and_place(weight, ids.int(), media, *small), want)


def test_a_checkpointed_region_recomputes_the_same(mode, seed):
    from torch.utils.checkpoint import checkpoint

    ids, source, positions, weight, _, media, grad = case((13, 8, 5, 16, 5), torch.float32, seed)
    table = PlacingEmbedding.from_pretrained(weight, freeze=False)
    media.requires_grad_()
    grads = []
    for run in (lambda *a: checkpoint(table, *a, use_reentrant=False), table):
        out = run(ids, media, source, positions)
        grads.append(torch.autograd.grad((out**3).sum(), (table.weight, media)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_shapes_that_do_not_fit_are_refused(seed):
    ids, source, positions, weight, text, media, _ = case((9, 6, 4, 8, 5), torch.float32, seed)
    with pytest.raises(ValueError, match="one width"):
        place_media(text, media[:, :4], source, positions)
    with pytest.raises(ValueError, match="one position for each media row"):
        place_media(text, media[:5], source, positions)
    with pytest.raises(ValueError, match="each of the 9 positions"):
        place_media(text[:8], media, source, positions)
    with pytest.raises(ValueError, match="int32 or int64"):
        place_media(text, media, source.float(), positions)
    with pytest.raises(ValueError, match="ids_T"):
        embed_and_place(weight, ids[:3], media, source, positions)


def test_positions_are_the_inverse(seed):
    g = torch.Generator().manual_seed(seed)
    for _ in range(50):
        tokens, rows = (int(torch.randint(0, 40, (), generator=g)) for _ in range(2))
        used = int(torch.randint(0, min(tokens, rows) + 1, (), generator=g))
        _, source, positions, *_ = case((tokens, rows, used, 1, 1), torch.float32, seed)
        where = {s - tokens: t for t, s in enumerate(source.tolist()) if s >= tokens}
        assert positions.tolist() == [where.get(row, -1) for row in range(rows)]
        assert positions.dtype == torch.int32 and len(where) == used


def test_impossible_indices_are_refused():
    with pytest.raises(ValueError, match="rows 0 to 1 are expected, found 2"):
        media_positions(torch.tensor([0, 5, 2]), 2)
    with pytest.raises(ValueError, match="row 1 at two"):
        media_positions(torch.tensor([4, 1, 4]), 2)


@pytest.mark.parametrize("width", [1, 5, 72, 512, 600, 1152, 2560, 3584, 4096, 5120, 8192, 16384])
def test_blocks_cover_a_row_and_idle_little(width):
    block = block_columns(width)
    blocks = -(-width // block)
    assert block & (block - 1) == 0 and block <= 4096
    assert (blocks - 1) * block < width <= blocks * block
    assert width <= 512 or block == 512 or blocks * block <= 1.25 * width
