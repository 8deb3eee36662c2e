"""Memory of one rank by what it is for, from formulas: what a run needs before it is started.

Sources: sharding by Rajbhandari et al. 2020 (ZeRO, arXiv:1910.02054, section 3), activations by the method of Korthikanti et al. 2022
(arXiv:2205.05198, section 4), written out for decoders with RMSNorm and a gated MLP and for attention that keeps no scores.
Per token and layer autograd keeps

    width x 4 b + 8                    the two norms: input, output, scale
    heads x head_size x 2 b            queries, and the output of attention
    kv_heads x head_size x 2 b         keys and values
    inner x 4 b                        gate, gate behind its function, up, and their product; as much for Phi's GELU
    heads x 4                          log-sum-exp of the scores

with b bytes per number. That is every byte that autograd keeps on a CPU for a Llama whose layers are those of `mmscale.model.llm.layers`
(a test counts them); other families keep up to a quarter more or less, GPUs the activated gate less.

Memory of the allocator, of the CUDA context and of NCCL, and kernels' scratch space are not in it.
"""

from __future__ import annotations

from mmscale.parallel.workload import PartSize, TowerSizes, Workload

BUCKET_ELEMENTS = 50_000_000
"""Numbers that DeepSpeed puts together before it reduces or gathers them."""

_FP32 = 4
_MOMENTS = 8


def memory(work: Workload) -> dict[str, float]:
    """Bytes of one rank by purpose, at the moment when all are there: an upper estimate.

    Media count as if a pack held nothing else, targets as if every token were one.
    """
    terms = {
        "weights": _weights(work),
        "gradients": _gradients(work),
        "optimizer": _optimizer(work),
        "engine buffers": _buffers(work),
        "activations": _activations(work),
        "logits and loss": _loss(work),
        "keys and values of other ranks": _collected_keys(work),
        "media": sum(_tower(work, name, tower) for name, tower in work.towers.items()),
    }
    return {name: float(size) for name, size in terms.items() if size}


def host_memory(work: Workload) -> float:
    """Bytes of host memory of one rank under `parallel.offload_optimizer`: masters and moments."""
    return _optimizer_bytes(work) if work.offload else 0.0


def local_parameters(work: Workload, name: str) -> float:
    """Parameters of a part that one tensor-parallel rank holds: the matrices of the language model are cut, the rest is whole.

    Key and value projections are cut into as many pieces as there are heads of them, at most.
    """
    size: PartSize = work.parts[name]
    if name != "llm" or work.tensor == 1:
        return float(size.parameters)
    llm = work.llm
    keys = llm.layers * 2 * llm.width * llm.kv_heads * llm.head_size
    cut = llm.layers * (2 * llm.width * llm.heads * llm.head_size + llm.matrices * llm.width * llm.inner * llm.experts)
    cut += work.embeddings * work.vocab * llm.width
    whole = size.parameters - keys - cut
    return whole + keys / min(work.tensor, llm.kv_heads) + cut / work.tensor


def layer_activation_bytes(work: Workload) -> float:
    """Bytes that one layer of the language model keeps per token for its backward pass; see the head of the file."""
    llm, each, tensor = work.llm, work.bytes_each, work.tensor
    wide = (llm.width * 4 * each + 8) / (tensor if work.tensor_sequence else 1)
    heads = llm.heads // tensor
    kv_heads = max(work.kv_heads, work.ulysses)
    attention = 2 * each * (heads + kv_heads) * llm.head_size + 4 * heads
    if work.ulysses > 1:
        attention += each * heads * llm.head_size  # the output before and behind the way back
    inner = llm.inner * llm.experts_used + llm.shared_inner
    return wide + attention + inner / tensor * each * 4


def _total(work: Workload, *, trained_only: bool) -> float:
    return sum(local_parameters(work, n) for n, part in work.parts.items() if part.is_trained or not trained_only)


def _shards(work: Workload, from_stage: int) -> int:
    """Ranks over which an engine shards what ZeRO shards from `from_stage` on."""
    if work.engine == "fsdp" or (work.engine == "deepspeed" and work.stage >= from_stage):
        return work.shards
    return 1


