"""Which degrees of tensor and sequence parallelism a model and a number of processes allow, from numbers alone.

Every refusal names the nearest degrees that work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from mmscale.config.llm import LlmSizes, read_llm_sizes
from mmscale.config.schema import Config, LlmConfig, ParallelConfig
from mmscale.errors import ConfigError


def data_parallel_size(p: ParallelConfig, world_size: int, llm: LlmConfig | None = None) -> int:
    """Ranks that see different packs.

    Raises:
        ConfigError: the degrees do not fit the world size; the layouts it names fit the heads of `llm` too, when it is given.
    """
    model_ranks = p.tensor * p.ulysses * p.ring
    if world_size % model_ranks:
        more = world_size + model_ranks - world_size % model_ranks
        near = " or ".join(str(n) for n in (world_size - world_size % model_ranks, more) if n)
        layouts = "; ".join(_near_layouts(p, world_size, _known_sizes(llm)))
        raise ConfigError(
            f"parallel.tensor={p.tensor} x parallel.ulysses={p.ulysses} x parallel.ring={p.ring} = {model_ranks} must divide the "
            f"{world_size} processes of this run; start {near} processes, or take the nearest layout for {world_size}: {layouts}"
        )
    return world_size // model_ranks


def is_undecided(p: ParallelConfig) -> bool:
    """Whether the sequence-parallel degrees are still to be chosen (`sp: auto` and no degree given)."""
    return p.sp == "auto" and p.ulysses == p.ring == 1


def check_model(config: Config) -> None:
    """Refuses degrees that do not divide the heads and the vocabulary of the language model.

    Raises:
        ConfigError: such a degree, or a configuration that does not give its heads.
    """
    p = config.parallel
    if p.tensor == p.ulysses == p.ring == 1:
        return
    sizes = read_llm_sizes(config.model.llm)
    check_degrees(p, sizes, config.data.seq_len)
    _check_vocabulary(config, p.tensor, sizes)


def check_degrees(p: ParallelConfig, sizes: LlmSizes, seq_len: int) -> None:
    """Refuses degrees that the heads or the sliding window of a language model do not allow. Raises ConfigError."""
    _check_tensor(p.tensor, sizes)
    _check_ulysses(p, sizes)
    if p.sp == "ring" and p.ring > 1 and sizes.window is not None and sizes.window < seq_len:
        raise ConfigError(
            f"parallel.sp=ring cannot place a sliding window (model.llm: {sizes.window} tokens, data.seq_len={seq_len}); set "
            "parallel.sp=exchange"
        )


def fits_tensor(degree: int, sizes: LlmSizes) -> bool:
    """Whether so many tensor-parallel ranks get whole heads each, and equal shares of the MLP; key/value heads may be fewer
    than ranks and are then replicated."""
    return sizes.heads % degree == 0 and _divides(degree, sizes.kv_heads) and sizes.inner % degree == 0


def fits_ulysses(degree: int, tensor: int, sizes: LlmSizes) -> bool:
    """Whether the heads of one of `tensor` ranks can be dealt out over `degree` Ulysses ranks."""
    return (sizes.heads // tensor) % degree == 0 and _divides(degree, max(1, sizes.kv_heads // tensor))


def possible(fits: Callable[[int], bool], limit: int) -> list[int]:
    """The degrees from 1 to `limit` that fit.

    Example:
        >>> possible(lambda degree: 12 % degree == 0, 12)
        [1, 2, 3, 4, 6, 12]
    """
    return [degree for degree in range(1, limit + 1) if fits(degree)]


def nearest_degrees(wanted: int, degrees: list[int]) -> str:
    """The possible degrees on both sides of the wanted one, for a message.

    Example:
        >>> nearest_degrees(3, [1, 2, 4, 8])
        '2 or 4'
    """
    below = [d for d in degrees if d < wanted][-1:]
    above = [d for d in degrees if d > wanted][:1]
    return " or ".join(str(d) for d in below + above)


def _divides(degree: int, heads: int) -> bool:
    return heads % degree == 0 or degree % heads == 0


def _check_tensor(tensor: int, sizes: LlmSizes) -> None:
    if not fits_tensor(tensor, sizes):
        near = nearest_degrees(tensor, possible(lambda d: fits_tensor(d, sizes), sizes.heads))
        raise ConfigError(
            f"parallel.tensor={tensor} must divide the {sizes.heads} attention heads of model.llm and its MLP of {sizes.inner}, and "
            f"divide or be a multiple of its {sizes.kv_heads} key/value heads; set it to {near}"
        )


def _check_vocabulary(config: Config, tensor: int, sizes: LlmSizes) -> None:
    multiple = config.model.tokenizer.pad_to_multiple
    if multiple % tensor:
        raise ConfigError(
            f"model.tokenizer.pad_to_multiple={multiple} must be a multiple of parallel.tensor={tensor}, whose ranks hold equal "
            f"shares of the vocabulary; set it to {math.lcm(multiple, tensor)}"
        )
    if config.model.llm.path is not None and sizes.vocab is not None and sizes.vocab % tensor:
        rows = sizes.vocab
        near = nearest_degrees(tensor, possible(lambda d: rows % d == 0 and fits_tensor(d, sizes), sizes.heads))
        raise ConfigError(
            f"parallel.tensor={tensor} must divide the vocabulary of {rows} rows in {config.model.llm.path}; set it to {near}, or "
            f"raise model.tokenizer.pad_to_multiple so that the tokenizer has more rows than the weights"
        )


def _check_ulysses(p: ParallelConfig, sizes: LlmSizes) -> None:
    if not fits_ulysses(p.ulysses, p.tensor, sizes):
        heads, kv_heads = sizes.heads // p.tensor, max(1, sizes.kv_heads // p.tensor)
        degrees = possible(lambda d: fits_ulysses(d, p.tensor, sizes), heads)
        near = nearest_degrees(p.ulysses, degrees)
        best = max(d for d in degrees if (p.ulysses * p.ring) % d == 0)
        raise ConfigError(
            f"parallel.ulysses={p.ulysses} must divide the {heads} attention heads and divide or be a multiple of the {kv_heads} "
            f"key/value heads of a tensor-parallel rank (model.llm: {sizes.heads} and {sizes.kv_heads}, parallel.tensor={p.tensor}); "
            f"set it to {near}, or for as many ranks parallel.ulysses={best} and parallel.ring={p.ulysses * p.ring // best}"
        )


def _known_sizes(llm: LlmConfig | None) -> LlmSizes | None:
    try:
        return None if llm is None else read_llm_sizes(llm)
    except ConfigError:  # said once the number of processes is right
        return None


def _near_layouts(p: ParallelConfig, world_size: int, sizes: LlmSizes | None) -> Iterator[str]:
    """The two layouts nearest to `p` whose product divides `world_size` and that the heads allow, as overrides."""
    degrees = possible(lambda d: world_size % d == 0, world_size)
    wanted = (p.tensor, p.ulysses, p.ring)

    def distance(layout: tuple[int, int, int]) -> float:
        return sum(abs(math.log2(have / want)) for have, want in zip(layout, wanted, strict=True))

    layouts = [
        (tensor, ulysses, ring)
        for tensor in degrees
        if sizes is None or fits_tensor(tensor, sizes)
        for ulysses in degrees
        if world_size % (tensor * ulysses) == 0 and (sizes is None or fits_ulysses(ulysses, tensor, sizes))
        for ring in degrees
        # a degree of 1 was not asked for and stays
        if world_size % (tensor * ulysses * ring) == 0
        and all(want > 1 or have == 1 for have, want in zip((tensor, ulysses, ring), wanted, strict=True))
    ]
    for layout in sorted(layouts, key=lambda one: (distance(one), one))[:2]:
        changed = zip(("tensor", "ulysses", "ring"), layout, wanted, strict=True)
        yield " ".join(f"parallel.{key}={have}" for key, have, want in changed if have != want)
