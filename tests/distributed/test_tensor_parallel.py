"""Tensor-parallel models against the same model undivided: loss, every gradient, layouts, marks, bytes, refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from grids import grid
from tiny_multimodal import tiny_config, tiny_model, tiny_pack
from torch.nn import functional as F

from mmscale.config.schema import Config, ParallelConfig
from mmscale.errors import ConfigError
from mmscale.kernels.linear_cross_entropy import linear_cross_entropy_sum, reference
from mmscale.model.composite import MultimodalLM
from mmscale.parallel.layout import ShardLayout, chunks, whole_layout
from mmscale.parallel.megatron import make_grid
from mmscale.parallel.mesh import Mesh
from mmscale.parallel.meter import CommMeter
from mmscale.parallel.tensor.regions import TensorComm, enter
from mmscale.parallel.tensor.shard import shard_tensor
from mmscale.train.optim import param_groups
from mmscale.types import IGNORE, PackedBatch

BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
MOE = {"num_local_experts": 3, "num_experts_per_tok": 2}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama, all biases, 2 kv heads": {
        **{"model_type": "llama", "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
    },
    "qwen2": {"model_type": "qwen2"},
    "qwen2, tied, 1 kv head": {"model_type": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen3, 2 kv heads": {"model_type": "qwen3", "head_dim": 16, "num_key_value_heads": 2},
    "mistral, window": {"model_type": "mistral", "sliding_window": 7},
    "gemma, tied, 1 kv head": {
        **{"model_type": "gemma", "head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": True},
    },
    "phi, qk norms": {"model_type": "phi", "qk_layernorm": True, "num_key_value_heads": 2},
    "phi3": {"model_type": "phi3", "sliding_window": 9},
    "stablelm, 2 kv heads": {"model_type": "stablelm", "use_qkv_bias": True, "num_key_value_heads": 2},
    "stablelm, parallel": {"model_type": "stablelm", "use_parallel_residual": True},
    "mixtral": {"model_type": "mixtral", "sliding_window": None, **MOE},
    "gpt_oss": {
        **{"model_type": "gpt_oss", "head_dim": 8, "sliding_window": 9, "num_key_value_heads": 2, **MOE},
        **{"layer_types": ["sliding_attention", "full_attention"]},
    },
}
FOUR = ("llama, all biases, 2 kv heads", "qwen2, tied, 1 kv head", "qwen3, 2 kv heads", "phi3", "mixtral", "gpt_oss")
SHARES = ("llama, all biases, 2 kv heads", "phi3")
EXACT = ("phi, qk norms", "stablelm, 2 kv heads")


def config_of(case: str) -> Config:
    config = tiny_config("llama").model_dump()
    config["model"]["llm"]["config"] = {**BASE, **CASES[case]}
    config["train"]["z_loss"] = 1e-3
    return Config.model_validate(config)


def divided(mesh: Mesh, whole: MultimodalLM, **keys: Any) -> tuple[MultimodalLM, dict[str, ShardLayout]]:
    """A divided copy of a model that is the same on every rank."""
    model = copy.deepcopy(whole)
    return model, shard_tensor(model, mesh, ParallelConfig(tensor=mesh.tensor.size, **keys))


def shaken(model: MultimodalLM, seed: int) -> MultimodalLM:
    """The model with every parameter drawn anew: norms, biases and sinks start as constants, which hides mistakes."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=g).to(param.dtype), alpha=0.05)
    return model


def assembled(local: torch.Tensor, layout: ShardLayout | None, mesh: Mesh) -> torch.Tensor:
    """The whole tensor from the parts of all tensor ranks; every element comes exactly once."""
    own = local.detach().clone()
    mine = list(chunks(own, layout or whole_layout(own.shape))) if layout or mesh.tensor.rank == 0 else []
    parts: list[Any] = [None] * mesh.tensor.size
    dist.all_gather_object(parts, mine, group=mesh.tensor.group)
    shape = layout.whole if layout else own.shape
    whole, times = torch.full(shape, torch.nan, dtype=own.dtype), torch.zeros(shape, dtype=torch.int64)
    for part in (part for some in parts for part in some):
        where = tuple(slice(o, o + n) for o, n in zip(part.offsets, part.value.shape, strict=True))
        whole[where] = part.value
        times[where] += 1
    assert times.eq(1).all(), "an element was written twice or never"
    return whole


