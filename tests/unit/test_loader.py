"""The stream: the same packs for any number of workers and ranks, a resume that is a jump, and no sample lost or hidden."""

import gc
import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import threading
from collections import Counter
from dataclasses import fields, replace
from fractions import Fraction
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from mmscale.config.schema import CostConfig, DataConfig, SourceConfig
from mmscale.data_tools.writer import ShardWriter
from mmscale.errors import CheckpointError, ConfigError, DataError, MissingExtraError, RefusedInputError
from mmscale.streaming.encode import Encoder
from mmscale.streaming.loader import Stream, StreamState
from mmscale.streaming.plan import Plan
from mmscale.streaming.rows import encode_row
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.types import AudioSpec, ImageSpec, MediaSpecs, PackedBatch, Turn

SPECS = MediaSpecs(ImageSpec(size=8, tokens=4))
COST = CostConfig(token=1.0, pair=1e-4, vision_input=50.0)
NUM_TEXT, NUM_IMAGES, BROKEN = 41, 23, (3, 11, 12)


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer):
    return TextTokenizer.load(byte_tokenizer)


def picture(i, whole=True):
    buffer = BytesIO()
    pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue() if whole else buffer.getvalue()[:-60]  # the header still says 8 x 8


def row(user, answer="yes"):
    return encode_row([Turn("user", user), Turn("assistant", answer)])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    with ShardWriter(folder / "text", max_samples=16) as writer:
        for i in range(NUM_TEXT):
            writer.write(f"{i:03}", {"json": row("q" * (i * 7 % 60), "a" * (i % 5))})
        writer.write("long", {"json": row("x" * 400)})
    with ShardWriter(folder / "images") as writer:
        for i in range(NUM_IMAGES):
            writer.write(f"{i:03}", {"json": row(f"<image>\n{i}"), "png": picture(i, whole=i not in BROKEN)})
    return folder


def open_stream(
    root, tokenizer, dp_rank=0, dp_size=1, workers=0, sources=("text", "images"), global_batch=4, configs=None, **data
):
    data = {"seq_len": 256, "plan_group": 4, "window": 32, "seed": 3, "root": str(root), **data}
    configs = configs or {name: SourceConfig(path=name) for name in sources}
    config = DataConfig(sources=configs, **data)
    sizes = {"global_batch": global_batch, "dp_rank": dp_rank, "dp_size": dp_size, "workers": workers}
    return Stream.open(config, configs, tokenizer, SPECS, cost=COST, **sizes)


def take(stream, num_steps, state=None):
    """Steps of one rank, with the state after each from this rank's skips alone."""
    steps, out = stream.steps(state), []
    try:
        for _ in range(num_steps):
            batch = next(steps)
            state = batch.state_after(state, [s for p in batch.packs for s in p.skipped])
            out.append((batch, state))
    finally:
        steps.close()
    return out


def same(a, b):
    if isinstance(a, PackedBatch):
        plain = [f.name for f in fields(a) if f.name in ("lengths", "ids", "tokens", "skipped")]
        tensors = list(a.tensors()), list(b.tensors())
        return all(getattr(a, n) == getattr(b, n) for n in plain) and all(map(torch.equal, *tensors))
    return len(a) == len(b) and all(map(same, a, b))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_while_planning_reaches_the_trainer_and_ends_the_thread(root, tokenizer, workers, monkeypatch):
    plan_window = Plan._plan_window

    def fail_in_window_3(self, window, *place):
        if window == 3:
            raise DataError("no window 3")
        return plan_window(self, window, *place)

    monkeypatch.setattr(Plan, "_plan_window", fail_in_window_3)
    before = set(threading.enumerate())
    with pytest.raises(DataError, match="no window 3"):
        take(open_stream(root, tokenizer, workers=workers, seed=77), 100)
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("plan")]


