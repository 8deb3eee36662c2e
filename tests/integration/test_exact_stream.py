"""The token stream of a run is one and the same for any number of workers and ranks, switched at any step, killed at any time."""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mmscale.config.schema import CostConfig, DataConfig, SourceConfig
from mmscale.data_tools.writer import ShardWriter
from mmscale.streaming.loader import Stream, StreamState
from mmscale.streaming.rows import encode_row
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.types import ImageSpec, MediaSpecs, Turn

SPECS = MediaSpecs(ImageSpec(size=8, tokens=4))
BATCH, STEPS = 4, 50  # 200 packs
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer, texts of all lengths in several shards, pictures of which some are damaged, and a source of one row."""
    folder = tmp_path_factory.mktemp("exact")
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    (folder / "tokenizer").mkdir()
    backend.save(str(folder / "tokenizer" / "tokenizer.json"))
    specials = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(specials))
    rng = random.Random(0)
    with ShardWriter(folder / "text", max_samples=90) as writer:
        for i in range(400):
            writer.write(f"{i:03}", {"json": row(f"question {i} " + "q" * rng.randrange(90), "a" * rng.randrange(40))})
    with ShardWriter(folder / "images", max_samples=40) as writer:
        for i in range(100):
            data = picture(i)
            writer.write(f"{i:03}", {"json": row(f"<image>\n{i}", "yes"), "png": data[:-60] if i % 17 == 5 else data})
    with ShardWriter(folder / "one") as writer:
        writer.write("only", {"json": row("the only one", "yes")})
    return folder


def row(user, answer):
    return encode_row([Turn("user", user), Turn("assistant", answer)])


def picture(i):
    buffer = BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def open_stream(folder, workers, dp_rank=0, dp_size=1):
    sources = {
        "text": SourceConfig(path="text", weight=3),
        "others": SourceConfig(
            sources={"images": SourceConfig(path="images"), "one": SourceConfig(path="one", repeat=3)}, weight=1
        ),
    }
    data = DataConfig(root=str(folder), sources=sources, seq_len=256, plan_group=4, window=64, max_bad=1.0, prefetch=2)
    sizes = {"global_batch": BATCH, "dp_rank": dp_rank, "dp_size": dp_size, "workers": workers}
    tokenizer = TextTokenizer.load(folder / "tokenizer")
    return Stream.open(data, sources, tokenizer, SPECS, cost=CostConfig(token=1, pair=1e-3, vision_input=9), **sizes)


def pack_hash(pack):
    parts = hashlib.sha256(json.dumps([pack.ids, pack.lengths]).encode())
    for tensor in (pack.input_ids, pack.labels, *(m.data for m in pack.media.values())):
        parts.update(tensor.numpy().tobytes())
    return parts.hexdigest()


def read(folder, saved, num_steps, workers, dp_size):
    """Hashes of the packs of some steps in plan order, read by all ranks, and the data state after them as JSON."""
    streams = [open_stream(folder, workers, rank, dp_size) for rank in range(dp_size)]
    state = StreamState(streams[0].facts) if saved is None else streams[0].restore(json.loads(saved))
    per_rank = [s.steps(None if saved is None else s.restore(json.loads(saved))) for s in streams]
    hashes = []
    for _ in range(num_steps):
        batches = [next(steps) for steps in per_rank]
        planned = batches[0].planned
        assert all(b.planned == planned and b.ids == batches[0].ids for b in batches)
        by_pack = {}
        for rank, batch in enumerate(batches):
            by_pack.update(zip(planned.for_rank(rank, dp_size), map(pack_hash, batch.packs), strict=True))
        hashes += [by_pack[pack] for pack in planned.packs]
        skips = [skip for b in batches for pack in b.packs for skip in pack.skipped]
        states = {json.dumps(b.state_after(state, skips).to_dict()) for b in batches}
        assert len(states) == 1
        state = batches[0].state_after(state, skips)
    for steps in per_rank:
        steps.close()
    return hashes, json.dumps(state.to_dict())


@pytest.fixture(scope="module")
def expected(folder):
    """The hashes of 200 packs and the state after them, from one process."""
    hashes, state = read(folder, None, STEPS, 0, 1)
    assert len(hashes) == 200 and len(set(hashes)) > 190
    return hashes, state


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_and_ranks_change_nothing(folder, expected, workers, dp_size):
    assert read(folder, None, STEPS, workers, dp_size) == expected


def test_any_switch_at_any_step_changes_nothing(folder, expected, seed):
    rng, saved, hashes = random.Random(seed), None, []
    while len(hashes) < STEPS * BATCH:
        num_steps = min(rng.randint(1, 12), STEPS - len(hashes) // BATCH)
        more, saved = read(folder, saved, num_steps, rng.choice([0, 1, 3]), rng.choice([1, 2, 4]))
        hashes += more
    assert (hashes, saved) == expected


def read_and_save(folder, run, workers):
    """Reads on from the saved state and saves after every step, until the end or a kill."""
    path = Path(run) / "state.json"
    stream = open_stream(folder, workers)
    state = stream.restore(json.loads(path.read_text())) if path.exists() else None
    steps = stream.steps(state)
    with (Path(run) / "packs.jsonl").open("a") as log:
        while state is None or state.plan.step < STEPS:
            batch = next(steps)
            log.write(json.dumps([batch.planned.step, [pack_hash(p) for p in batch.packs]]) + "\n")
            log.flush()
            state = batch.state_after(state, [skip for pack in batch.packs for skip in pack.skipped])
            path.with_suffix(".tmp").write_text(json.dumps(state.to_dict()))
            os.replace(path.with_suffix(".tmp"), path)
            time.sleep(0.02)  # as a step would take, so that the kills come in between
    steps.close()


def test_kill_9_at_random_points_changes_nothing(folder, expected, tmp_path, seed):
    rng, kills = random.Random(seed), 0
    while True:
        reader = FORK.Process(target=read_and_save, args=(folder, tmp_path, rng.choice([0, 1, 3])))
        reader.start()
        reader.join(rng.uniform(0.05, 0.6) if kills < 8 else 120)
        if reader.exitcode is not None:
            assert reader.exitcode == 0
            break
        os.kill(reader.pid, signal.SIGKILL)
        reader.join()
        kills += 1
    steps, complete = {}, 0
    for line in (tmp_path / "packs.jsonl").read_text().splitlines():
        try:
            step, hashes = json.loads(line)
        except ValueError:
            continue  # the line in which a kill fell; its step was read again
        assert steps.setdefault(step, hashes) == hashes  # a step that was read again is the same
        complete += 1
    print(f"{kills} kills, {complete} steps read for {STEPS}")
    by_step = [step for number in range(STEPS) for step in steps[number]]
    order = [dict(zip(p.for_rank(0, 1), steps[p.step], strict=True)) for p in plan_steps(folder)]
    assert [hashes[pack] for hashes, p in zip(order, plan_steps(folder), strict=True) for pack in p.packs] == expected[
        0
    ]
    assert sorted(by_step) == sorted(expected[0])
    assert (tmp_path / "state.json").read_text() == expected[1]
    assert kills >= 3


def plan_steps(folder):
    stream = open_stream(folder, 0)
    return [
        step for step, _ in zip(stream.plan.steps(StreamState(stream.facts).plan, BATCH), range(STEPS), strict=False)
    ]
