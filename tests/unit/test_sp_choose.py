"""`parallel.sp: auto`: the fewest ranks per pack that work, Ulysses first, and a kind that fits lengths and memory."""

import pytest

from mmscale.config.llm import LlmSizes
from mmscale.config.schema import ParallelConfig
from mmscale.errors import ConfigError
from mmscale.parallel.estimate import memory
from mmscale.parallel.sp.choose import Facts, choose_parallel, rank_bytes_of, resolve_layout
from mmscale.parallel.workload import PartSize, Workload

GIB = 2**30
LLM_8B = LlmSizes(layers=32, width=4096, heads=32, kv_heads=8, head_size=128, inner=14_336, matrices=3, vocab=128_256)


def sizes(heads=32, kv_heads=8, window=None):
    return LlmSizes(32, heads * 128, heads, kv_heads, 128, 4 * heads * 128, 3, window=window)


def facts(llm=LLM_8B, seq_len=131_072, global_batch=64, ranks_per_node=8, **more):
    return Facts(llm, seq_len, global_batch, ranks_per_node, **more)


def bytes_by_tokens(fixed_gib, gib_per_rank_pack, gathered_gib=0.0):
    """Memory that falls with the ranks of a pack, plus all keys at once unless they go round a ring."""

    def needs(ulysses, ring, kind):
        gathered = gathered_gib / ulysses if ring > 1 and kind != "ring" else 0.0
        return (fixed_gib + gib_per_rank_pack / (ulysses * ring) + gathered) * GIB

    return needs


def chosen(parallel, world_size, given):
    found, reason = choose_parallel(ParallelConfig(sp="auto", **parallel), world_size, given)
    return (found.sp, found.ulysses, found.ring), reason


@pytest.mark.parametrize(
    ("parallel", "world_size", "given", "expected"),
    [
        # nothing needs a pack to be divided
        ({}, 1, facts(), ("exchange", 1, 1)),
        ({}, 64, facts(), ("exchange", 1, 1)),
        # the data-parallel ranks must divide the global batch
        ({}, 64, facts(global_batch=16), ("exchange", 4, 1)),
        ({}, 64, facts(global_batch=24), ("exchange", 8, 1)),
        ({"tensor": 2}, 64, facts(global_batch=16), ("exchange", 2, 1)),
        ({}, 6, facts(global_batch=2), ("exchange", 1, 3)),  # 3 ranks cannot share 32 heads
        ({}, 12, facts(global_batch=2, ranks_per_node=4), ("exchange", 2, 3)),
        # Ulysses stays inside a node and within the heads; the rest is outside
        ({}, 64, facts(global_batch=2), ("exchange", 8, 4)),
        ({}, 64, facts(global_batch=2, ranks_per_node=4), ("exchange", 4, 8)),
        ({}, 64, facts(global_batch=2, ranks_per_node=1), ("exchange", 1, 32)),
        ({"tensor": 4}, 64, facts(global_batch=2), ("exchange", 2, 4)),
        ({}, 16, facts(sizes(14, 2), global_batch=1, ranks_per_node=16), ("exchange", 2, 8)),
        ({}, 16, facts(sizes(8, 1), global_batch=1, ranks_per_node=16), ("exchange", 8, 2)),  # replicated keys
        ({}, 16, facts(sizes(12, 12), global_batch=1, ranks_per_node=16), ("exchange", 4, 4)),
        # the kind, by what a pack holds
        ({}, 64, facts(global_batch=2, documents=1.0), ("gather", 8, 4)),
        ({}, 64, facts(global_batch=2, documents=20.0), ("exchange", 8, 4)),
        ({}, 64, facts(sizes(window=4096), global_batch=2, documents=1.0), ("exchange", 8, 4)),
        ({}, 64, facts(sizes(window=131_072), global_batch=2, documents=1.0), ("gather", 8, 4)),
        # memory: more ranks per pack, and a ring where all keys at once do not fit
        ({}, 64, facts(device_bytes=80 * GIB, rank_bytes=bytes_by_tokens(20, 200)), ("exchange", 4, 1)),
        ({}, 64, facts(device_bytes=80 * GIB, rank_bytes=bytes_by_tokens(20, 800)), ("exchange", 8, 2)),
        ({}, 64, facts(device_bytes=80 * GIB, rank_bytes=bytes_by_tokens(20, 800, 80)), ("ring", 8, 2)),
        ({}, 64, facts(device_bytes=80 * GIB, rank_bytes=bytes_by_tokens(20, 800, 8)), ("exchange", 8, 2)),
        ({}, 64, facts(rank_bytes=bytes_by_tokens(20, 800)), ("exchange", 1, 1)),  # of an unknown device
        # degrees that are set stay
        ({"ring": 4}, 64, facts(documents=1.0), ("gather", 1, 4)),
        ({"ulysses": 2, "ring": 2}, 64, facts(), ("exchange", 2, 2)),
        ({"ring": 4}, 64, facts(device_bytes=80 * GIB, rank_bytes=bytes_by_tokens(20, 40, 90)), ("ring", 1, 4)),
        ({"ring": 4}, 64, facts(device_bytes=8 * GIB, rank_bytes=bytes_by_tokens(20, 40, 90)), ("ring", 1, 4)),
    ],
)
def test_choices(parallel, world_size, given, expected):
    found, reason = chosen(parallel, world_size, given)
    assert found == expected, reason
    assert f"sp={found[0]}" in reason and f"ulysses={found[1]} ring={found[2]}" in reason


