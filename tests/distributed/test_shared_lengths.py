"""Ranks share the work of computing lengths, and wait for each other longer than a collective may take."""

from __future__ import annotations

import dataclasses
import time
from datetime import timedelta
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from mmscale.config.schema import CostConfig, DataConfig, SourceConfig
from mmscale.data_tools.writer import ShardWriter
from mmscale.errors import RefusedInputError
from mmscale.parallel.mesh import Mesh
from mmscale.streaming import lengths as lengths_module
from mmscale.streaming.chat import load_template
from mmscale.streaming.encode import Encoder
from mmscale.streaming.lengths import Turn, sample_lengths
from mmscale.streaming.loader import Stream
from mmscale.streaming.rows import encode_row
from mmscale.streaming.shards import Shard, ShardSet
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.train import setup
from mmscale.types import MediaSpecs
from mmscale.types import Turn as ChatTurn


def count_lengths(mesh: Mesh, folder: str, tokenizer_folder: str) -> Any:
    """(shard name -> seconds at which this rank looked for its lengths and at which it had counted and stored them, all tokens)

    The clock is the machine's, the same for all ranks. Whoever counts first waits until every rank has begun a shard.
    """
    counted: dict[str, tuple[float, float]] = {}
    shard_lengths, compute = lengths_module._shard_lengths, lengths_module._compute
    barrier = dist.new_group(backend="gloo")
    came: dict[str, float] = {}

    def look(shard: Shard, *others: Any) -> Any:
        came[shard.name] = time.monotonic()
        found = shard_lengths(shard, *others)
        if shard.name in counted:
            counted[shard.name] = (came[shard.name], time.monotonic())
        return found

    def count(shard: Shard, *others: Any) -> Any:
        if not counted:
            dist.barrier(barrier)
        counted[shard.name] = (0.0, 0.0)
        return compute(shard, *others)

    lengths_module._compute, lengths_module._shard_lengths = count, look
    try:
        together = setup._Together(mesh)
        template, tokenizer = load_template("chatml"), TextTokenizer.load(tokenizer_folder)
        encoder = Encoder(tokenizer, template, MediaSpecs(), max_tokens=1000, on_long="drop", max_pixels=1)
        shards = ShardSet.open(Path(folder) / "rows", "rows")
        turn = Turn(mesh.rank, mesh.world_size, together.still_working)
        lengths = sample_lengths(shards, encoder, turn)
        together.wait()
    finally:
        lengths_module._compute, lengths_module._shard_lengths = compute, shard_lengths
    return counted, lengths.tokens.tolist()


def test_every_rank_counts_a_part(ranks, demo_data: Path, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "rows", max_samples=20) as writer:
        for i in range(400):
            turns = [ChatTurn("user", "q" * (i % 50)), ChatTurn("assistant", "a")]
            writer.write(f"{i:03}", {"json": encode_row(turns)})
    results = ranks(4).run(count_lengths, str(tmp_path), str(demo_data / "tokenizer"))
    assert len({tuple(tokens) for _, tokens in results}) == 1 and len(results[0][1]) == 400
    counted = [own for own, _ in results]
    assert len({next(iter(own)) for own in counted}) == 4, "every rank begins with another shard"
    assert len({name for own in counted for name in own}) == 20
    for one, other in combinations(counted, 2):
        for name in one.keys() & other.keys():
            (looked, stored), (looked_there, stored_there) = one[name], other[name]
            assert looked < stored_there and looked_there < stored, (
                f"{name} was counted although another rank had stored it"
            )
    assert ranks(4).run(count_lengths, str(tmp_path), str(demo_data / "tokenizer")) == [({}, results[0][1])] * 4


def wait_for_a_slow_rank(mesh: Mesh, timeout_s: float, work_s: float) -> float:
    """Seconds until all ranks are together, when the last rank works for longer than a collective may take."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    together = setup._Together(dataclasses.replace(mesh, host_group=group))
    setup._JOIN_EVERY_S = timeout_s / 4
    started = time.monotonic()
    while mesh.rank == mesh.world_size - 1 and time.monotonic() - started < work_s:
        together.still_working()
        time.sleep(0.01)
    together.wait()
    return time.monotonic() - started


def test_ranks_wait_longer_than_a_collective_may_take(ranks) -> None:
    times = ranks(2).run(wait_for_a_slow_rank, 1.0, 2.5)
    assert all(2.4 < seconds < 10 for seconds in times)


def open_own_folder(mesh: Mesh, folder: str, tokenizer_folder: str) -> str:
    """What a rank says to the data of its own folder."""
    sources = {"rows": SourceConfig(path=f"rows{mesh.rank}" if "differ" in folder else "rows0")}
    data = DataConfig(root=folder, sources=sources, seq_len=100)
    stream = Stream.open(
        data, sources, TextTokenizer.load(tokenizer_folder), MediaSpecs(), cost=CostConfig(token=1, pair=0),
        global_batch=2, dp_rank=mesh.rank, dp_size=mesh.world_size, workers=0,
    )  # fmt: skip
    try:
        setup._check_same_data(mesh, stream.facts.digests())
    except RefusedInputError as error:
        return str(error)
    return "same"


@pytest.mark.parametrize("case", ["equal", "differ"])
def test_ranks_that_see_other_data_are_refused_by_name(ranks, demo_data: Path, tmp_path: Path, case: str) -> None:
    for rank in range(2):
        with ShardWriter(tmp_path / case / f"rows{rank}") as writer:
            for i in range(9 - rank):
                writer.write(f"{i:03}", {"json": encode_row([ChatTurn("user", "q"), ChatTurn("assistant", "a")])})
    said = ranks(2).run(open_own_folder, str(tmp_path / case), str(demo_data / "tokenizer"))
    expected = {"equal": "same", "differ": "found other lengths of 'rows', shards of 'rows' on rank 1 than on rank 0"}
    assert all(expected[case] in text for text in said)
