"""Kernels where they are used: a whole step with and without Triton, through Inductor, without waiting, at sizes of real packs."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from benchmarks.gpu.measure import relative
from benchmarks.gpu.model import TINY, documents, make_model, make_pack, run_config
from mmscale.kernels.downsample_norm import downsample_norm
from mmscale.kernels.linear_cross_entropy import linear_cross_entropy_sum, take_rows
from mmscale.kernels.placement import embed_and_place, media_positions, place_media
from mmscale.kernels.token_merge import merge, plan_merges, unmerge

DEVICE = torch.device("cuda")
BF16 = torch.bfloat16


@pytest.fixture
def model_and_pack(seed):
    """A tiny model with a tower and a pack of several documents, on the GPU."""
    torch.manual_seed(seed)
    config = run_config(TINY, "bf16")
    model = make_model(TINY, config, DEVICE)
    specs = model.config.specs
    return model, make_pack(documents(TINY, specs, 160, seed), specs, DEVICE).to(DEVICE)


def loss_and_gradients(model, pack):
    model.zero_grad(set_to_none=True)
    with torch.autocast(DEVICE.type, BF16):
        loss = model(pack)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_step_with_triton_equals_one_without(model_and_pack, monkeypatch):
    """Relative to the gradients of fp32, both err alike: bf16 rounds, and not one implementation more than the other."""
    model, pack = model_and_pack
    model.float()
    monkeypatch.setenv("MMSCALE_KERNELS", "torch")
    with torch.autocast(DEVICE.type, enabled=False):
        loss = model(pack)
    loss.backward()
    exact = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    errors = {}
    for mode in ("torch", "triton"):
        monkeypatch.setenv("MMSCALE_KERNELS", mode)
        own, grads = loss_and_gradients(model, pack)
        assert abs(own - loss) / loss <= 5e-3
        errors[mode] = relative(torch.cat([g.flatten() for g in grads.values()]), exact)
    assert errors["torch"] <= 5e-2, errors
    assert errors["triton"] <= 2 * errors["torch"], errors


def test_a_loss_has_the_same_bits_twice(model_and_pack):
    """Gradients need not: attention's backward pass adds those of the queries up in no fixed order."""
    model, pack = model_and_pack
    assert torch.equal(loss_and_gradients(model, pack)[0], loss_and_gradients(model, pack)[0])


def test_nothing_waits_for_the_device(model_and_pack):
    model, pack = model_and_pack
    loss_and_gradients(model, pack)  # libraries load, kernels are compiled
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_and_gradients(model, pack)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make_placement(num_tokens=1000, width=256, vocab=500):
    num_media = num_tokens // 2
    at = torch.randperm(num_tokens)[:num_media].sort().values
    source = torch.arange(num_tokens)
    source[at] = num_tokens + torch.arange(num_media)
    positions = media_positions(source, num_media).to(DEVICE)
    ids = torch.randint(0, vocab, (num_tokens,), device=DEVICE)
    return ids, source.to(DEVICE), positions, num_media


def operations():
    """name -> (function of leaves, leaves): every operation with a Triton kernel, in bf16."""

    def leaf(*shape):
        return torch.randn(*shape, device=DEVICE, dtype=BF16).requires_grad_()

    ids, source, positions, num_media = make_placement()
    lengths = torch.tensor([0, 300, 301, 628, 700], dtype=torch.int32, device=DEVICE)
    merges = torch.tensor([100, 3, 163, 0], dtype=torch.int32, device=DEVICE)
    labels = torch.randint(0, 1000, (64,), device=DEVICE)
    rows = torch.randperm(200, device=DEVICE)[:64].sort().values

    def merged(x):
        plan = plan_merges(x, lengths, merges, 327, 700 - 263)
        out, sizes = merge(x, plan)
        return unmerge(out, plan) + sizes.sum()

    return {
        "place": (lambda text, media: place_media(text, media, source, positions), (leaf(1000, 256), leaf(num_media, 256))),
        "embed": (
            lambda table, media: embed_and_place(table, ids, media, source, positions),
            (leaf(500, 256), leaf(num_media, 256)),
        ),
        "fold": (
            lambda x, w, b: downsample_norm(x, w, b, (7, 9), 2),
            (leaf(3, 63, 128), leaf(512), leaf(512)),
        ),
        "merge": (merged, (leaf(700, 96),)),
        "loss": (
            lambda x, w: linear_cross_entropy_sum(take_rows(x, rows), w, labels),
            (leaf(200, 128), leaf(1000, 128)),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["place", "embed", "fold", "merge", "loss"])
def test_inductor_gives_the_same(name, seed):
    torch.manual_seed(seed)
    function, leaves = operations()[name]
    eager = function(*leaves)
    upstream = torch.randn_like(eager)
    want = (eager.detach(), *torch.autograd.grad(eager, leaves, upstream))
    compiled = torch.compile(function, fullgraph=True)(*leaves)
    got = (compiled.detach(), *torch.autograd.grad(compiled, leaves, upstream))
    assert all(relative(a, b) <= 4e-3 for a, b in zip(got, want, strict=True))


def test_offsets_beyond_32_bits():
    """A pack of more than 2^31 numbers: the last rows are where a narrow offset would have wrapped around."""
    num_tokens, width = 600_000, 4096
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free memory")
    ids, source, positions, num_media = make_placement(num_tokens, width)
    table = torch.randn(500, width, device=DEVICE, dtype=BF16)
    media = torch.randn(num_media, width, device=DEVICE, dtype=BF16, requires_grad=True)
    out = embed_and_place(table, ids, media, source, positions)
    for at in (0, num_tokens // 2, num_tokens - 1):
        row = int(source[at])
        want = media[row - num_tokens] if row >= num_tokens else table[ids[at]]
        assert torch.equal(out[at], want)
    (dmedia,) = torch.autograd.grad(out, media, out.detach())
    assert torch.equal(dmedia[-1], media[-1]) and torch.equal(dmedia[0], media[0])


def test_a_merge_plan_is_the_same_each_time(seed):
    torch.manual_seed(seed)
    x = torch.randn(8 * 729, 1152, device=DEVICE, dtype=BF16)
    cu_seqlens = torch.arange(0, 8 * 729 + 1, 729, dtype=torch.int32, device=DEVICE)
    merges = torch.full((8,), 364, dtype=torch.int32, device=DEVICE)
    first = plan_merges(x, cu_seqlens, merges, 729, 8 * 365)
    for _ in range(10):
        assert all(map(torch.equal, first, plan_merges(x, cu_seqlens, merges, 729, 8 * 365)))