def test_workers_change_nothing(root, tokenizer):
    alone = take(open_stream(root, tokenizer), 8)
    for workers in (1, 2):
        shared = take(open_stream(root, tokenizer, workers=workers), 8)
        for (a, state_a), (b, state_b) in zip(alone, shared, strict=True):
            assert same(a.packs, b.packs) and a.ids == b.ids and a.num_epochs == b.num_epochs
            assert state_a.to_dict() == state_b.to_dict()
    assert sum(len(p.skipped) for b, _ in alone for p in b.packs) > 0
    assert not same(alone[0][0].packs, alone[1][0].packs)


@pytest.mark.parametrize("dp_size", [2, 4])
def test_ranks_share_one_stream(root, tokenizer, dp_size):
    alone = [batch for batch, _ in take(open_stream(root, tokenizer), 8)]
    by_rank = [[b for b, _ in take(open_stream(root, tokenizer, r, dp_size), 8)] for r in range(dp_size)]
    for step, whole in enumerate(alone):
        ranks = [batches[step] for batches in by_rank]
        assert all(b.ids == whole.ids for b in ranks)
        assert {len(b.packs) for b in ranks} == {4 // dp_size}
        ids = Counter(i for b in ranks for p in b.packs for i in p.ids)
        assert ids == Counter(whole.ids)


def test_resume_is_exact_at_any_step_and_size(root, tokenizer, seed):
    straight = take(open_stream(root, tokenizer), 16)
    rng, done, state, stream = random.Random(seed), 0, None, None
    while done < 16:
        workers, num_steps = rng.choice([0, 0, 1]), rng.randint(1, 6)
        stream = open_stream(root, tokenizer, workers=workers)
        state = None if state is None else stream.restore(json.loads(json.dumps(state)))
        for batch, after in take(stream, min(num_steps, 16 - done), state):
            expected, expected_state = straight[done]
            assert same(batch.packs, expected.packs) and batch.ids == expected.ids
            assert after.to_dict() == expected_state.to_dict()
            done, state = done + 1, after.to_dict()
    assert len(json.dumps(state)) < 8_000


def test_every_sample_is_delivered_or_skipped_by_name(root, tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mmscale"), "propagate", True)
    with caplog.at_level(logging.INFO, "mmscale"):
        steps = take(open_stream(root, tokenizer), 40)
    epochs = {}
    for batch, _ in steps:
        skips = {(s.source, s.epoch, s.id): s for p in batch.packs for s in p.skipped}
        for (_, pack), planned in zip(enumerate(batch.packs), batch.planned.for_rank(0, 1), strict=True):
            for sample_id, draw in zip(pack.ids, planned, strict=True):
                source = ("images", "text")[draw.source_idx]
                reason = (
                    skips[source, draw.epoch, sample_id].reason if (source, draw.epoch, sample_id) in skips else None
                )
                epochs.setdefault((source, draw.epoch), []).append((sample_id, reason))
    images, text = epochs["images", 0], epochs["text", 0]
    assert sorted(i for i, _ in images) == [f"images/000000.tar:{i:03}" for i in range(NUM_IMAGES)]
    assert sorted(i for i, r in images if r == "decode_image") == [f"images/000000.tar:{i:03}" for i in BROKEN]
    assert len({i for i, _ in text}) == len(text) == NUM_TEXT and all(r is None for _, r in text)
    lines = [r.getMessage() for r in caplog.records if "indexed" in r.getMessage()]
    assert "epoch 0 of 'images': indexed 23 = delivered 20 + skipped 3 (decode_image 3)" in lines
    assert "epoch 0 of 'text': indexed 42 = delivered 41 + skipped 1 (too_long 1)" in lines
    final = steps[-1][1]
    assert all(sum(c.values()) < final.facts.sources[s].num_rows for (s, _), c in final.account.items())
    assert final.num_skipped > final.num_bad > 0


def test_a_bad_sample_does_not_move_the_plan(root, tokenizer):
    for batch, _ in take(open_stream(root, tokenizer), 10):
        for pack, planned in zip(batch.packs, batch.planned.for_rank(0, 1), strict=True):
            assert pack.lengths == tuple(d.tokens for d in planned)
            for skip in pack.skipped:
                i = pack.ids.index(skip.id)
                span = slice(int(pack.cu_seqlens[i]), int(pack.cu_seqlens[i + 1]))
                assert (pack.labels[span] == -100).all()
                assert skip.offset > 0 and skip.source == "images" and skip.reason == "decode_image"


def test_on_error_raise_names_the_sample(root, tokenizer):
    with pytest.raises(DataError, match=r"images/000000\.tar:0(03|11|12) at offset \d+.*decode_image"):
        take(open_stream(root, tokenizer, on_error="raise", workers=1), 10)


def test_on_error_raise_refuses_what_the_index_already_knows(tmp_path, tokenizer):
    with ShardWriter(tmp_path / "images") as writer:
        for i in range(4):
            writer.write(f"{i}", {"json": row("<image>"), "png": picture(i) if i != 2 else b"no picture"})
    with pytest.raises(RefusedInputError, match=r"images/000000\.tar:2 at offset \d+.*decode_image"):
        open_stream(tmp_path, tokenizer, sources=("images",), on_error="raise")
    batches = take(open_stream(tmp_path, tokenizer, sources=("images",)), 4)
    assert {d.reason for b, _ in batches for d in b.planned.dropped} == {"decode_image"}
    named = {(s.id, s.reason, s.source, s.offset > 0) for b, _ in batches for s in b.left_out()}
    assert named == {("images/000000.tar:2", "decode_image", "images", True)}
    assert all(not p.skipped for b, _ in batches for p in b.packs)
    assert batches[-1][1].num_bad > 0


def test_too_many_bad_samples_stop_the_run(root, tokenizer, monkeypatch):
    monkeypatch.setattr("mmscale.streaming.state.JUDGED_FROM", 64)
    take(open_stream(root, tokenizer, max_bad=0.5), 12)
    with pytest.raises(DataError, match=r"data\.max_bad=1\.0%.*decode_image"):
        take(open_stream(root, tokenizer, max_bad=0.01), 12)


def test_an_unexpected_failure_costs_one_sample(root, tokenizer, monkeypatch):
    whole = Encoder.encode

    def encode(self, sample):
        if sample.id.endswith("text/000000.tar:005"):
            raise ZeroDivisionError("what a decoder may do")
        return whole(self, sample)

    monkeypatch.setattr(Encoder, "encode", encode)
    reasons = Counter(
        s.reason
        for b, _ in take(open_stream(root, tokenizer, sources=("text",)), 8)
        for p in b.packs
        for s in p.skipped
    )
    assert set(reasons) == {"unexpected"} and reasons["unexpected"] >= 1


def test_a_missing_extra_is_no_bad_sample(root, tokenizer, monkeypatch):
    def encode(self, sample):
        raise MissingExtraError("torchaudio", "audio", "audio input")

    monkeypatch.setattr(Encoder, "encode", encode)
    with pytest.raises(ConfigError, match=r"mmscale\[audio\]"):
        take(open_stream(root, tokenizer, workers=1), 1)


def test_missing_audio_support_is_refused_at_the_start(root, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    monkeypatch.setitem(sys.modules, "torchaudio.functional", None)
    config = DataConfig(sources={"text": SourceConfig(path="text")}, seq_len=64, root=str(root))
    specs = MediaSpecs(audio=AudioSpec(rate_hz=16_000, window_samples=16_000, tokens=10))
    sizes = {"cost": COST, "global_batch": 1, "dp_rank": 0, "dp_size": 1, "workers": 0}
    with pytest.raises(MissingExtraError, match=r"mmscale\[audio\]"):
        Stream.open(config, config.sources, tokenizer, specs, **sizes)


def test_a_length_that_was_not_planned_is_a_skip(root, tokenizer, monkeypatch):
    whole = Encoder.encode

    def encode(self, sample):
        document = whole(self, sample)
        if not sample.id.endswith(":007"):
            return document
        return type(document)(document.id, document.input_ids[:-1], document.is_target[:-1], document.media)

    monkeypatch.setattr(Encoder, "encode", encode)
    batches = [b for b, _ in take(open_stream(root, tokenizer, sources=("text",)), 8)]
    assert {s.reason for b in batches for p in b.packs for s in p.skipped} == {"length"}


def test_other_data_or_packing_is_refused_at_resume(root, tokenizer):
    state = take(open_stream(root, tokenizer), 1)[0][1].to_dict()
    for changed, part in (
        ({"seq_len": 128}, r"packing \(seq_len=256 .* then, seq_len=128"),
        ({"plan_group": 2}, r"packing .*plan_group=2"),
        ({"shuffle_block": 8}, r"packing .*shuffle_block=8"),
        ({"template": "plain"}, "encoding"),
    ):
        with pytest.raises(CheckpointError, match=part):
            open_stream(root, tokenizer, **changed).restore(state)
    other_cost = replace(open_stream(root, tokenizer), facts=_facts_with(root, tokenizer, cost="token=2"))
    with pytest.raises(CheckpointError, match=r"cost \(.*token=1 .* then, token=2 now"):
        other_cost.restore(state)
    with pytest.raises(CheckpointError, match=r"planner \(none then"):
        open_stream(root, tokenizer).restore({"fingerprint": {}})
    restored = open_stream(root, tokenizer, global_batch=8, workers=1, max_bad=0.3).restore(state)
    assert isinstance(restored, StreamState)


def _facts_with(root, tokenizer, **changed):
    facts = open_stream(root, tokenizer).facts
    return replace(facts, fingerprint={**facts.fingerprint, **changed})


def test_another_mixture_goes_on_at_resume(root, tokenizer):
    before = take(open_stream(root, tokenizer), 3)
    state = before[-1][1].to_dict()
    alone = open_stream(root, tokenizer, sources=("text",))
    after = take(alone, 6, alone.restore(state))
    ids = Counter(i for b, _ in [*before, *after] for i in b.ids if i.startswith("text") and b.planned.packs)
    assert after and all(i.startswith("text/") for b, _ in after for i in b.ids)
    drawn = Counter((d.epoch, d.row) for b, _ in after for p in b.planned.packs for d in p)
    assert max(drawn.values()) == 1 and set(ids) >= {f"text/00000{n // 16}.tar:{n:03}" for n in range(NUM_TEXT)}


def test_the_order_of_the_keys_says_nothing(root, tokenizer):
    one, two = (take(open_stream(root, tokenizer, sources=s), 4) for s in (("text", "images"), ("images", "text")))
    assert all(a.ids == b.ids and x.to_dict() == y.to_dict() for (a, x), (b, y) in zip(one, two, strict=True))


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_the_end_of_all_sources_is_said_and_nothing_is_lost(root, tokenizer, dp_size):
    configs = {name: SourceConfig(path=name, max_epochs=1) for name in ("text", "images")}
    came = []
    for rank in range(dp_size):
        stream = open_stream(root, tokenizer, rank, dp_size, configs=configs)
        steps = stream.steps()
        batches = []
        with pytest.raises(DataError, match=r"ends with step \d+.*max_epochs.*train\.steps=\d+"):
            while True:
                batches.append(next(steps))
        assert {len(b.packs) for b in batches} == {4 // dp_size}
        came += [i for b in batches for p in b.packs for i in p.ids if i != "filler"]
    assert Counter(came) == Counter(i for b in batches for i in b.ids)
    assert len(came) == len(set(came)) == NUM_TEXT + NUM_IMAGES


def test_a_mixture_inside_the_mixture_with_limits(root, tokenizer):
    inner = {"t": SourceConfig(path="text", max_samples=5), "i": SourceConfig(path="images", repeat=2)}
    stream = open_stream(root, tokenizer, configs={"both": SourceConfig(sources=inner)})
    assert list(stream.facts.sources) == ["both.i", "both.t"]
    assert [s.share for s in stream.plan.sources] == [Fraction(46, 51), Fraction(5, 51)]
    assert stream.facts.sources["both.t"].unplanned == {"max_samples": NUM_TEXT + 1 - 5}
    ids = {i for b, _ in take(stream, 12) for i in b.ids if i.startswith("text")}
    assert 0 < len(ids) <= 5


def test_too_many_images_are_left_out_by_name(tmp_path, tokenizer):
    with ShardWriter(tmp_path / "images") as writer:
        for i in range(6):
            pictures = {f"{n}.png": picture(i) for n in range(i % 3 + 1)}
            writer.write(f"{i}", {"json": row("<image>" * len(pictures)), **pictures})
    stream = open_stream(tmp_path, tokenizer, sources=("images",), max_images_per_pack=2, max_bad=0.0)
    batches = [b for b, _ in take(stream, 4)]
    assert {(d.row, d.reason) for b in batches for d in b.planned.dropped} == {
        (2, "too_many_images"),
        (5, "too_many_images"),
    }
    assert all(m.data.shape[0] <= 2 for b in batches for p in b.packs for m in p.media.values())


def test_bad_samples_in_a_row_stop_the_run(tmp_path, tokenizer):
    with ShardWriter(tmp_path / "images") as writer:
        for i in range(30):
            writer.write(f"{i:02}", {"json": row("<image>"), "png": picture(i, whole=i < 5)})
    take(open_stream(tmp_path, tokenizer, sources=("images",), max_bad=1.0), 4)
    with pytest.raises(DataError, match=r"'images'.*max_bad_in_a_row=3.*images/000000\.tar:\d\d \(decode_image"):
        take(open_stream(tmp_path, tokenizer, sources=("images",), max_bad=1.0, max_bad_in_a_row=3), 20)


def test_a_global_batch_that_does_not_divide_is_refused(root, tokenizer):
    with pytest.raises(ConfigError, match=r"train\.global_batch=4.*3"):
        open_stream(root, tokenizer, dp_size=3)


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_a_pass_gives_every_rank_the_same_number_of_turns(root, tokenizer, dp_size):
    turns = [list(open_stream(root, tokenizer, r, dp_size).passes()) for r in range(dp_size)]
    assert len({len(t) for t in turns}) == 1
    packs = [p for t in turns for p in t if p is not None]
    ids = Counter(i for p in packs for i in p.ids)
    assert len(ids) == NUM_TEXT + NUM_IMAGES and set(ids.values()) == {1}
    assert sorted(s.id[-3:] for p in packs for s in p.skipped) == [f"{i:03}" for i in BROKEN]
    assert all(p is not None for t in turns for p in t[:-1])


def test_a_short_pass_holds_the_first_packs(root, tokenizer):
    whole, short = (list(open_stream(root, tokenizer, workers=w).passes(n)) for w, n in ((0, None), (1, 3)))
    assert len(short) == 3 and same(short, whole[:3])


def test_the_trainers_random_numbers_are_left_alone(root, tokenizer):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    take(open_stream(root, tokenizer, workers=1), 1)
    assert torch.equal(torch.rand(3), expected)


def test_workers_leave_signals_to_the_trainer(root, tokenizer):
    expected = take(open_stream(root, tokenizer), 6)
    others = multiprocessing.active_children()
    steps = open_stream(root, tokenizer, workers=1, prefetch=1).steps()
    batches = [next(steps)]
    (worker,) = [p for p in multiprocessing.active_children() if p not in others]
    send = multiprocessing.get_context("fork").Process(target=_signal_all, args=(worker.pid,))
    send.start()
    send.join()
    assert send.exitcode == 0
    batches += [next(steps) for _ in range(5)]
    assert worker.is_alive()
    assert all(same(a.packs, b.packs) for a, (b, _) in zip(batches, expected, strict=True))
    worker.terminate()  # from its trainer it obeys at once
    worker.join(timeout=20)
    assert worker.exitcode == 0
    steps.close()


def _signal_all(pid):
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(pid, number)


def test_closing_the_steps_ends_the_workers(root, tokenizer):
    others = multiprocessing.active_children()
    steps = open_stream(root, tokenizer, workers=2).steps()
    next(steps)
    assert len([p for p in multiprocessing.active_children() if p not in others]) == 2
    steps.close()
    gc.collect()
    assert not [p for p in multiprocessing.active_children() if p not in others]


def test_a_shard_that_changes_while_it_is_read_ends_the_run(tmp_path, tokenizer):
    with ShardWriter(tmp_path / "text") as writer:
        for i in range(30):
            writer.write(f"{i:03}", {"json": row("q" * i)})
    stream = open_stream(tmp_path, tokenizer, sources=("text",), workers=1)
    tar = tmp_path / "text" / "000000.tar"
    os.truncate(tar, tar.stat().st_size // 2)
    with pytest.raises(DataError, match=r"000000\.tar"):
        take(stream, 5)


@pytest.mark.parametrize("num_samples", [1, 2])
def test_a_tiny_set_works(tmp_path, tokenizer, num_samples):
    with ShardWriter(tmp_path / "text") as writer:
        for i in range(num_samples):
            writer.write(f"{i}", {"json": row("q")})
    batches = take(open_stream(tmp_path, tokenizer, sources=("text",)), 3)
    assert all(len(b.packs) == 4 for b, _ in batches)
    assert batches[-1][0].num_epochs == pytest.approx(sum(len(b.ids) for b, _ in batches) / num_samples)
    assert len(list(open_stream(tmp_path, tokenizer, sources=("text",)).passes())) == 1


def halves(lengths):
    """Some division of a pack, told apart by its lengths."""
    return (((0, 0, lengths[0]),), tuple((d, 0, n) for d, n in enumerate(lengths[1:], 1)))


@pytest.mark.parametrize(("members", "dp_size"), [(2, 1), (4, 1), (3, 2)])
def test_members_make_the_packs_of_a_rank_in_turn(root, tokenizer, members, dp_size):
    """Together they make each pack once, the same as one process makes, whatever their workers are and where they resume."""
    for dp_rank in range(dp_size):
        alone = take(open_stream(root, tokenizer, dp_rank, dp_size), 9)
        shared = []
        for member in range(members):
            stream = open_stream(root, tokenizer, dp_rank, dp_size, workers=member % 3)
            stream = replace(stream, member=(member, members), divide=halves)
            shared.append([batch for batch, _ in take(stream, 6)])
            later = take(stream, 3, alone[5][1])
            shared[-1] += [batch for batch, _ in later]
        for number, (whole, _) in enumerate(alone):
            steps = [steps[number] for steps in shared]
            found = {place: pack for step in steps for place, pack in zip(step.places, step.packs, strict=True)}
            assert sorted(p for step in steps for p in step.places) == list(range(len(whole.packs)))
            assert same([found[place] for place in sorted(found)], list(whole.packs))
            assert all(pack.spans == halves(pack.lengths) for pack in found.values())
            assert {step.num_packs for step in steps} == {len(whole.packs)} and whole.places == tuple(sorted(found))
            assert {step.ids for step in steps} == {whole.ids} and {step.num_epochs for step in steps} == {
                whole.num_epochs
            }
    counts = [sum(len(step.packs) for step in steps) for steps in shared]
    assert max(counts) - min(counts) <= 1, "they take turns over the steps"


def test_members_take_turns_in_a_pass(root, tokenizer):
    """Every member gets as many turns as the others; in each turn one of them has the pack, filler included."""
    whole = [list(open_stream(root, tokenizer, rank, 2).turns()) for rank in range(2)]
    for rank in range(2):
        streams = [replace(open_stream(root, tokenizer, rank, 2), member=(i, 3), divide=halves) for i in range(3)]
        turns = list(zip(*(stream.turns() for stream in streams), strict=True))
        assert all([pack is None for pack in turn] == [i != t % 3 for i in range(3)] for t, turn in enumerate(turns))
        assert same([next(pack for pack in turn if pack) for turn in turns], whole[rank])
        assert all(pack.spans for turn in turns for pack in turn if pack)
