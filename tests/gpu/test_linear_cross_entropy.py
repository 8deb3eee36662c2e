"""The head's chunked loss on a GPU: exact, within its budget of memory, without waiting for the device."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from test_linear_cross_entropy import LIMITS, errors, inputs, room_for

from mmscale.kernels.linear_cross_entropy import linear_cross_entropy_sum, take_rows


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("sizes", [(130, 24, 97), (1000, 64, 5003), (515, 128, 8192)])
def test_equals_float64(sizes, dtype, seed):
    for chunk in (2000, 128, 64):
        found = errors(seed, *sizes, dtype, chunk, device="cuda", z_loss=1e-3)
        assert max(found) <= LIMITS[dtype] * (10 if dtype == torch.float32 else 1), (chunk, found)


@pytest.mark.parametrize("mode", ["bf16", "autocast", "fp32", "frozen head"])
def test_memory_stays_within_the_budget_at_any_length(mode, seed):
    width, vocab, budget = 512, 50_000, 200_000_000
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    for rows in (1000, 20_000):
        hidden, weight, bias, labels = inputs(seed, rows, width, vocab, dtype, "cuda")
        weight.requires_grad_(mode != "frozen head")
        bias.requires_grad_(mode != "frozen head")
        linear_cross_entropy_sum(hidden[:8], weight.detach(), labels[:8])  # workspaces of the matrix products
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16, enabled=mode == "autocast"):
            loss = linear_cross_entropy_sum(hidden, weight, labels, bias_V=bias, memory_bytes=budget)
        loss.backward()
        peak = torch.cuda.max_memory_allocated() - before
        gradients = sum(x.nbytes for x in (hidden, weight, bias) if x.requires_grad)
        gradients += (weight.numel() + bias.numel()) * 4 if mode == "bf16" else 0
        copy = weight.numel() * 2 if mode == "autocast" else 0
        print(f"{mode} {rows} rows: peak {peak}, gradients {gradients}, copy of the weight {copy}")
        assert peak - gradients - copy <= budget * 1.02, "blocks of the allocator are rounded up"


def test_nothing_waits_for_the_device_and_runs_repeat_to_the_bit(seed):
    hidden, weight, bias, labels = inputs(seed, 900, 64, 1000, torch.bfloat16, "cuda")
    rows = torch.arange(0, 900, 3, device="cuda")
    memory = room_for(128, 64, 1000, torch.bfloat16)

    def step():
        loss = linear_cross_entropy_sum(
            take_rows(hidden, rows), weight, labels[rows], bias_V=bias, z_loss=1e-4, memory_bytes=memory
        )
        return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight, bias))]

    first = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [step() for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for some in again for a, b in zip(first, some, strict=True))
