"""Media placement on a CUDA GPU: its kernels against torch's own operations, without a sync, and beyond 2^31 numbers."""

import pytest
import torch
from torch.nn import functional as F

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from mmscale.kernels.dispatch import use_triton
from mmscale.kernels.placement import embed_and_place, media_positions, place_media


def case(tokens, rows, used, width, vocab, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    source = torch.arange(tokens)
    at = torch.randperm(tokens, generator=g)[:used].sort().values
    source[at] = tokens + torch.randperm(rows, generator=g)[:used]
    ids = torch.randint(0, vocab, (tokens,), generator=g).cuda()
    on_gpu = torch.Generator("cuda").manual_seed(seed)
    sizes = (vocab, tokens, rows, tokens)
    tensors = [torch.randn(n, width, generator=on_gpu, device="cuda").to(dtype) for n in sizes]
    return ids, source.cuda(), media_positions(source, rows).cuda(), *tensors


def relative(got, want):
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-300)).item()


@pytest.fixture(autouse=True)
def _kernels_run(monkeypatch):
    monkeypatch.delenv("MMSCALE_KERNELS", raising=False)
    if not use_triton(torch.zeros(1, device="cuda")):
        pytest.skip("needs a GPU of compute capability 8.0 or more")


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize(
    "shape",
    [(4096, 2187, 2000, 4096, 1000), (333, 100, 97, 1152, 50), (37, 21, 13, 72, 50), (17, 0, 0, 5, 3), (0, 4, 0, 16, 9),
     (500, 300, 300, 3584, 4), (40, 9, 9, 5120, 20)],
)  # fmt: skip
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_kernels_equal_float64(shape, dtype, bound, padding_idx, seed):
    ids, source, positions, weight, text, media, grad = case(*shape, dtype, seed)
    for first, lookup in ((weight, True), (text, False)):
        mine = [x.clone().requires_grad_() for x in (first, media)]
        wide = [x.double().requires_grad_() for x in (first, media)]
        if lookup:
            out = embed_and_place(mine[0], ids, mine[1], source, positions, padding_idx)
            want = torch.cat([F.embedding(ids, wide[0], padding_idx), wide[1]])[source]
        else:
            out = place_media(*mine, source, positions)
            want = torch.cat(wide)[source]
        assert torch.equal(out, want.to(dtype))
        got = torch.autograd.grad(out, mine, grad)
        expected = torch.autograd.grad(want, wide, grad.double())
        assert relative(got[0], expected[0]) <= bound
        assert torch.equal(got[1], expected[1].to(dtype))


@pytest.mark.parametrize(("text", "media"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_types_are_rounded_as_torch_does(text, media, seed):
    _, source, positions, _, rows, features, grad = case(500, 300, 200, 512, 4, torch.float32, seed)
    rows, grad, features = rows.to(text), grad.to(text), features.to(media).requires_grad_()
    out = place_media(rows, features, source, positions)
    taken = positions >= 0
    at = positions[taken].long()
    assert torch.equal(out[at], features[taken].to(text))
    (got,) = torch.autograd.grad(out, features, grad)
    assert torch.equal(got[taken], grad[at].to(media)) and got[~taken].abs().max() == 0


def test_no_sync_forward_or_backward(seed):
    ids, source, positions, weight, text, media, grad = case(2048, 1100, 1000, 512, 500, torch.bfloat16, seed)
    leaves = [x.requires_grad_() for x in (weight, text, media)]

    def step():
        one = embed_and_place(weight, ids, media, source, positions)
        two = place_media(text, media, source, positions)
        return torch.autograd.grad((one, two), leaves, (grad, grad))

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_but_the_result_is_allocated(seed):
    ids, source, positions, weight, text, media, grad = case(8192, 4096, 4000, 2048, 100, torch.bfloat16, seed)
    media.requires_grad_()
    for make in (
        lambda: embed_and_place(weight, ids, media, source, positions),
        lambda: place_media(text, media, source, positions),
    ):
        make()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = make()
        assert torch.cuda.max_memory_allocated() - before <= out.numel() * out.element_size() + 2**20
        (got,) = torch.autograd.grad(out, media, grad)
        results = (out.numel() + got.numel()) * out.element_size()
        assert torch.cuda.max_memory_allocated() - before <= results + 2**20
        del out, got


@pytest.mark.parametrize("tokens", [2000, 20000])
def test_ten_runs_are_bit_identical(tokens, seed):
    ids, source, positions, weight, _, media, grad = case(tokens, 800, 800, 256, 7, torch.bfloat16, seed)
    weight.requires_grad_()
    runs = [
        torch.autograd.grad(embed_and_place(weight, ids, media, source, positions), weight, grad)[0] for _ in range(10)
    ]
    assert all(torch.equal(runs[0], run) for run in runs)


def test_more_than_2_to_the_31_numbers(seed):
    tokens, width = 2**19 + 8, 4100
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory")
    text = torch.zeros(tokens, width, dtype=torch.bfloat16, device="cuda").requires_grad_()
    media = torch.randn(4, width, device="cuda").to(torch.bfloat16).requires_grad_()
    source = torch.arange(tokens)
    source[[1, tokens - 2, tokens - 1]] = torch.tensor([2, 0, 3]) + tokens
    positions = media_positions(source, 4).cuda()
    out = place_media(text, media, source.cuda(), positions)
    assert out.numel() > 2**31
    assert torch.equal(out[[1, tokens - 2, tokens - 1]], media[[2, 0, 3]])
    grad = torch.ones_like(out)
    grad[tokens - 1] = 7
    text_grad, media_grad = torch.autograd.grad(out, (text, media), grad)
    assert media_grad[:, 0].tolist() == [1, 0, 1, 7]
    assert text_grad[-3:, -1].tolist() == [1, 0, 0]
