"""Whole optimizer steps of a multimodal model: tokens per second, MFU, memory, and what each switch is worth.

Every step reads its pack from host memory, runs forward, backward, clipping and AdamW through the trainer's engine. Layers
are recomputed in the backward pass only where the step does not fit otherwise.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from benchmarks.gpu.measure import Bench, brief
from benchmarks.gpu.model import LARGE, TINY, Size, documents, make_model, make_pack, run_config
from mmscale.config.specs import media_specs
from mmscale.model.composite import MultimodalLM
from mmscale.parallel.apply import make_engine
from mmscale.parallel.mesh import init_mesh
from mmscale.train.flops import flop_model, peak_flops
from mmscale.train.optim import build_optimizer, param_groups
from mmscale.types import IGNORE, EncodedSample

WARM_UP, STEPS = 2, 5
SEED = 11
HEADLINE = 1
"""Number of the pack size, of those of the model, on which switches are tried and targets set."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Of steps on one pack. `mfu` and `hfu` against the vendor's peak, NaN where that is not known."""

    tokens_per_s: float
    step_s: float
    spread: float
    mfu: float
    hfu: float
    peak_gb: float
    checkpointed: bool


def run(bench: Bench) -> None:
    """Every size of pack with everything on."""
    size = _size(bench)
    for number, num_tokens in enumerate(size.tokens):
        speed = measure(bench, size, num_tokens)
        text = _name(num_tokens) + (" recomputed" if speed.checkpointed else "")
        bench.report.claim(f"{text} tokens/s", speed.tokens_per_s)
        bench.report.claim("MFU", speed.mfu, "", ">= 0.45" if number == HEADLINE else "")
        bench.report.claim("HFU", speed.hfu)
        bench.report.claim("step", speed.step_s, f" s +{speed.spread:.1%}")
        bench.report.claim("memory", speed.peak_gb, " GB")


def run_switched(bench: Bench, name: str, train: Mapping[str, Any] | None = None) -> None:
    """The headline size with something switched off, which the caller has done in this process or does by `train`."""
    size = _size(bench)
    speed = measure(bench, size, size.tokens[HEADLINE], train)
    base = bench.figure("steps", _name(size.tokens[HEADLINE]), "tokens/s")
    bench.report.claim(f"{name} tokens/s", speed.tokens_per_s)
    bench.report.claim("share of all on", speed.tokens_per_s / base)
    bench.report.claim("memory", speed.peak_gb, " GB" + (" recomputed" if speed.checkpointed else ""))


def run_padded(bench: Bench) -> None:
    """The same documents through a padded loop of stock transformers, with the batch size that suits it best."""
    size = _size(bench)
    num_tokens = size.tokens[HEADLINE]
    config = run_config(size, _dtype(bench))
    found = documents(size, media_specs(config.model, config.data), num_tokens, SEED)
    tried = [(_tried(lambda rows=rows: _padded(bench, size, found, rows)), rows) for rows in (8, 4, 2)]
    fitting = [(*measured, rows) for measured, rows in tried if measured is not None]
    if not fitting:
        bench.report.failure("the padded loop runs out of memory with two rows")
        return
    speed, fill, rows = max(fitting)
    base = bench.figure("steps", _name(num_tokens), "tokens/s")
    bench.report.claim(f"padded transformers, {rows} rows, fill {fill:.2f}, tokens/s", speed)
    bench.report.claim("packed/padded", base / speed, "x", ">= 2")


def measure(bench: Bench, size: Size, num_tokens: int, train: Mapping[str, Any] | None = None) -> Speed:
    """Steps on a pack of so many tokens, recomputing layers only when memory does not suffice otherwise.

    Raises:
        torch.OutOfMemoryError: also then.
    """
    if num_tokens <= 32_768:
        speed = _tried(lambda: _measure(bench, size, num_tokens, {"checkpoint_activations": False, **(train or {})}))
        if speed is not None:
            return speed
    return _measure(bench, size, num_tokens, {**(train or {}), "checkpoint_activations": True})


def _tried(run: Callable[[], Any]) -> Any:
    """What `run` gives; None when it runs out of memory."""
    try:
        return run()
    except torch.OutOfMemoryError as error:
        print(f"note: {brief(error)}", flush=True)
    return None  # from here on the error no longer holds the frames with their tensors


def _measure(bench: Bench, size: Size, num_tokens: int, train: Mapping[str, Any]) -> Speed:
    _clear()
    config = run_config(size, _dtype(bench), train)
    model = make_model(size, config, bench.device)
    specs = model.config.specs
    pack = make_pack(documents(size, specs, num_tokens, SEED), specs, bench.device)
    assert pack.num_tokens == num_tokens, "the documents fill the pack"
    groups = param_groups(model, config.train)
    optimizer = build_optimizer(groups, config.train)
    engine = make_engine(model, optimizer, config.parallel, config.train, init_mesh(config.parallel, bench.device.type))
    checkpointed = config.train.checkpoint_activations
    trained = {group.part for group in groups}
    flops = flop_model(model.config, trained, checkpointed=checkpointed).pack(pack)

    def step() -> None:
        engine.forward_backward([pack], pack.num_targets)
        result = engine.step([group.lr for group in groups])
        assert not result.skipped, "the gradient is finite"

    median, spread, peak_gb = _timed(bench, step)
    peak = peak_flops(config, bench.device) or float("nan")
    return Speed(
        num_tokens / median,
        median,
        spread,
        flops.model / median / peak,
        flops.hardware / median / peak,
        peak_gb,
        checkpointed,
    )


