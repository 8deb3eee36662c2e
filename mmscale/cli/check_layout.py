"""The tables of `mmscale check` about ranks: the grid, memory per rank, bytes per link."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from mmscale.config.schema import Config
from mmscale.parallel.estimate import host_memory, memory
from mmscale.parallel.sp.choose import resolve_layout
from mmscale.parallel.traffic import groups, links
from mmscale.parallel.workload import Workload
from mmscale.types import MediaSpecs

USABLE = 0.9
"""Share of a device's memory that a run may count on: the rest is the allocator's, CUDA's and NCCL's."""


def layout_table(config: Config, work: Workload, specs: MediaSpecs, ranks_per_node: int, reason: str = "") -> Table:
    """How the run is spread over processes, and what a step is. `reason`: why the sequence degrees are what they are."""
    train = config.train
    table = Table("layout", "", title=f"run {config.run.dir}", title_justify="left")
    table.add_row(
        "processes",
        f"{work.world_size} = tensor {work.tensor} x ulysses {work.ulysses} x ring {work.ring} x data {work.data}",
    )
    if work.tensor * work.sequence > 1:
        table.add_row("rank 0 talks to", "; ".join(_group_texts(work, ranks_per_node)))
    engine = {
        "single": "none (one process)",
        "deepspeed": f"deepspeed, ZeRO-{work.stage}",
        "fsdp": "fsdp (torch FSDP2)",
    }[work.engine]
    sharded = f", over {work.shards} ranks" if work.shards > 1 else ""
    table.add_row("engine", f"{engine}, {train.dtype}{sharded}")
    if work.sequence > 1:
        table.add_row("sequence", _sequence_text(config, work) + (f"; {reason}" if reason else ""))
    table.add_row(
        "step",
        f"{train.global_batch} packs = {work.data} ranks x {work.packs} micro-batches of {work.seq_len} tokens"
        + (f", {work.tokens} on each of {work.sequence} ranks" if work.sequence > 1 else ""),
    )
    table.add_row("tokens per step", f"{train.global_batch * work.seq_len:,}")
    table.add_row("steps", f"{train.steps:,} = {train.steps * train.global_batch * work.seq_len:,} tokens")
    _add_media(table, specs)
    return table


def memory_table(work: Workload, device_gb: float | None = None) -> Table:
    """Memory of one rank by purpose, an upper estimate, against that of one device when it is known."""
    table = Table("memory of one rank, at most", "GB", title_justify="left")
    for name, size in (terms := memory(work)).items():
        table.add_row(name, _gb(size))
    table.add_section()
    total = sum(terms.values())
    table.add_row("all", _gb(total))
    if device_gb is not None:
        fits = "fits" if total <= device_gb * 1e9 * USABLE else "does not fit"
        table.add_row(f"of {USABLE:.0%} of a device, {fits}", _gb(device_gb * 1e9 * USABLE))
    if work.offload:
        table.add_row("optimizer, in host memory", _gb(host_memory(work)))
    return table


def traffic_table(work: Workload, ranks_per_node: int) -> Table | None:
    """Bytes that one rank sends per step, by link; None when it sends none."""
    found = links(work)
    if not found:
        return None
    table = Table("sent by one rank in a step, at most", "MB", "collectives", "ranks", "where", title_justify="left")
    for link in found:
        nodes = link.nodes(ranks_per_node)
        where = "inside a node" if nodes == 1 else f"over {nodes} nodes"
        table.add_row(
            link.kind,
            f"{link.sent / 1e6:,.2f}",
            f"{link.calls:,}" if link.calls else "by bucket",
            f"{len(link.ranks)}",
            where,
        )
    return table


def _group_texts(work: Workload, ranks_per_node: int) -> list[str]:
    found = groups(work)
    texts = [f"{name} {_ranks(found[name])}" for name in ("tensor", "ulysses", "ring", "data") if len(found[name]) > 1]
    nodes = -(-work.world_size // ranks_per_node)
    return [*texts, f"gradients {_ranks(found['gradients'])}"] + ([f"{nodes} nodes of {ranks_per_node}"] * (nodes > 1))


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) <= 4:
        return " ".join(map(str, ranks))
    return f"{ranks[0]} {ranks[1]} {ranks[2]} .. {ranks[-1]} ({len(ranks)})"


def _sequence_text(config: Config, work: Workload) -> str:
    inner = f"ulysses {work.ulysses}: {work.llm.heads // work.tensor // work.ulysses} query heads per rank"
    outer = f"{config.parallel.sp} over {work.ring} ranks, layout {resolve_layout(config.parallel)}"
    return "; ".join(text for text, size in ((inner, work.ulysses), (outer, work.ring)) if size > 1)


def _add_media(table: Table, specs: MediaSpecs) -> None:
    if specs.image is not None:
        table.add_row(
            "image",
            f"{specs.image.size} x {specs.image.size} pixels ({specs.image.mode}) = {specs.image.tokens} tokens"
            + (" each tile" if specs.image.mode in ("tiles", "anyres") else ""),
        )
    if specs.audio is not None:
        a = specs.audio
        table.add_row(
            "audio", f"{a.window_samples / a.rate_hz:g} s at {a.rate_hz} Hz ({a.features}) = {a.tokens} tokens"
        )


def _gb(size: float) -> str:
    return f"{size / 1e9:,.3f}" if size < 1e10 else f"{size / 1e9:,.1f}"