def gradient_errors(
    whole: MultimodalLM, model: MultimodalLM, layouts: dict[str, ShardLayout], mesh: Mesh
) -> dict[str, float]:
    """Relative L2 error of each gradient."""
    want = {name: param.grad for name, param in whole.named_parameters()}
    assert list(want) == [name for name, _ in model.named_parameters()], "names or their order changed"
    errors = {}
    for name, param in model.named_parameters():
        grad, true = param.grad, want[name]
        if true is None:  # a part of a tower that the chosen layer does not need
            assert grad is None and not name.startswith("llm."), name
            continue
        assert grad is not None, name
        errors[name] = float((assembled(grad, layouts.get(name), mesh) - true).norm()) / scale_of(name, want)
    return errors


def scale_of(name: str, grads: Mapping[str, torch.Tensor | None]) -> float:
    """The size that an error is relative to: that of the gradient, or of its layer's weight for a bias, whose gradient is a sum
    over tokens that may cancel (softmax does not even see a key bias that is not rotated)."""
    names = (name, name.removesuffix("bias") + "weight")
    return max(float(grad.norm()) for n in names if (grad := grads.get(n)) is not None)


def run_case(pool: Mesh, tensor: int, case: str, seed: int, dtype: torch.dtype = torch.float32, **keys: Any) -> Any:
    mesh = grid(pool, tensor=tensor)
    whole, specs = tiny_model(config_of(case), dtype)
    shaken(whole, seed)
    model, layouts = divided(mesh, whole, **keys)
    before = dict(whole.named_parameters())
    for name, param in model.named_parameters():
        assert torch.equal(assembled(param, layouts.get(name), mesh), before[name]), name
    assert list(model.state_dict()) == list(whole.state_dict()), "a state dict holds something new"
    pack = tiny_pack(specs, seed)
    want, got = whole(pack), model(pack)
    want.backward()
    got.backward()
    different = [n for n, p in model.named_parameters() if n not in layouts and not same_on_all(p.grad, mesh)]
    return abs(got.item() - want.item()) / want.item(), gradient_errors(whole, model, layouts, mesh), different


def same_on_all(value: torch.Tensor | None, mesh: Mesh) -> bool:
    if value is None:
        return True
    others = [torch.empty_like(value) for _ in range(mesh.tensor.size)]
    dist.all_gather(others, value.contiguous(), group=mesh.tensor.group)
    return all(torch.equal(value, other) for other in others)


def run_cases(pool: Mesh, tensor: int, cases: tuple[str, ...], seed: int, dtype: torch.dtype) -> Any:
    results = {case: run_case(pool, tensor, case, seed, dtype) for case in cases}
    return results | {f"{c}, shares": run_case(pool, tensor, c, seed, dtype, tensor_sequence=True) for c in SHARES}


def assert_equal(results: list[Any], loss_limit: float, limits: Callable[[str], float]) -> None:
    for result in results:
        for case, (loss, errors, different) in result.items():
            worst = max(errors, key=errors.__getitem__)
            assert loss <= loss_limit, (case, loss)
            assert errors[worst] <= limits(case), (case, worst, errors[worst])
            assert not different, (case, "gradients of whole parameters differ between ranks", different)


@pytest.mark.parametrize("tensor", [2, 4])
def test_every_family_equals_the_undivided_model(ranks, tensor: int, seed: int) -> None:
    """In fp32; `shares`: with the tokens divided between the layers."""
    cases = tuple(case for case in CASES if tensor == 2 or case in FOUR)
    assert_equal(ranks(tensor).run(run_cases, tensor, cases, seed, torch.float32), 1e-6, lambda _: 3e-6)


