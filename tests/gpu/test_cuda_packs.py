"""Packs on one CUDA GPU: the attention of a model against float64, and whole training steps against the CPU."""

import math

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from types import SimpleNamespace

from mmscale.config.schema import Config
from mmscale.config.specs import media_specs
from mmscale.model.batch import ModelBatch
from mmscale.model.composite import build_model
from mmscale.model.llm.attention import WholePack, packed_attention
from mmscale.streaming.collate import collate
from mmscale.types import EncodedMedia, EncodedSample

LENGTHS = (1, 200, 63, 7, 129)


def reference(q, k, v):
    """Causal attention of each document alone, in float64."""
    parts = []
    groups = q.shape[1] // k.shape[1]
    for a, b, c in zip(
        *(x.split(LENGTHS, dim=2) for x in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))),
        strict=True,
    ):
        scores = a @ b.transpose(-1, -2) / math.sqrt(a.shape[-1])
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=a.device).triu(1)
        parts.append(scores.masked_fill(mask, -math.inf).softmax(-1) @ c)
    return torch.cat(parts, dim=2).transpose(1, 2)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1.5e-2), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
def test_packed_attention_forward_and_gradients(seed, dtype, bound, kv_heads):
    generator = torch.Generator("cuda").manual_seed(seed)
    total = sum(LENGTHS)
    q, k, v, g = (
        torch.randn(1, h, total, 64, device="cuda", generator=generator).to(dtype) for h in (8, kv_heads, kv_heads, 8)
    )
    mine, exact = [[x.clone().to(t).requires_grad_() for x in (q, k, v)] for t in (dtype, torch.float64)]
    out, _ = packed_attention(SimpleNamespace(training=True), *mine, None, pack=WholePack(LENGTHS))
    want = reference(*exact)
    grad = g.transpose(1, 2)
    out.backward(grad)
    want.backward(grad.double())
    pairs = [(out, want), *((a.grad, b.grad) for a, b in zip(mine, exact, strict=True))]
    for got, expected in pairs:
        assert ((got.double() - expected).norm() / expected.norm()).item() <= bound


def tiny_config(dtype):
    llm = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    return Config.model_validate({
        "model": {"llm": {"config": llm}, "vision": {"config": vision, "select_layer": -1}, "tokenizer": {"path": "unused"}},
        "data": {"sources": {"a": {"path": "unused"}}, "seq_len": 256},
        "train": {"steps": 5, "global_batch": 1, "lr": 1e-3, "dtype": dtype,
                  "parts": {"llm": {"tune": "full"}, "vision": {"tune": "full"}, "vision_connector": {"tune": "full"}}},
        "run": {"dir": "unused"},
    })  # fmt: skip


def make_pack(specs, seed):
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for i, length in enumerate((40, 1, 90)):
        media = ()
        if i != 1:
            pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=generator)
            media = (EncodedMedia("image", pixels, 3, specs.image.tokens),)
        targets = torch.zeros(length, dtype=torch.bool)
        targets[length // 2 + 16 :] = True
        documents.append(EncodedSample(str(i), torch.randint(0, 250, (length,), generator=generator), targets, media))
    return collate(documents, specs)


def test_a_pinned_pack_reaches_the_gpu_without_a_sync(seed):
    config = tiny_config("bf16")
    batch = ModelBatch.of(make_pack(media_specs(config.model, config.data), seed)).pinned()
    assert batch.input_ids.is_pinned() and all(data.is_pinned() for data in batch.inputs.values())
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = batch.to("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(moved.labels.cpu(), batch.labels) and torch.equal(
        moved.inputs["image"].cpu(), batch.inputs["image"]
    )


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-4), ("bf16", 3e-2)])
def test_a_step_on_the_gpu_equals_one_on_the_cpu(seed, dtype, bound):
    losses, grads = [], []
    for device, precision in (("cpu", "fp32"), ("cuda", dtype)):
        config = tiny_config(precision)
        specs = media_specs(config.model, config.data)
        model = build_model(config, 256, specs).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(make_pack(specs, seed).to(device))
        loss.backward()
        losses.append(loss.item())
        grads.append(torch.cat([p.grad.flatten().cpu().double() for p in model.parameters() if p.grad is not None]))
    assert abs(losses[0] - losses[1]) / losses[0] <= bound
    assert ((grads[0] - grads[1]).norm() / grads[0].norm()).item() <= 10 * bound
