"""Memory and traffic by formula: against bytes that autograd keeps, parameters that a model has, and known figures."""

import math
import random
from dataclasses import replace

import pytest
import torch

from mmscale.config.llm import llm_sizes
from mmscale.config.specs import media_specs
from mmscale.model.composite import skeleton
from mmscale.model.description import describe, hf_config
from mmscale.model.llm.attention import WholePack
from mmscale.model.llm.layers import replace_layers
from mmscale.model.llm.load import load_llm
from mmscale.parallel.estimate import host_memory, layer_activation_bytes, local_parameters, memory
from mmscale.parallel.traffic import groups, links
from mmscale.parallel.workload import ModelSizes, PartSize, Workload, make_workload

LLAMA_8B = {
    **{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
}
PARAMETERS_8B = 8_030_261_248


def work(llm=LLAMA_8B, parameters=PARAMETERS_8B, **changes):
    base = Workload(
        engine="deepspeed", stage=1, data=1, tensor=1, ulysses=1, ring=1, sp="exchange", tensor_sequence=False, offload=False,
        seq_len=131072, packs=1, parts={"llm": PartSize(parameters, True)}, llm=llm_sizes(llm), vocab=llm["vocab_size"],
        embeddings=2, towers={}, media_inputs={}, is_bf16=True, checkpoint_activations=False, is_adam=True,
        loss_memory_mb=4000,
    )  # fmt: skip
    return replace(base, **changes)


def kept_bytes(kind, layers, dtype, sizes, tokens=256):
    """Bytes of all tensors that autograd keeps in a forward pass, parameters left out, each memory counted once."""
    model = load_llm(
        hf_config(
            {"model_type": kind, "vocab_size": 97, "pad_token_id": None, "num_hidden_layers": layers, **sizes}, ""
        )
    )
    model = replace_layers(model).to(dtype).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def pack(tensor):
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in weights:
            found[memory.data_ptr()] = memory  # held, so that no address comes twice
        return tensor

    embeds = torch.randn(1, tokens, sizes["hidden_size"], dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(
            inputs_embeds=embeds, position_ids=torch.arange(tokens)[None], use_cache=False, logits_to_keep=1,
            pack=WholePack((tokens,)),
        )  # fmt: skip
    return sum(memory.nbytes() for memory in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "tolerance"), [("llama", 1e-9), ("mistral", 1e-9), ("qwen3", 0.25), ("phi", 0.25), ("stablelm", 0.25)]
)
def test_activations_are_what_autograd_keeps(kind, tolerance, dtype, seed):
    rng = random.Random(seed)
    heads = rng.choice((4, 6, 8))
    sizes = {
        **{"num_attention_heads": heads, "num_key_value_heads": heads // 2, "hidden_size": heads * 16},
        **{"intermediate_size": heads * rng.randint(40, 60), "max_position_embeddings": 4096},
    }
    sizes |= {"head_dim": 16} if kind == "qwen3" else {}
    tokens = 256
    one, two = (kept_bytes(kind, layers, dtype, sizes, tokens) for layers in (1, 2))
    counted = (two - one) / tokens
    raw = {"model_type": kind, "num_hidden_layers": 2, "vocab_size": 97, **sizes}
    expected = layer_activation_bytes(work(raw, 1, is_bf16=dtype == torch.bfloat16))
    print(f"{kind} {dtype}: {expected} expected, {counted} counted, per token and layer")
    assert expected == pytest.approx(counted, rel=tolerance)


def test_the_whole_model_has_the_parameters_that_are_counted(tiny_config, seed):
    """Cut over any number of tensor-parallel ranks: together all of them, but for what each rank holds whole."""
    config = tiny_config(llm={"num_key_value_heads": 2})
    specs = media_specs(config.model, config.data)
    with torch.device("meta"):
        model = skeleton(describe(config.model, 320, specs))
    parts = {name: PartSize(sum(p.numel() for p in part.parameters()), True) for name, part in model.parts().items()}
    sizes = ModelSizes(parts, llm_sizes(model.llm.config.to_dict()), 320, 2)
    norms = sum(p.numel() for n, p in model.llm.named_parameters() if "norm" in n)
    keys = sum(p.numel() for n, p in model.llm.named_parameters() if "k_proj" in n or "v_proj" in n)
    for tensor in (2, 4):
        found = make_workload(
            config.model_copy(update={"parallel": config.parallel.model_copy(update={"tensor": tensor})}),
            tensor,
            sizes,
            specs,
        )
        whole = parts["llm"].parameters
        copies = max(1, tensor // 2)  # of key/value heads, of which there are 2
        assert local_parameters(found, "llm") * tensor == whole + norms * (tensor - 1) + keys * (copies - 1)
        assert local_parameters(found, "vision") == parts["vision"].parameters


def test_zero_shards_what_its_stage_says():
    """Table of Rajbhandari et al. 2020, section 3: bf16 weights, fp32 gradients, 12 bytes of optimizer state per parameter."""
    n, p = 8, PARAMETERS_8B
    expected = {1: (2 * p, 4 * p, 12 * p / n), 2: (2 * p, 4 * p / n, 12 * p / n), 3: (2 * p / n, 4 * p / n, 12 * p / n)}
    for stage, figures in expected.items():
        terms = memory(work(stage=stage, data=4, ring=2))
        assert (terms["weights"], terms["gradients"], terms["optimizer"]) == pytest.approx(figures)
    terms = memory(work(engine="fsdp", data=8))
    assert (terms["weights"], terms["gradients"], terms["optimizer"]) == pytest.approx(
        (4 * p / n, 4 * p / n, 8 * p / n)
    )
    terms = memory(work(engine="single", is_bf16=False))
    assert (terms["weights"], terms["gradients"], terms["optimizer"]) == pytest.approx((4 * p, 4 * p, 8 * p))
    offloaded = work(data=8, offload=True)
    assert "optimizer" not in memory(offloaded) and host_memory(offloaded) == 12 * p / n


def test_frozen_parts_have_weights_only():
    frozen = work(parts={"llm": PartSize(PARAMETERS_8B, False), "vision_connector": PartSize(1000, True)}, data=2)
    terms = memory(frozen)
    assert terms["weights"] == 2 * (PARAMETERS_8B + 1000)
    assert terms["gradients"] == 4000 and terms["optimizer"] == 6000


def test_more_ranks_never_need_more_memory_each(seed):
    rng = random.Random(seed)
    for _ in range(50):
        some = work(
            stage=rng.choice((1, 2, 3)), sp=rng.choice(("exchange", "gather", "ring")), seq_len=rng.choice((8192, 131072)),
            checkpoint_activations=rng.random() < 0.5, engine=rng.choice(("deepspeed", "fsdp")), data=rng.choice((2, 4)),
        )  # fmt: skip
        for axis in ("data", "tensor", "ulysses"):
            more = replace(some, **{axis: 2 * getattr(some, axis)})
            assert sum(memory(more).values()) <= sum(memory(some).values()) * (1 + 1e-9), (axis, some)


def link(some, kind):
    (found,) = [one for one in links(some) if one.kind == kind]
    return found


def test_bytes_between_sequence_ranks_are_the_known_ones():
    """8B layers (H32 G8 D128 bf16), 131,072 tokens, 8 ranks: 294 MB forward in Ulysses, 470 MB in a gather, per layer."""
    layers = 32
    assert link(work(ulysses=8), "ulysses").sent / layers == pytest.approx(587e6, rel=1e-3)
    gathered, ring = link(work(ring=8, sp="gather"), "gather"), link(work(ring=8, sp="ring"), "ring")
    assert gathered.sent / layers == pytest.approx(470e6 * 3, rel=1e-3)  # keys and values, and fp32 gradients
    assert ring.sent / layers == pytest.approx(470e6 * 4, rel=1e-3)
    assert link(work(ring=8), "exchange").sent == gathered.sent, "of a pack of one document"
    assert link(work(ulysses=8, checkpoint_activations=True), "ulysses").sent / layers == pytest.approx(881e6, rel=1e-3)
    assert link(work(ulysses=8), "ulysses").calls == 4 * layers


def test_bytes_of_tensor_parallel_layers():
    tokens, width, layers = 131072, 4096, 32
    found = link(work(tensor=4, packs=2), "tensor")
    all_reduce = 2 * 3 / 4
    assert found.sent == pytest.approx(2 * all_reduce * ((4 * layers + 2) * tokens * width * 2 + 3 * 4 * tokens))
    assert found.calls == 2 * (4 * layers + 4)


def test_engines_send_gradients_and_weights():
    p, n = PARAMETERS_8B, 8
    share = (n - 1) / n
    assert link(work(stage=2, data=n, packs=3), "gradients").sent == pytest.approx(share * 4 * p * 3)
    assert link(work(stage=1, data=n, packs=3), "gradients").sent == pytest.approx(2 * share * 4 * p)
    assert link(work(stage=1, data=n, packs=3), "weights").sent == pytest.approx(share * 2 * p)
    assert link(work(stage=3, data=n, packs=3), "weights").sent == pytest.approx(share * 2 * p * 6)
    fsdp = work(engine="fsdp", data=n, packs=3)
    assert link(fsdp, "gradients").sent == pytest.approx(share * 4 * p * 3)
    assert not links(work(engine="single"))


@pytest.mark.parametrize(("tensor", "ulysses", "ring", "data"), [(2, 2, 2, 1), (2, 4, 1, 4), (1, 8, 8, 16)])
def test_groups_are_those_of_the_mesh(tensor, ulysses, ring, data):
    some = work(tensor=tensor, ulysses=ulysses, ring=ring, data=data)
    found = groups(some)
    sizes = {"tensor": tensor, "ulysses": ulysses, "ring": ring, "data": data, "gradients": some.shards}
    assert {name: len(found[name]) for name in sizes} == sizes
    reached = {
        t + u + r + d for t in found["tensor"] for u in found["ulysses"] for r in found["ring"] for d in found["data"]
    }
    assert reached == set(range(some.world_size))
    assert {g + t for g in found["gradients"] for t in found["tensor"]} == reached


def test_neighbours_are_inside_a_node():
    some = work(tensor=2, ulysses=4, ring=4, data=32)
    nodes = {one.kind: one.nodes(8) for one in links(some)}
    assert nodes["tensor"] == nodes["ulysses"] == 1
    assert nodes["exchange"] == 4 and nodes["gradients"] == math.ceil(some.world_size / 8)