def work_8b():
    return Workload(
        engine="deepspeed", stage=3, data=64, tensor=1, ulysses=1, ring=1, sp="exchange", tensor_sequence=False, offload=False,
        seq_len=131_072, packs=1, parts={"llm": PartSize(8_030_261_248, True)}, llm=LLM_8B, vocab=128_256, embeddings=2, towers={},
        media_inputs={}, is_bf16=True, checkpoint_activations=True, is_adam=True, loss_memory_mb=4000,
    )  # fmt: skip


def test_an_8b_model_with_long_packs_takes_the_fewest_ranks_that_its_estimate_allows():
    needs = rank_bytes_of(work_8b())
    for gib in (24, 80):
        (kind, ulysses, ring), _ = chosen({}, 64, facts(device_bytes=gib * GIB, rank_bytes=needs))
        assert needs(ulysses, ring, kind) <= 0.9 * gib * GIB
        half = ulysses * ring // 2
        assert all(needs(u, half // u, "ring") > 0.9 * gib * GIB for u in (1, 2, 4, 8) if u <= half)
    assert needs(1, 1, "exchange") == sum(memory(work_8b()).values())
    assert needs(8, 2, "exchange") < needs(8, 1, "exchange") < needs(1, 1, "exchange")


def test_what_is_configured_stays():
    for parallel in (ParallelConfig(sp="ring", ring=2), ParallelConfig()):
        assert choose_parallel(parallel, 64, facts()) == (parallel, f"parallel.sp={parallel.sp} as configured")


def test_the_reason_names_what_decided():
    _, reason = chosen({}, 64, facts(global_batch=2))
    assert (
        "fewer ranks per pack do not work (ulysses=8 ring=2: 4 data-parallel ranks do not divide train.global_batch=2)"
        in reason
    )
    assert "Ulysses ends at 8 (32 query and 8 key/value heads, 8 ranks per node)" in reason
    assert "several documents per pack" in reason
    _, reason = chosen({}, 64, facts(device_bytes=80 * GIB, rank_bytes=bytes_by_tokens(20, 800, 80)))
    assert "all keys of a pack do not fit at once" in reason and "about 70 of 72 GiB per rank" in reason
    assert "ulysses=8 ring=1: needs about 120 GiB per rank of 72 usable (sp=exchange)" in reason


def test_refusals_name_the_nearest_layouts():
    given = facts(device_bytes=80 * GIB, rank_bytes=bytes_by_tokens(75, 800))
    with pytest.raises(
        ConfigError, match=r"found none; the nearest are ulysses=8 ring=4: .* 100 GiB .*ulysses=8 ring=8: .* lower data"
    ):
        chosen({}, 64, given)
    with pytest.raises(ConfigError, match=r"parallel\.tensor=3 .* must divide the 64 processes"):
        chosen({"tensor": 3}, 64, facts())


@pytest.mark.parametrize(
    ("keys", "layout"),
    [
        ({"sp": "ring"}, "per_document"),
        ({"sp": "exchange"}, "planned"),
        ({"sp": "gather"}, "planned"),
        ({"sp": "ring", "sp_layout": "zigzag"}, "zigzag"),
        ({"sp": "gather", "sp_layout": "contiguous"}, "contiguous"),
    ],
)
def test_layouts(keys, layout):
    assert resolve_layout(ParallelConfig(**keys)) == layout