@pytest.mark.parametrize("tensor", [2, 4])
def test_nothing_but_rounding_differs(ranks, tensor: int, seed: int) -> None:
    """In float64. RMS norms round to fp32 inside, layer norms do not; the kernels of experts have no float64."""
    dense = tuple(case for case in CASES if not case.startswith(("mixtral", "gpt_oss")))
    cases = dense if tensor == 2 else EXACT
    results = ranks(tensor).run(run_cases, tensor, cases, seed, torch.float64)
    assert_equal(results, 1e-7, lambda case: 1e-12 if case in EXACT else 1e-6)


LOSS_CASES = [
    # rows, type, size of the logits, rows of a chunk, z-loss, bias
    (7, torch.float32, 1.0, 100, 0.0, False),
    (45, torch.float32, 2.0, 8, 1e-2, True),
    (5, torch.float64, 300.0, 100, 0.0, True),
    (33, torch.float64, 1.0, 8, 1e-2, True),
    (160, torch.bfloat16, 2.0, 128, 1e-3, False),
    (0, torch.float32, 1.0, 100, 1e-3, True),
]


def loss_cases(pool: Mesh, seed: int) -> list[str]:
    """What is wrong with the loss over a divided vocabulary, against the undivided one in float64."""
    mesh = grid(pool, tensor=2)
    make_grid(2, 1, 60)  # megatron-core's loss asks its global state for the group
    return [text for case in LOSS_CASES for text in loss_case(mesh, seed, *case)]