def _weights(work: Workload) -> float:
    """Live weights. FSDP keeps the fp32 masters only, one process computes in bf16 from copies of fp32 weights."""
    total = _total(work, trained_only=False)
    if work.engine == "fsdp":
        return total * _FP32 / work.shards
    if work.engine == "single":
        return total * (_FP32 + (2 if work.is_bf16 else 0))
    return total * work.bytes_each / _shards(work, 3)


def _gradients(work: Workload) -> float:
    """Gradients in fp32, in which they are added up."""
    return _total(work, trained_only=True) * _FP32 / _shards(work, 2)


def _optimizer(work: Workload) -> float:
    return 0.0 if work.offload else _optimizer_bytes(work)


def _optimizer_bytes(work: Workload) -> float:
    """AdamW's moments, and DeepSpeed's fp32 masters beside its live weights."""
    each = _MOMENTS if work.is_adam else 0
    if work.engine == "deepspeed":
        each += _FP32
    return _total(work, trained_only=True) * each / _shards(work, 1)


def _buffers(work: Workload) -> float:
    """What sharded engines gather and reduce at a time: two buckets or two layers."""
    if work.engine == "single" or work.shards == 1:
        return 0.0
    llm = work.llm
    matrices = llm.attention_weights + llm.matrices * llm.width * llm.inner * llm.experts
    layer = max(matrices, work.vocab * llm.width) / work.tensor
    if work.engine == "fsdp":
        return layer * (2 * work.bytes_each + _FP32)
    if work.stage == 3:  # its bucket is there from the start, whatever the model's size
        return BUCKET_ELEMENTS * _FP32 + 2 * layer * work.bytes_each
    return 2 * min(BUCKET_ELEMENTS, _total(work, trained_only=True)) * _FP32


def _activations(work: Workload) -> float:
    """The language model's: all layers, or with checkpointing their inputs and one layer that is computed again."""
    layer = layer_activation_bytes(work)
    if not work.checkpoint_activations:
        return work.tokens * work.llm.layers * layer
    kept = work.llm.width * work.bytes_each / (work.tensor if work.tensor_sequence else 1)
    return work.tokens * (work.llm.layers * kept + layer)


def _loss(work: Workload) -> float:
    """Logits in fp32 and in the type of the products, of as many targets as the budget lets through at a time; the targets'
    hidden states and their gradient; the gradient of the head on its way, added up in fp32."""
    vocab = work.vocab / work.tensor
    logits = work.tokens * vocab * (_FP32 + (work.bytes_each if work.is_bf16 else 0))
    rows = 2 * work.tokens * work.llm.width * work.bytes_each
    head = vocab * work.llm.width * (_FP32 + (work.bytes_each if work.is_bf16 else 0))
    return min(logits, work.loss_memory_mb * 1e6) + rows + (head if work.parts["llm"].is_trained else 0)


def _collected_keys(work: Workload) -> float:
    """Keys and values from the outer ranks with their gradients in fp32.

    `exchange` and `gather` hold the whole pack's at most, for every layer that keeps its activations; a ring two blocks.
    """
    if work.ring == 1:
        return 0.0
    numbers = 2 * max(work.kv_heads, work.ulysses) / work.ulysses * work.llm.head_size
    if work.sp == "ring":
        return 2 * -(-work.seq_len // work.ring) * numbers * (work.bytes_each + _FP32)
    layers = 1 if work.checkpoint_activations else work.llm.layers
    return work.seq_len * numbers * (layers * work.bytes_each + _FP32)


def _tower(work: Workload, name: str, tower: TowerSizes) -> float:
    """Inputs and features of a tower on the rank that has most; with activations when there is something to train below.

    Kept per token and layer: norms 4, queries, keys and values 3, attention 2 x width, MLP 2 x inner.
    """
    inputs = -(-work.media_inputs[name] // work.sequence)
    features = tower.rows * work.llm.width * work.bytes_each
    layer = tower.tokens * work.bytes_each * (9 * tower.width + 2 * tower.inner)
    layers = tower.layers if work.parts[name].is_trained else 1
    if work.checkpoint_activations and layers > 1:
        layer, layers = layer + layers * tower.tokens * work.bytes_each * tower.width, 1
    return inputs * (tower.input_bytes + features + layers * layer)
