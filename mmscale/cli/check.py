"""`mmscale check`: everything that can be known before training, on one screen."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from rich.console import Console
from rich.table import Table

from mmscale.cli.check_layout import layout_table, memory_table, traffic_table
from mmscale.cli.decide import Device, decide, model_sizes
from mmscale.config.checks import check_config, check_lengths
from mmscale.config.cost import run_cost
from mmscale.config.layouts import check_degrees
from mmscale.config.load import load_config
from mmscale.config.mixture import is_stream_mode, leaf_sources, mixture_shares
from mmscale.config.schema import Config, SourceConfig
from mmscale.config.specs import extra_tokens, media_specs
from mmscale.errors import MissingExtraError
from mmscale.model.composite import skeleton
from mmscale.model.description import describe
from mmscale.model.llm.attention import check_positions
from mmscale.parallel.engines.deepspeed_json import Json, Known, deepspeed_config
from mmscale.parallel.tensor.plan import tensor_plan
from mmscale.parallel.workload import ModelSizes, make_workload
from mmscale.streaming.chat import load_template
from mmscale.streaming.loader import open_shards
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.streaming.unindexed.urls import list_shards


def run(
    config_path: str, overrides: list[str], world_size: int, ranks_per_node: int = 8, device_gb: float | None = None
) -> None:
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
    with torch.device("meta"):  # shapes only: no memory, whatever the model's size
        model = skeleton(describe(config.model, tokenizer.vocab_size, specs))
    check_lengths(config, specs, getattr(model.llm.config, "max_position_embeddings", None))
    check_positions(model.llm.config, config.data.seq_len)
    sizes = model_sizes(config, model)
    device = Device(ranks_per_node, None if device_gb is None else round(device_gb * 1e9))
    config, reason = decide(config, world_size, sizes, specs, device)
    check_degrees(config.parallel, sizes.llm, config.data.seq_len)  # with the defaults of the family's configuration
    if config.parallel.tensor > 1:
        tensor_plan(model.llm, config.parallel.tensor, config.parallel.tensor_sequence)
    work = make_workload(config, world_size, sizes, specs)
    if work.engine == "deepspeed":  # a JSON file that contradicts the config is refused here
        known = deepspeed_config(Known(config.parallel, config.train, work.data, sizes.llm.width))
        if config.parallel.deepspeed is not None:
            _check_with_deepspeed(known)
    tables = (
        layout_table(config, work, specs, ranks_per_node, reason),
        _sources(config),
        _parts(config, sizes),
        memory_table(work, device_gb),
        traffic_table(work, ranks_per_node),
    )
    console = Console(highlight=False)  # printed only when everything holds
    for table in tables:
        if table is not None:
            console.print(table)


def _check_with_deepspeed(content: Json) -> None:
    """Raises ConfigError for a file that DeepSpeed does not take, where it is installed; a run refuses it in any case."""
    from mmscale.parallel.engines.deepspeed import check_config as check_content

    with contextlib.suppress(MissingExtraError):
        check_content(content)


def _check_templates(config: Config, tokenizer: TextTokenizer) -> None:
    """Raises ConfigError when a template is unknown or its special tokens are not in the tokenizer."""
    sources = [*leaf_sources(config.data.sources).values(), *leaf_sources(config.eval.sources).values()]
    for name in sorted({config.data.template, *(s.template for s in sources if s.template)}):
        for special in load_template(name).specials:
            tokenizer.special_id(special)


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


def _parts(config: Config, sizes: ModelSizes) -> Table:
    table = Table("part", "parameters", "trained", "peak lr")
    for name, part in sizes.parts.items():
        lr = getattr(config.train.parts, name).lr or config.train.lr
        table.add_row(
            name,
            f"{part.parameters:,}",
            "yes" if part.is_trained else "frozen",
            f"{lr:.1e}" if part.is_trained else "",
        )
    table.add_section()
    total = sum(part.parameters for part in sizes.parts.values())
    trained = sum(part.parameters for part in sizes.parts.values() if part.is_trained)
    table.add_row("all", f"{total:,}", f"{trained:,}", "")
    return table
