"""The torch references: placement against a plain loop, the summed loss against its formula; both with gradients."""

import pytest
import torch

from mmscale.kernels.cross_entropy import cross_entropy_sum
from mmscale.kernels.placement import place_media


@pytest.mark.parametrize(("tokens", "rows"), [(0, 0), (1, 0), (1, 3), (13, 7), (40, 40)])
@pytest.mark.parametrize("trial", range(3))
def test_placement_and_its_gradients_equal_a_loop(tokens, rows, trial, seed):
    g = torch.Generator().manual_seed(seed + trial)
    text = torch.randn(tokens, 5, generator=g, dtype=torch.float64, requires_grad=True)
    media = torch.randn(rows, 5, generator=g, dtype=torch.float64, requires_grad=True)
    order = torch.randperm(rows, generator=g)
    take = torch.rand(tokens, generator=g) < 0.5
    source = torch.arange(tokens)
    for slot, row in zip(take.nonzero().flatten().tolist(), order.tolist(), strict=False):
        source[slot] = tokens + row
    out = place_media(text, media, source)
    upstream = torch.randn(out.shape, generator=g, dtype=torch.float64)
    grads = torch.autograd.grad(out, (text, media), upstream)
    text_grad, media_grad = torch.zeros_like(text), torch.zeros_like(media)
    for t, s in enumerate(source.tolist()):
        expected = text[s] if s < tokens else media[s - tokens]
        assert torch.equal(out[t], expected)
        (text_grad if s < tokens else media_grad)[s if s < tokens else s - tokens] += upstream[t]
    assert torch.equal(grads[0], text_grad)
    assert torch.equal(grads[1], media_grad)


def test_placement_keeps_the_type_of_the_text():
    out = place_media(torch.zeros(2, 3, dtype=torch.bfloat16), torch.ones(1, 3), torch.tensor([2, 1]))
    assert out.dtype == torch.bfloat16
    assert out.sum(-1).tolist() == [3, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 9])
def test_loss_and_gradient_equal_float64(dtype, rows, seed):
    g = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(rows, 31, generator=g)).to(dtype).requires_grad_()
    labels = torch.randint(0, 31, (rows,), generator=g)
    loss = cross_entropy_sum(logits, labels)
    (grad,) = torch.autograd.grad(loss, logits)
    exact = logits.detach().double()
    expected = (exact.logsumexp(-1) - exact[torch.arange(rows), labels]).sum()
    expected_grad = exact.softmax(-1)
    expected_grad[torch.arange(rows), labels] -= 1
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    limit = 1e-6 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(grad.double(), expected_grad, rtol=limit, atol=limit)


def test_no_rows_give_exactly_zero_with_a_gradient():
    head = torch.nn.Linear(4, 7)
    loss = cross_entropy_sum(head(torch.zeros(0, 4)), torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(head.weight.grad, torch.zeros(7, 4))