def _timed(bench: Bench, step: Callable[[], object]) -> tuple[float, float, float]:
    """Median seconds, spread of the seconds, peak gigabytes."""
    is_cuda = bench.device.type == "cuda"
    seconds = []
    for number in range(1 if bench.dry else WARM_UP + STEPS):
        if is_cuda:
            torch.cuda.synchronize()
            if number == WARM_UP:
                torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        step()
        if is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    steady = seconds[WARM_UP:] or seconds
    peak_gb = torch.cuda.max_memory_allocated() / 1e9 if is_cuda else 0.0
    return statistics.median(steady), max(steady) / min(steady) - 1, peak_gb


def _padded(bench: Bench, size: Size, found: Sequence[EncodedSample], rows: int) -> tuple[float, float]:
    """(tokens per second, fill) of a loop as one writes it with transformers: rows of documents in arrival order, padded.

    The language model is transformers' own with sdpa attention and its own loss, on the same tower; the documents of a pack
    are one optimizer step in several micro-batches, as otherwise the logits alone would not fit.
    """
    _clear()
    config = run_config(size, _dtype(bench))
    model = make_model(size, config, bench.device)
    text_config = model.config.text_config
    with torch.device(bench.device):
        model.llm = AutoModelForCausalLM.from_config(
            text_config, attn_implementation="sdpa", dtype=torch.float32
        ).train()
    optimizer = build_optimizer(param_groups(model, config.train), config.train)
    batches = [pad(found[i : i + rows], bench.device) for i in range(0, len(found), rows)]
    num_targets = sum(int((b.labels[:, 1:] != IGNORE).sum()) for b in batches)

    def step() -> None:
        for batch in batches:
            with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.device.type == "cuda"):
                loss = padded_loss(model, batch, bench.device, num_targets)
            loss.backward()
        clip_grad_norm_(model.parameters(), config.train.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    median, _, _ = _timed(bench, step)
    fill = sum(map(len, found)) / sum(b.input_ids.numel() for b in batches)
    return sum(map(len, found)) / median, fill


@dataclass(frozen=True, slots=True)
class Padded:
    """Documents side by side [B, S]; `labels` are not shifted; `images` uint8 [N, 3, side, side]."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    is_image: torch.Tensor
    images: torch.Tensor | None


def pad(found: Sequence[EncodedSample], device: torch.device) -> Padded:
    """Documents padded on the right, on the host; pinned for a GPU."""
    ids = [d.input_ids for d in found]
    labels = [torch.where(d.is_target, d.input_ids, IGNORE) for d in found]
    is_image = [torch.arange(len(d)) < (d.media[0].num_tokens if d.media else 0) for d in found]
    images = [item.data for d in found for item in d.media]
    batch = Padded(
        pad_sequence(ids, batch_first=True),
        pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
        pad_sequence(labels, batch_first=True, padding_value=IGNORE),
        pad_sequence(is_image, batch_first=True),
        torch.cat(images) if images else None,
    )
    if device.type != "cuda":
        return batch
    values = (batch.input_ids, batch.attention_mask, batch.labels, batch.is_image, batch.images)
    return Padded(*(None if x is None else x.pin_memory() for x in values))


def padded_loss(model: MultimodalLM, batch: Padded, device: torch.device, num_targets: int) -> torch.Tensor:
    """transformers' loss of a micro-batch, divided by the targets of the whole step."""

    def here(x: torch.Tensor) -> torch.Tensor:
        return x.to(device, non_blocking=True)

    embeds = model.llm.get_input_embeddings()(here(batch.input_ids))
    if batch.images is not None:
        assert model.vision is not None, "the model has a tower"
        rows = model.vision(here(batch.images)).flatten(0, 1).to(embeds.dtype)
        embeds = embeds.masked_scatter(here(batch.is_image)[..., None], rows)
    out = model.llm(
        inputs_embeds=embeds,
        attention_mask=here(batch.attention_mask),
        labels=here(batch.labels),
        num_items_in_batch=num_targets,
        use_cache=False,
    )
    return out.loss


def _name(num_tokens: int) -> str:
    return f"{num_tokens / 1024:g}k"


def _size(bench: Bench) -> Size:
    return TINY if bench.dry else LARGE


def _dtype(bench: Bench) -> str:
    return "bf16" if bench.device.type == "cuda" else "fp32"


def _clear() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
