"""A run's stream as `mmscale train` opens it, from its config, on one process and without workers; for the tools that look."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmscale.config.cost import run_cost
from mmscale.config.load import load_config
from mmscale.config.mixture import is_stream_mode
from mmscale.config.schema import Config
from mmscale.config.specs import extra_tokens, media_specs
from mmscale.errors import ConfigError
from mmscale.streaming.lengths import ALONE, Turn
from mmscale.streaming.loader import Stream
from mmscale.streaming.tokenizer import TextTokenizer


@dataclass(frozen=True)
class RunStream:
    """A run's config, tokenizer and stream."""

    config: Config
    tokenizer: TextTokenizer
    stream: Stream


def open_run_stream(
    path: Path, overrides: Sequence[str] = (), on_batch: Callable[[], None] = ALONE.on_progress
) -> RunStream:
    """The stream of the run that `mmscale train PATH OVERRIDES` would begin.

    Args:
        path, overrides: of the run.
        on_batch: called after every 1024 samples or fewer while their tokens are counted, which happens once per dataset.

    Raises:
        ConfigError: the config cannot work, or its sources are read in stream mode.
        RefusedInputError: data that is missing or unusable.
    """
    config = load_config(path, overrides)
    if is_stream_mode("data.sources", config.data.sources):
        raise ConfigError(
            "data.sources: expected indexed sources, found `mode: stream`, which has no plan to look at; index the tars first: "
            "mmscale-data index DIR"
        )
    section = config.model.tokenizer
    tokens = (*section.add_tokens, *extra_tokens(config.data))
    tokenizer = TextTokenizer.load(section.path, tokens, section.pad_to_multiple)
    specs = media_specs(config.model, config.data)
    stream = Stream.open(
        config.data,
        config.data.sources,
        tokenizer,
        specs,
        cost=run_cost(config, specs, tokenizer.vocab_size),
        global_batch=config.train.global_batch,
        dp_rank=0,
        dp_size=1,
        workers=0,
        turn=Turn(on_progress=on_batch),
    )
    return RunStream(config, tokenizer, stream)
