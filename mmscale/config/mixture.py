"""A mixture, nested as the config has it, as a flat list of named sources and their exact shares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction

from mmscale.config.schema import SourceConfig
from mmscale.errors import ConfigError

Sources = Mapping[str, SourceConfig]


def leaf_sources(sources: Sources) -> dict[str, SourceConfig]:
    """The sources that have data of their own, by name: those of a mixture inside `web` are `web.a`, `web.b`.

    Sorted by name, so that the order of the config's keys says nothing. A template stands for all sources below it.

    Raises:
        ConfigError: the mixture is not well formed, see `check_mixture`.

    Example:
        >>> nested = SourceConfig(sources={"b": SourceConfig(path="b"), "a": SourceConfig(path="a")})
        >>> list(leaf_sources({"web": nested}))
        ['web.a', 'web.b']
    """
    found: dict[str, SourceConfig] = {}
    for name, source in _leaves("", sources, None):
        if name in found:
            raise ConfigError(f"data.sources: two sources are named '{name}'; rename one of them")
        found[name] = source
    return dict(sorted(found.items()))


def mixture_shares(sources: Sources, num_rows: Mapping[str, int]) -> dict[str, Fraction]:
    """The share of the draws of every leaf, exact and summing to 1.

    With weights, siblings share in their proportion. Without, by size: rows times `repeat`, those below a mixture together,
    so that each sample comes `repeat` times while those of a source with `repeat: 1` come once.

    Args:
        sources: the mixture.
        num_rows: leaf name -> rows of an epoch, each >= 1.

    Example:
        >>> parts = {"a": SourceConfig(path="a"), "b": SourceConfig(path="b", repeat=2)}
        >>> mixture_shares(parts, {"a": 6, "b": 3})
        {'a': Fraction(1, 2), 'b': Fraction(1, 2)}
    """
    return dict(sorted(_shares("", sources, num_rows, Fraction(1))))


def is_stream_mode(key: str, sources: Sources) -> bool:
    """Whether the sources are read without an index. `key`: where they stand in the config, for the error text.

    Raises:
        ConfigError: only some of them are.
    """
    modes = {name: source.mode for name, source in leaf_sources(sources).items()}
    if len(set(modes.values())) > 1:
        streamed = ", ".join(name for name, mode in modes.items() if mode == "stream")
        raise ConfigError(
            f"{key}: expected all sources indexed or all of `mode: stream`, found only {streamed} of `mode: stream`; index these "
            "too (mmscale-data index DIR), or stream the others"
        )
    return "stream" in modes.values()


def check_mixture(key: str, sources: Sources) -> None:
    """Refuses what cannot be a mixture: weights on some siblings only, keys that have no meaning where they stand.

    Args:
        key: where the mixture stands in the config, such as `data.sources`; for the error text.

    Raises:
        ConfigError: with the key, its value and a way out.
    """
    weighted = [name for name, source in sources.items() if source.weight is not None]
    without = [name for name in sources if name not in weighted]
    if weighted and without:
        raise ConfigError(
            f"{key}: expected a weight on every source or on none, found none on {', '.join(without)}; "
            f"set {key}.{without[0]}.weight or remove the others"
        )
    for name, source in sources.items():
        where = f"{key}.{name}"
        if (source.path is None) == (source.sources is None):
            found = "neither" if source.path is None else "both"
            raise ConfigError(f"{where}: expected `path` or `sources`, found {found}; set one of them")
        if source.repeat > 1 and source.weight is not None:
            raise ConfigError(
                f"{where}: repeat={source.repeat} beside weight={source.weight:g} would say the share twice; "
                f"remove one of them (weight={source.weight * source.repeat:g} has the effect of both)"
            )
        if source.sources is not None:
            _check_nested(where, source)
            check_mixture(f"{where}.sources", source.sources)


def _check_nested(where: str, source: SourceConfig) -> None:
    """Refuses keys of a mixture inside the mixture that only a source with data of its own can have."""
    if not source.sources:
        raise ConfigError(f"{where}.sources: expected at least one source, found none; name one or remove {where}")
    for name in ("max_samples", "max_epochs", "mode", "allow_commands"):
        value = getattr(source, name)
        if value != SourceConfig.model_fields[name].default:
            raise ConfigError(
                f"{where}.{name}={value}: a mixture has no data of its own; set it on the sources below it"
            )


def _leaves(prefix: str, sources: Sources, template: str | None) -> Iterator[tuple[str, SourceConfig]]:
    for name, source in sources.items():
        own = source.template or template
        if source.sources is None:
            yield prefix + name, source.model_copy(update={"template": own})
        else:
            yield from _leaves(f"{prefix}{name}.", source.sources, own)


def _size(prefix: str, name: str, source: SourceConfig, num_rows: Mapping[str, int]) -> Fraction:
    """Rows times repeats of a source and all below it."""
    if source.sources is None:
        return Fraction(source.repeat * num_rows[prefix + name])
    below = (_size(f"{prefix}{name}.", child, config, num_rows) for child, config in source.sources.items())
    return source.repeat * sum(below, Fraction(0))


def _shares(
    prefix: str, sources: Sources, num_rows: Mapping[str, int], whole: Fraction
) -> Iterator[tuple[str, Fraction]]:
    parts = {
        name: Fraction(str(source.weight)) if source.weight is not None else _size(prefix, name, source, num_rows)
        for name, source in sources.items()
    }
    total = sum(parts.values(), Fraction(0))
    for name, source in sources.items():
        share = whole * parts[name] / total
        if source.sources is None:
            yield prefix + name, share
        else:
            yield from _shares(f"{prefix}{name}.", source.sources, num_rows, share)