def loss_case(
    mesh: Mesh, seed: int, rows: int, dtype: torch.dtype, size: float, chunk: int, z_loss: float, has_bias: bool
) -> list[str]:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    width, vocab, rank = 6, 24, mesh.tensor.rank
    g = torch.Generator().manual_seed(seed + rows)
    hidden, weight, bias = (
        torch.randn(shape, generator=g).mul(s).to(dtype)
        for shape, s in (((rows, width), 1.0), ((vocab, width), size * width**-0.5), ((vocab,), 1.0))
    )
    labels = torch.randint(0, vocab, (rows,), generator=g)
    labels[:2] = torch.tensor([3, 20])[:rows]  # one in each share
    exact = torch.promote_types(dtype, torch.float32)
    logit_bytes = exact.itemsize + (dtype.itemsize if dtype != exact else 0)
    memory = chunk * (vocab // 2 * logit_bytes + 2 * width * dtype.itemsize + 128)
    meter = CommMeter()
    own = [hidden.clone(), weight.chunk(2)[rank].clone(), bias.chunk(2)[rank].clone()]
    own = [x.requires_grad_() for x in own]
    comm = comm_of(mesh, meter)
    got = linear_cross_entropy_sum(
        *(enter(own[0], comm), own[1], labels),
        bias_V=own[2] if has_bias else None, z_loss=z_loss, memory_bytes=memory, ranks=comm,
    )  # fmt: skip
    sent = dict(meter.num_calls), dict(meter.num_bytes)
    (got * 0.5).backward()
    whole = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    want = reference(whole[0], whole[1], labels, whole[2] if has_bias else None, z_loss)
    (want * 0.5).backward()
    limit = {torch.float32: 3e-6, torch.float64: 1e-12, torch.bfloat16: 6e-3}[dtype]
    wrong = []
    if (
        abs(got.double() - want) > limit * max(abs(want), 1)
        or got.dtype != exact
        or not same_on_all(got.detach(), mesh)
    ):
        wrong.append(f"{rows} rows of {dtype}: {got} for {want}")
    for name, mine, full in zip(("hidden", "weight", "bias")[: 2 + has_bias], own, whole, strict=False):
        assert mine.grad is not None and full.grad is not None and mine.grad.dtype == dtype
        part = full.grad if name == "hidden" else full.grad.chunk(2)[rank]
        error = (mine.grad.double() - part).norm() / part.norm().clamp_min(1e-30)
        if error > limit:
            wrong.append(f"{rows} rows of {dtype}: gradient of {name} off by {error}")
    calls = 2 * -(-rows // chunk)
    if sent != (({"tensor": calls}, {"tensor": 3 * rows * exact.itemsize}) if rows else ({}, {})):
        wrong.append(f"{rows} rows: {sent[0]} calls for {calls}, {sent[1]} bytes")
    if rows and dtype == torch.float32 and not z_loss:
        logits = F.linear(own[0].detach(), own[1].detach())
        theirs = vocab_parallel_cross_entropy(logits[:, None], labels[:, None]).sum()
        if abs(theirs - got) > 1e-6 * got:
            wrong.append(f"megatron gives {theirs}, found {got}")
    return wrong


def comm_of(mesh: Mesh, meter: CommMeter) -> TensorComm:
    assert mesh.tensor.group is not None
    return TensorComm(mesh.tensor.group, mesh.tensor.rank, mesh.tensor.size, meter)


def test_the_loss_over_a_divided_vocabulary(ranks, seed: int) -> None:
    for wrong in ranks(2).run(loss_cases, seed):
        assert not wrong


def norm_of(model: MultimodalLM, mesh: Mesh) -> float:
    """The gradient norm as Megatron and DeepSpeed take it: marked parameters on every rank, others on the first."""
    counted = [p for p in model.parameters() if getattr(p, "tensor_model_parallel", False) or mesh.tensor.rank == 0]
    square = sum(p.grad.double().square().sum() for p in counted if p.grad is not None)
    total = torch.as_tensor(square, dtype=torch.float64)
    dist.all_reduce(total, group=mesh.tensor.group)
    return float(total.sqrt())


def without_targets(pack: PackedBatch) -> PackedBatch:
    return replace(pack, labels=torch.full_like(pack.labels, IGNORE), target_idx=pack.target_idx[:0])


def odd_cases(pool: Mesh, tensor: int, seed: int) -> Any:
    """Figures of one model with copied heads: norms with and without marks, recomputation, no targets, bytes, groups."""
    mesh = grid(pool, tensor=tensor)
    config = config_of("qwen2, tied, 1 kv head")
    whole, specs = tiny_model(config)
    model, layouts = divided(mesh, shaken(whole, seed))
    pack = tiny_pack(specs, seed)
    whole(pack).backward()
    mesh.meter.take()
    loss = model(pack)
    forward = mesh.meter.take()[0]["tensor"]
    loss.backward()
    backward = mesh.meter.take()[0]["tensor"]
    norms = [
        float(torch.stack([p.grad.norm() for p in whole.parameters() if p.grad is not None]).norm()),
        norm_of(model, mesh),
    ]
    for param in model.parameters():
        vars(param).pop("tensor_model_parallel", None)
    norms.append(norm_of(model, mesh))
    plain = {name: param.grad for name, param in model.named_parameters()}
    model.zero_grad()
    model.checkpoint_activations()
    model(pack).backward()
    again = all(p.grad is None or torch.equal(p.grad, plain[n]) for n, p in model.named_parameters())
    model.zero_grad()
    empty = model(without_targets(pack))
    empty.backward()
    nothing = (
        empty.item(),
        max(float(p.grad.abs().max()) for n, p in model.llm.named_parameters() if p.grad is not None),
    )
    model.zero_grad()
    for module in model.modules():
        if "copies" in vars(module):
            module.copies = 1  # type: ignore[assignment]
    model(pack).backward()
    uncopied = max(gradient_errors(whole, model, layouts, mesh).items(), key=lambda item: item[1])
    table_free = {n for group in param_groups(model, config.train) for n in group.names if group.weight_decay == 0.0}
    is_free = "llm.model.embed_tokens.weight" in table_free
    return norms, again, nothing, (forward, backward), (len(pack.input_ids), len(pack.target_idx)), is_free, uncopied


@pytest.mark.parametrize("tensor", [2, 4])
def test_marks_bytes_recomputation_and_no_targets(ranks, tensor: int, seed: int) -> None:
    for result in ranks(tensor).run(odd_cases, tensor, seed):
        (true, marked, unmarked), is_recomputed, nothing, sent, (length, targets), is_free, uncopied = result
        assert abs(marked - true) <= 1e-6 * true
        assert abs(unmarked - true) > 1e-2 * true, "the check must see that marks are missing"
        assert uncopied[1] > 1e-2 and uncopied[0].rpartition(".")[0][-6:] in ("k_proj", "v_proj"), (
            "the check must see copies that are not summed"
        )
        assert is_recomputed, "recomputed layers give other gradients"
        assert nothing == (0.0, 0.0), "a pack without targets must give exact zeros"
        width, head_dim, layers = 64, 8, 2
        ring = 2 * (tensor - 1) * 4  # bytes of an all-reduced element, times n
        forward = ring * (1 + 2 * layers) * length * width // tensor + ring * targets * 3 // tensor
        copies = 2 * layers * (tensor - 1) * head_dim * (width + 1) * 4  # weight and bias of keys and values
        backward = ring * (2 * layers * length + targets) * width // tensor + copies
        assert abs(sent[0] - forward) <= 2 and abs(sent[1] - backward) <= 2, (sent, forward, backward)
        assert is_free, "the divided embedding must stay without weight decay"


def bf16_errors(pool: Mesh, seed: int) -> tuple[float, float]:
    """Errors of the gradients in bf16 against fp32, undivided and divided."""
    mesh = grid(pool, tensor=2)
    true, specs = tiny_model(config_of("qwen3, 2 kv heads"))
    whole = copy.deepcopy(shaken(true, seed)).to(torch.bfloat16)
    model, layouts = divided(mesh, whole)
    pack = tiny_pack(specs, seed, "text")
    for each in (true, whole, model):
        each(pack).backward()
    want = {name: param.grad for name, param in true.named_parameters() if name.startswith("llm.")}

    def error(grads: dict[str, torch.Tensor]) -> float:
        offs = [(grads[n].float() - g).norm() / g.norm() for n, g in want.items() if g is not None]
        return float(torch.stack(offs).mean())

    parts = {n: assembled(p.grad, layouts.get(n), mesh) for n, p in model.named_parameters() if n in want}
    return error({n: p.grad for n, p in whole.named_parameters() if n in want}), error(parts)


def test_bf16_is_as_exact_as_undivided(ranks, seed: int) -> None:
    for alone, parted in ranks(2).run(bf16_errors, seed):
        assert 0 < parted <= 1.15 * alone, (alone, parted)


def shares_of_tokens(pool: Mesh) -> Any:
    mesh = grid(pool, tensor=2)
    whole, specs = tiny_model(config_of("llama"))
    model, _ = divided(mesh, whole, tensor_sequence=True)
    seen: list[tuple[int, ...]] = []
    base = model.llm.base_model
    for name in ("layers.1", "layers.1.self_attn.o_proj", "norm"):
        base.get_submodule(name).register_forward_hook(lambda m, a, out: seen.append(tuple(out.shape)))
    pack = tiny_pack(specs, 1)
    with torch.no_grad():
        model(pack)
    with pytest.raises(
        ConfigError, match="tensor_sequence=true needs a language model without experts, found 'mixtral'"
    ):
        divided(mesh, tiny_model(config_of("mixtral"))[0], tensor_sequence=True)
    return len(pack.input_ids), seen


def test_tokens_are_divided_between_the_layers(ranks) -> None:
    for length, seen in ranks(2).run(shares_of_tokens):
        half = -(-length // 2)
        assert seen == [(half, 64), (1, half, 64), (1, 2 * half, 64)]
