"""`mmscale check`: everything that can be known before training, on one screen."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from rich.console import Console
from rich.table import Table

from mmscale.config.checks import check_config, check_lengths, data_parallel_size
from mmscale.config.cost import run_cost
from mmscale.config.load import load_config
from mmscale.config.mixture import is_stream_mode, leaf_sources, mixture_shares
from mmscale.config.schema import Config, SourceConfig
from mmscale.config.specs import extra_tokens, media_specs
from mmscale.model.composite import skeleton
from mmscale.model.description import describe
from mmscale.streaming.chat import load_template
from mmscale.streaming.loader import open_shards
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.streaming.unindexed.urls import list_shards
from mmscale.types import MediaSpecs


def run(config_path: str, overrides: list[str], world_size: int) -> None:
    """Validates the config for `world_size` processes and prints the layout; raises ConfigError when it cannot work."""
    config = load_config(config_path, overrides)
    check_config(config, world_size)
    specs = media_specs(config.model, config.data)
    section = config.model.tokenizer
    tokenizer = TextTokenizer.load(
        section.path, (*section.add_tokens, *extra_tokens(config.data)), section.pad_to_multiple
    )
    _check_templates(config, tokenizer)
    run_cost(config, specs, tokenizer.vocab_size)  # refused here rather than when the data is opened
    tables = (_layout(config, world_size, specs), _sources(config), _parts(config, tokenizer, specs))
    console = Console(highlight=False)  # printed only when everything holds
    for table in tables:
        console.print(table)


def _check_templates(config: Config, tokenizer: TextTokenizer) -> None:
    """Raises ConfigError when a template is unknown or its special tokens are not in the tokenizer."""
    sources = [*leaf_sources(config.data.sources).values(), *leaf_sources(config.eval.sources).values()]
    for name in sorted({config.data.template, *(s.template for s in sources if s.template)}):
        for special in load_template(name).specials:
            tokenizer.special_id(special)


def _layout(config: Config, world_size: int, specs: MediaSpecs) -> Table:
    p, train = config.parallel, config.train
    dp_size = data_parallel_size(config.parallel, world_size)
    table = Table("layout", "", title=f"run {config.run.dir}", title_justify="left")
    table.add_row(
        "processes", f"{world_size} = tensor {p.tensor} x ulysses {p.ulysses} x ring {p.ring} x data {dp_size}"
    )
    engine = "none (one process)" if world_size == 1 and p.engine == "auto" else f"deepspeed, ZeRO-{p.zero_stage}"
    table.add_row("engine", f"{engine}, {train.dtype}")
    packs = train.global_batch // dp_size
    table.add_row(
        "step", f"{train.global_batch} packs = {dp_size} ranks x {packs} micro-batches of {config.data.seq_len} tokens"
    )
    table.add_row("tokens per step", f"{train.global_batch * config.data.seq_len:,}")
    table.add_row("steps", f"{train.steps:,} = {train.steps * train.global_batch * config.data.seq_len:,} tokens")
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
    return table


def _sources(config: Config) -> Table:
    table = Table("source", "samples", "used", "share", "epochs", "put aside", "skipped", "template")
    _add_sources(table, config, config.data.sources, is_training=True)
    _add_sources(table, config, config.eval.sources, is_training=False)
    return table


def _add_sources(table: Table, config: Config, sources: Mapping[str, SourceConfig], *, is_training: bool) -> None:
    leaves = leaf_sources(sources)
    if not leaves:
        return
    if is_training and is_stream_mode("data.sources", sources):
        _add_streamed(table, config, leaves)
        return
    opened = {name: open_shards(config.data, source) for name, source in leaves.items()}
    used = {name: min(len(shards), leaves[name].max_samples or len(shards)) for name, shards in opened.items()}
    shares = mixture_shares(sources, used)
    for name, source in leaves.items():
        shards = opened[name]
        skipped = ", ".join(f"{reason} {n}" for reason, n in shards.skipped.items()) or "none"
        mixed = (f"{float(shares[name]):.2%}", f"{source.max_epochs or '-'}") if is_training else ("", "")
        table.add_row(
            name if is_training else f"{name} (eval)",
            f"{len(shards):,}",
            f"{used[name]:,}",
            *mixed,
            ", ".join(shards.quarantined) or "none",
            skipped,
            source.template or config.data.template,
        )


def _add_streamed(table: Table, config: Config, leaves: Mapping[str, SourceConfig]) -> None:
    """Rows of sources without an index: how many shards there are is all that is known."""
    shards = {name: list_shards(name, source, config.data.root) for name, source in leaves.items()}
    shares = mixture_shares(config.data.sources, {name: len(found) for name, found in shards.items()})
    for name, source in leaves.items():
        epochs, template = f"{source.max_epochs or '-'}", source.template or config.data.template
        count = f"{len(shards[name]):,} shards"
        table.add_row(name, "not indexed", count, f"{float(shares[name]):.2%}", epochs, "", "", template)


def _parts(config: Config, tokenizer: TextTokenizer, specs: MediaSpecs) -> Table:
    with torch.device("meta"):  # shapes only: no memory, whatever the model's size
        model = skeleton(describe(config.model, tokenizer.vocab_size, specs))
    check_lengths(config, specs, getattr(model.llm.config, "max_position_embeddings", None))
    table = Table("part", "parameters", "trained", "peak lr")
    total = trained = 0
    for name, part in model.parts().items():
        count = sum(p.numel() for p in part.parameters())
        setting = getattr(config.train.parts, name)
        is_trained = setting.tune == "full"
        table.add_row(
            name,
            f"{count:,}",
            "yes" if is_trained else "frozen",
            f"{setting.lr or config.train.lr:.1e}" if is_trained else "",
        )
        total, trained = total + count, trained + count * is_trained
    table.add_section()
    table.add_row("all", f"{total:,}", f"{trained:,}", "")
    return table
