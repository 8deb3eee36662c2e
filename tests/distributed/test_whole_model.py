"""The whole model on every grid: loss and EVERY parameter's gradient equal one process in float64.

Mixed packs of images, audio and text, of odd length, with media over the borders of parts; ranks without media; parts without
targets. Language models of eight families, unmodified.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from grids import grid
from tiny_multimodal import FAMILIES, tiny_config, tiny_model, tiny_pack
from torch.utils._python_dispatch import TorchDispatchMode

from mmscale.config.cost import pack_cost
from mmscale.config.schema import ParallelConfig
from mmscale.model.composite import MultimodalLM
from mmscale.parallel.comm import sum_floats
from mmscale.parallel.layout import ShardLayout, chunks
from mmscale.parallel.mesh import Mesh
from mmscale.parallel.sp.media import tower_inputs
from mmscale.parallel.sp.split import bind, divide, split
from mmscale.parallel.tensor.shard import shard_tensor
from mmscale.streaming.collate import collate
from mmscale.types import EncodedSample

SP2 = (1, 2, 1)
RING2 = (1, 1, 2)
TP2 = (2, 1, 1)
OUTER = [("exchange", "planned"), ("gather", "contiguous"), ("ring", "per_document"), ("exchange", "zigzag")]
GRIDS = [
    (4, [((1, 2, 2), outer) for outer in OUTER]),
    (4, [((1, 1, 4), OUTER[0]), ((1, 1, 4), OUTER[2]), ((1, 4, 1), OUTER[0]), ((2, 1, 2), OUTER[2])]),
    (4, [((2, 2, 1), OUTER[0]), (SP2, OUTER[0]), (TP2, OUTER[0])]),
    (8, [((2, 2, 1), OUTER[0]), ((2, 2, 2), OUTER[1])]),
    (8, [((1, 4, 2), OUTER[0]), ((1, 2, 4), OUTER[2])]),
]
"""Pool size and ((tensor, ulysses, ring), exchange); what is left of the pool is data parallel. One launch each."""
FEW = [(4, [((1, 2, 2), OUTER[0]), ((2, 1, 2), OUTER[2]), (TP2, OUTER[0])])]


def whole_gradients(model: MultimodalLM, layouts: dict[str, ShardLayout], mesh: Mesh) -> dict[str, torch.Tensor]:
    """Gradients of the whole parameters, put together over the tensor ranks and summed over the flat group."""
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    missing = [name for name, param in params.items() if param.grad is None]
    assert not missing, f"without a gradient: {missing}"
    # few collectives for all of them: on few cores each costs more than its numbers
    flat = torch.cat([param.grad.flatten() for param in params.values()])
    dist.all_reduce(flat, group=mesh.grads.group)
    sizes = [param.numel() for param in params.values()]
    grads = {n: part.view(params[n].shape) for n, part in zip(params, flat.split(sizes), strict=True)}
    wholes = {name: grad for name, grad in grads.items() if name not in layouts}
    replicated = torch.cat([grad.flatten() for grad in wholes.values()])
    copies = [torch.empty_like(replicated) for _ in range(mesh.world_size)]
    dist.all_gather(copies, replicated, group=mesh.host_group)
    for copy in copies:  # replicated weights: the tensor ranks agree
        for (name, grad), other in zip(wholes.items(), copy.split([g.numel() for g in wholes.values()]), strict=True):
            assert (other - grad.flatten()).norm() <= 1e-6 * grad.norm().clamp_min(1e-6), name
    divided = {name: layout for name, layout in layouts.items() if name in grads}
    own = {n: [replace(c, value=c.value.numpy()) for c in chunks(grads[n], layout)] for n, layout in divided.items()}
    parts: list[Any] = [own] * mesh.tensor.size
    if divided:
        dist.all_gather_object(parts, own, group=mesh.tensor.group)
    for name, layout in divided.items():
        whole, seen = torch.zeros(layout.whole), torch.zeros(layout.whole)
        for chunk in (c for part in parts for c in part[name]):
            place = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.value.shape, strict=True))
            whole[place] = torch.from_numpy(chunk.value)
            seen[place] += 1
        assert (seen == 1).all(), f"{name}: an element written never or twice"
        wholes[name] = whole
    return wholes


LOSS_LIMIT, GRAD_LIMIT = 1e-6, 3e-6
"""Relative errors of fp32 against float64 that are always allowed."""
NOISE_LIMIT = 2e-5
"""Of one process: what is larger is no rounding."""


def reference(
    family: str, packs: list[Any], dtype: torch.dtype = torch.float64
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of all packs on one process."""
    model, _ = tiny_model(tiny_config(family), dtype)
    if family == "gpt_oss":  # its fused experts have no float64
        model.llm.set_experts_implementation("eager")
    num_targets = max(1, sum(pack.num_targets for pack in packs))
    total = 0.0
    for pack in packs:
        loss = model(pack) / num_targets
        loss.backward()
        total += loss.item()
    return total, {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def scale_of(name: str, want: dict[str, torch.Tensor]) -> float:
    """What an error is relative to: the gradient's norm, but for two biases, whose gradients cancel, that of their weight's.

    A bias on keys without rotation adds the same to all scores of a query, so softmax takes it away: its exact gradient is 0. The
    biases of a router of two experts get opposite gradients from every token, of either sign.
    """
    weight = name.removesuffix("bias") + "weight"
    if name.startswith("vision.tower.") and name.endswith(".k_proj.bias"):
        assert want[name].norm() <= 1e-6 * want[weight].norm()
        name = weight
    size = want[name].norm().item()
    if name.endswith(".router.bias"):
        size = max(size, want[weight].norm().item())
    return max(size, 1e-12)


def worst_errors(
    mesh: Mesh, layout: tuple[int, int, int], family: str, outer: tuple[str, str], kind: str, seed: int
) -> tuple[float, float, str]:
    """(relative loss error, worst relative gradient error, its parameter) of one case, on rank 0; (0, 0, "") on the others.

    Some packs leave a gradient that is a small difference of large terms, which one process in fp32 misses by more than GRAD_LIMIT
    too, by up to NOISE_LIMIT. There the error is scaled so that twice the error of one process counts as GRAD_LIMIT.
    """
    m = grid(mesh, *layout)
    config = tiny_config(family)
    model, specs = tiny_model(config)
    packs = [tiny_pack(specs, seed + i, kind) for i in range(m.dp_size)]
    num_targets = max(1, sum(pack.num_targets for pack in packs))
    parallel = ParallelConfig(tensor=layout[0], ulysses=layout[1], ring=layout[2], engine="deepspeed")
    layouts = shard_tensor(model, m, parallel) if layout[0] > 1 else {}
    pack = packs[m.dp_rank]
    pack = replace(pack, spans=divide(pack.lengths, layout[1], layout[2], outer[1]))
    towers = tower_inputs(specs, pack_cost(config.model, specs, vocab_size=128))
    part = split(pack, layout[1], layout[2], towers)[m.sequence.rank]
    loss = model(bind(part, m, outer[0], "auto")) / num_targets
    loss.backward()
    got = whole_gradients(model, layouts, m)
    total = sum_floats(m, [loss.item() if m.speaks_for_replica else 0.0])[0]
    if mesh.rank:  # one judge is enough: the gradients are summed over all ranks, and rank 0 has compared the copies
        return 0.0, 0.0, ""
    want_loss, want = reference(family, packs)
    assert got.keys() == want.keys()
    errors = {n: ((got[n].double() - w).norm() / scale_of(n, want)).item() for n, w in want.items()}
    if max(errors.values()) > GRAD_LIMIT:
        single = reference(family, packs, torch.float32)[1]
        for n, w in want.items():
            noise = ((single[n].double() - w).norm() / scale_of(n, want)).item()
            assert noise <= NOISE_LIMIT, f"{n}: one process in fp32 is off by {noise}"
            errors[n] *= GRAD_LIMIT / max(GRAD_LIMIT, 2 * noise)
    worst = max(errors, key=errors.__getitem__)
    return abs(total - want_loss) / max(want_loss, 1e-3), errors[worst], worst


def run_cases(mesh: Mesh, cases: list[tuple[Any, ...]], seed: int) -> list[Any]:
    """Many cases in one launch."""
    return [(case, worst_errors(mesh, *case, seed)) for case in cases]


def check(results: list[Any]) -> None:
    for case, (loss, grad, name) in results[0]:
        assert loss <= LOSS_LIMIT, (case, loss)
        assert grad <= GRAD_LIMIT, (case, name, grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_on_two_and_four_ranks(ranks, family, seed) -> None:
    """Each family on every kind of cut; a sliding window refuses the ring, which has its own test."""
    windowed = "sliding_window" in FAMILIES[family]
    cases = [(SP2, family, OUTER[0], "mixed"), (TP2, family, OUTER[0], "mixed"), (RING2, family, OUTER[0], "mixed")]
    cases += [] if windowed else [(RING2, family, OUTER[2], "mixed")]
    check(ranks(2).run(run_cases, cases, seed % 10_000))
    cases = [((1, 2, 2), family, OUTER[0], "mixed"), ((2, 2, 1), family, OUTER[0], "mixed")]
    check(ranks(4).run(run_cases, cases, seed % 10_000))


@pytest.mark.parametrize(
    ("kind", "launches"),
    [("mixed", GRIDS), ("text", FEW), ("blind", FEW)],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_every_grid_with_every_exchange(ranks, kind, launches, seed) -> None:
    """Media over borders, no media anywhere, and targets in one short document only."""
    for size, cases in launches:
        check(ranks(size).run(run_cases, [(layout, "llama", outer, kind) for layout, outer in cases], seed % 10_000))


class Squares(TorchDispatchMode):
    """Records results with two dimensions of at least `n`."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.found = n, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor) and sum(d >= self.n for d in value.shape) >= 2:
                self.found.append((str(func), tuple(value.shape)))
        return out


def scan(mesh: Mesh, layout: tuple[int, int, int], kind: str, seed: int) -> tuple[list[Any], list[Any]]:
    """What a pass over a long pack makes of squares of tokens: ours, and with Hugging Face's own masked attention."""
    m = grid(mesh, *layout)
    model, specs = tiny_model(tiny_config("mistral"))
    pack = long_pack(specs, seed)
    pack = replace(pack, spans=divide(pack.lengths, layout[1], layout[2], "planned"))
    part = split(pack, layout[1], layout[2], {})[m.sequence.rank]
    batch = bind(part, m, kind, "auto")
    with Squares(part.input_ids.numel()) as ours:
        model(batch).backward()
    model.llm.set_attn_implementation("sdpa")
    with Squares(part.input_ids.numel()) as masked:
        ids = pack.input_ids[None]
        model.llm(input_ids=ids, position_ids=pack.position_ids[None], use_cache=False)
    return ours.found, masked.found


def long_pack(specs: Any, seed: int) -> Any:
    """1,201 tokens of text: half of them are more than any width of the tiny model."""
    g = torch.Generator().manual_seed(seed)
    documents = []
    for i, length in enumerate((700, 1, 400, 100)):
        targets = torch.rand(length, generator=g) < 0.2
        documents.append(EncodedSample(f"d{i}", torch.randint(0, 100, (length,), generator=g), targets, ()))
    return collate(documents, specs)


def test_no_square_of_tokens_is_made(ranks, seed) -> None:
    for layout in (SP2, RING2):
        for ours, masked in ranks(2).run(scan, layout, "exchange", seed % 10_000):
            assert ours == []
            assert masked, "control: Hugging Face's masks are squares"
