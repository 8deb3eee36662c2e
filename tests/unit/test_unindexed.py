"""Stream mode: every sample once over any ranks, workers and restarts, nothing run or lost in silence, bounded packs."""

import gzip
import io
import json
import logging
import multiprocessing
import os
import random
import signal
import tarfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial

import pytest
import zstandard

from mmscale.config.schema import DataConfig, SourceConfig
from mmscale.errors import CheckpointError, ConfigError, DataError, RefusedInputError
from mmscale.streaming.encode import Encoder
from mmscale.streaming.rows import encode_row
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.streaming.unindexed.progress import Progress, place_of
from mmscale.streaming.unindexed.reader import Buffer
from mmscale.streaming.unindexed.samples import DAMAGED, read_shard
from mmscale.streaming.unindexed.stream import UnindexedStream
from mmscale.streaming.unindexed.tar import read_members
from mmscale.streaming.unindexed.urls import ShardUrl, list_shards
from mmscale.types import MediaSpecs, Turn

SIZES = {"a": (7, 12, 1, 9, 30, 4), "b": (11, 2, 5)}
EPOCH = {f"{name}/{s:03}.tar:{s}-{i}" for name, sizes in SIZES.items() for s, n in enumerate(sizes) for i in range(n)}


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer):
    return TextTokenizer.load(byte_tokenizer)


def row(text, answer="yes"):
    return encode_row([Turn("user", text), Turn("assistant", answer)])


def tar_bytes(members, **options):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, sizes in SIZES.items():
        (folder / name).mkdir()
        for s, n in enumerate(sizes):
            rows = [(f"{s}-{i}.json", row("q" * (i * 37 % 90))) for i in range(n)]
            (folder / name / f"{s:03}.tar").write_bytes(tar_bytes(rows))
    return folder


def open_stream(root, tokenizer, dp_rank=0, dp_size=1, workers=0, sources=None, exchange=None, global_batch=4, **data):
    sources = {name: SourceConfig(path=name, mode="stream") for name in SIZES} if sources is None else sources
    config = DataConfig(**{"sources": sources, "seq_len": 256, "seed": 3, "root": str(root), "prefetch": 2, **data})
    return UnindexedStream.open(
        config, sources, tokenizer, MediaSpecs(), global_batch=global_batch, dp_rank=dp_rank, dp_size=dp_size,
        workers=workers, exchange=exchange or (lambda report: [report]),
    )  # fmt: skip


def run(root, tokenizer, num_steps, state=None, dp_size=1, **options):
    """Steps and the state after each, of all ranks, which are threads that meet as processes do in a collective."""
    barrier, board = threading.Barrier(dp_size), [None] * dp_size
    saved = None if state is None else json.dumps(state.to_dict())

    def gather(rank, item):
        board[rank] = item
        barrier.wait(60)
        found = list(board)
        barrier.wait(60)
        return found

    def one_rank(rank):
        stream = open_stream(root, tokenizer, rank, dp_size, exchange=partial(gather, rank), **options)
        state = None if saved is None else stream.restore(json.loads(saved))
        found, turn = [], stream.steps(state)
        try:
            for _ in range(num_steps):
                batch = next(turn)
                skips = gather(rank, [skip for pack in batch.packs for skip in pack.skipped])
                state = batch.state_after(state, [skip for one in skips for skip in one])
                found.append((batch, state))
        except BaseException:
            barrier.abort()
            raise
        finally:
            turn.close()
        return found

    with ThreadPoolExecutor(dp_size) as threads:
        by_rank = list(threads.map(one_rank, range(dp_size)))
    steps = [[found[i][0] for found in by_rank] for i in range(num_steps)]
    states = [found[1] for found in by_rank[0]]
    for batches, state, *others in zip(steps, states, *by_rank[1:], strict=True):
        assert all(batch.ids == batches[0].ids and other.to_dict() == state.to_dict() for batch, other in others)
        packed = [i for batch in batches for pack in batch.packs for i in pack.ids]
        assert packed == list(batches[0].ids), "the ledger has what the ranks train on"
    return steps, states


def ids_of(steps):
    return [i for batches in steps for i in batches[-1].ids]


# progress


def test_progress_takes_samples_in_any_order_and_survives_json(seed):
    rng = random.Random(seed)
    sizes = [rng.randint(0, 40) for _ in range(30)]
    events = [("taken", u, i) for u, n in enumerate(sizes) for i in range(n)]
    events += [("ended", u, n) for u, n in enumerate(sizes)]
    rng.shuffle(events)
    progress, seen = Progress(), set()
    while events:
        part = [events.pop() for _ in range(min(len(events), rng.randint(1, 50)))]
        seen |= set(part)
        progress = progress.after(
            [(u, i) for kind, u, i in part if kind == "taken"], [(u, n) for kind, u, n in part if kind == "ended"]
        )
        assert Progress.from_dict(json.loads(json.dumps(progress.to_dict()))) == progress
        done = {u for u, n in enumerate(sizes) if {("ended", u, n), *(("taken", u, i) for i in range(n))} <= seen}
        assert {u for u in range(30) if progress.is_done(u)} == done and progress.num_done == len(done)
        assert list(progress.remaining(30)) == sorted(set(range(30)) - done)
    assert progress == Progress(30)


def test_a_shard_that_gives_less_than_before_ends_all_the_same():
    """Only a shard that changed between two runs does that; it must not be read for ever."""
    progress = Progress().after([(0, i) for i in range(9)], []).after([], [(0, 5)])
    assert progress == Progress(1)


def test_each_epoch_has_every_shard_once_in_another_order():
    epochs = [[place_of(u, 50, "0/a") for u in range(e * 50, e * 50 + 50)] for e in range(3)]
    for number, epoch in enumerate(epochs):
        assert {e for e, _ in epoch} == {number} and sorted(s for _, s in epoch) == list(range(50))
    assert len({tuple(s for _, s in epoch) for epoch in epochs}) == 3


# what a path stands for


def test_paths_become_shards(root):
    def names(path, **keys):
        return [shard.name for shard in list_shards("x", SourceConfig(path=path, mode="stream", **keys), str(root))]

    assert names("a") == [f"a/{i:03}.tar" for i in range(6)]
    assert names("a/{000..002}.tar") == names("a/00[012].tar") == ["a/000.tar", "a/001.tar", "a/002.tar"]
    assert names("{a,b}/000.tar") == ["a/000.tar", "b/000.tar"]
    assert names(f"{root}/b/*.tar") == [f"b/{i:03}.tar" for i in range(3)]
    assert names("https://me:secret@host/p/{0..1}.tar?sig=secret") == ["https://host/p/0.tar", "https://host/p/1.tar"]
    assert names("http://host/get?shard={0..1}") == ["http://host/get#0", "http://host/get#1"]
    assert names("pipe:cat {0..1}.tar", allow_commands=True) == ["x/command-000000", "x/command-000001"]


@pytest.mark.parametrize(
    "path, found",
    [
        ("a/nothing.tar", "found none"),
        ("a/*.zip", "found none"),
        ("a/{000,000}.tar", "twice"),
        ("s3://bucket/a.tar", "stream mode reads"),
        ("file:///etc/passwd", "nothing was opened"),
        ("gopher://host/a.tar", "nothing was opened"),
        ("a/{000..002.tar", "correct its braces"),
        ("a/{0..99999999}.tar", "more than"),
    ],
)
def test_paths_that_are_refused(root, path, found):
    with pytest.raises((ConfigError, RefusedInputError), match=found):
        list_shards("x", SourceConfig(path=path, mode="stream"), str(root))


@pytest.mark.parametrize(
    "path", ["pipe:touch {marker}; cat 0.tar", "{{a/000.tar,pipe:touch {marker}}}", "PIPE:touch {marker}"]
)
def test_commands_are_refused_and_not_run(root, tmp_path, tokenizer, path):
    marker = tmp_path / "ran"
    sources = {"x": SourceConfig(path=path.format(marker=marker), mode="stream")}
    with pytest.raises((ConfigError, RefusedInputError), match=r"nothing was run|found none"):
        next(open_stream(root, tokenizer, sources=sources).steps())
    assert not marker.exists()


# reading a shard


def shard_of(tmp_path, data, name="s.tar"):
    path = tmp_path / name
    path.write_bytes(data)
    return ShardUrl(str(path), name)


def test_a_shard_is_what_tarfile_reads(tmp_path):
    members = [(f"d.x/{i}.{ext}", os.urandom(i * 97)) for i in range(12) for ext in ("JPG", "json", "cls")]
    members.insert(6, ("n" * 200 + ".json", b"{}"))
    for options in ({"format": tarfile.PAX_FORMAT}, {"format": tarfile.GNU_FORMAT}):
        data = tar_bytes(members, **options)
        found = [(m.name, m.offset, got) for m, got in read_members(io.BytesIO(data), "s", lambda m: True)]
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            expected = [(m.name, m.offset_data, tar.extractfile(m).read()) for m in tar]
        assert found == expected
    raw = list(read_shard(shard_of(tmp_path, tar_bytes(members))))
    assert len(raw) == 13 and not any(sample.reason for sample in raw)
    assert dict(raw[-1].members) == {"jpg": members[-3][1], "json": members[-2][1], "cls": members[-1][1][:128]}


def test_compressed_shards_give_the_same(tmp_path):
    data = tar_bytes([(f"{i}.json", os.urandom(3000)) for i in range(400)])
    plain = list(read_shard(shard_of(tmp_path, data)))
    frames = [zstandard.compress(data[:700_000]), zstandard.compress(data[700_000:])]
    for packed in (gzip.compress(data), zstandard.compress(data), b"".join(frames)):
        assert list(read_shard(shard_of(tmp_path, packed))) == plain
        cut = list(read_shard(shard_of(tmp_path, packed[: len(packed) // 2])))
        assert cut[-1].reason == DAMAGED and cut[:-1] == plain[: len(cut) - 1] and len(cut) > 1


def test_faults_take_out_their_sample_once_and_no_other(tmp_path):
    text = row("x")
    link = tarfile.TarInfo("link.json")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:

        def add(name, data=text):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

        add("good1.json")
        add("twice.json")
        add("twice.json")
        add("../../up.json")
        tar.addfile(link)
        add("link.json")  # its key is refused already
        add("good2.jpg")
        add("split.jpg")
        add("good3.json")
        add("split.json")
        add("noext")
        add("__x__.json")
        add("good4.json")
        add("stray.jp\x01g")
        add("good4.txt")  # a refused member between two of a sample does not part them
    found = list(read_shard(shard_of(tmp_path, buffer.getvalue())))
    assert Counter(s.reason for s in found) == {
        "": 5, "duplicate_member": 1, "name_parent_folder": 1, "not_regular": 1, "split_sample": 1,
        "name_without_extension": 1, "name_reserved": 1, "name_control_character": 1,
    }  # fmt: skip
    assert [s.key for s in found if not s.reason] == ["good1", "good2", "split", "good3", "good4"]
    assert [ext for ext, _ in found[-1].members] == ["json", "txt"] or found[-2].key == "good4"


@pytest.mark.parametrize("damage", ["header", "cut", "no_end", "empty", "not_a_tar", "zeroed", "executable"])
def test_damage_is_named_and_what_stands_before_it_delivered(tmp_path, damage):
    members = [(f"{i:02}.json", row("x" * i)) for i in range(20)]
    data = bytearray(tar_bytes(members))
    whole = 20
    if damage == "header":
        data[10 * 1024 + 150] ^= 1
        whole = 9  # the sample in front may lack members, nobody can know
    elif damage == "cut":
        data, whole = data[: 10 * 1024 + 600], 9
    elif damage == "no_end":
        data, whole = data[: 20 * 1024], 19
    elif damage == "empty":
        data, whole = b"", 0
    elif damage == "not_a_tar":
        data, whole = random.Random(0).randbytes(5000), 0
    elif damage == "zeroed":
        data[10 * 1024 : 10 * 1024 + 512], whole = bytes(512), 9
    else:
        data, whole = tar_bytes([*members[:10], ("x.pth", b"evil"), *members[10:]]), 9
    found = list(read_shard(shard_of(tmp_path, bytes(data))))
    assert [s.key for s in found[:-1]] == [f"{i:02}" for i in range(whole)]
    assert found[-1].reason == DAMAGED and "s.tar" in found[-1].detail
    assert not any(s.reason for s in found[:-1])


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_bombs_are_left_at_the_cap(tmp_path, pack):
    bomb = tar_bytes([("good.json", row("x")), ("z.json", bytes(200 << 20)), ("after.json", row("x"))])
    shard = shard_of(tmp_path, pack(bomb))
    found = list(read_shard(shard))
    assert [s.key for s in found] == ["good", "z"] or [s.key for s in found] == ["good"]
    assert found[-1].reason == DAMAGED and "200 times" in found[-1].detail


def test_claimed_sizes_allocate_nothing(tmp_path):
    """A header of 2^70 bytes and a PAX size below zero, which would lead the reader backwards."""
    info = tarfile.TarInfo("big.json")
    info.size = 1 << 70
    huge = info.tobuf(tarfile.GNU_FORMAT)
    found = list(read_shard(shard_of(tmp_path, huge + bytes(1024))))
    assert [s.reason for s in found] == [DAMAGED]
    info.size, info.pax_headers = 0, {"size": "-512"}
    found = list(read_shard(shard_of(tmp_path, info.tobuf(tarfile.PAX_FORMAT) + bytes(1024))))
    assert [s.reason for s in found] == [DAMAGED]


def test_a_broken_connection_is_opened_again_and_nothing_comes_twice(tmp_path, monkeypatch):
    """A command that fails at other places each time, and in the end for good."""
    data = tar_bytes([(f"{i:02}.json", row("x" * 2000)) for i in range(40)])
    shard_of(tmp_path, data)
    counter, waits = tmp_path / "n", []
    script = (
        f"n=$(cat {counter} 2>/dev/null || echo 0); echo $((n+1)) > {counter}; "
        f"[ $n -ge GOOD ] && exec cat {tmp_path}/s.tar; head -c $((n*30000+20000)) {tmp_path}/s.tar; exit 9"
    )
    found = list(read_shard(ShardUrl(f"pipe:{script.replace('GOOD', '2')}", "c"), wait=waits.append))
    assert [s.key for s in found] == [f"{i:02}" for i in range(40)] and not any(s.reason for s in found)
    assert len(waits) == 2
    counter.unlink()
    with pytest.raises(DataError, match=r"c: cannot be read after 4 tries .*exit 9") as error:
        list(read_shard(ShardUrl(f"pipe:{script.replace('GOOD', '99')}", "c"), wait=waits.append))
    assert str(tmp_path) not in str(error.value), "a command may hold secrets"


def test_a_missing_file_is_an_error_after_some_tries(tmp_path):
    waits = []
    with pytest.raises(DataError, match=r"cannot be read after 4 tries \(No such file"):
        list(read_shard(ShardUrl(str(tmp_path / "gone.tar"), "gone.tar"), wait=waits.append))
    assert len(waits) == 3


def test_leaving_a_command_does_not_wait_for_it(tmp_path):
    shard_of(tmp_path, tar_bytes([("0.json", row("x")), ("1.json", row("x"))]))
    began = time.monotonic()
    reading = read_shard(ShardUrl(f"pipe:head -c 2500 {tmp_path}/s.tar; sleep 30", "c"))
    assert next(reading).key == "0"
    reading.close()
    assert time.monotonic() - began < 10


# packs


def test_the_buffer_fills_packs_and_starves_nobody(seed):
    rng = random.Random(seed)
    buffer, given, arrived, waited = Buffer(1000, None), [], 0, 0

    class Document:
        media = ()

        def __init__(self, tokens):
            self.tokens, self.arrived = tokens, arrived

        def __len__(self):
            return self.tokens

    packs = []
    while len(packs) < 300:
        while not buffer.is_full:
            arrived += 1
            buffer.add(arrived, Document(min(1000, int(rng.lognormvariate(4.5, 0.9)) + 5)), rng.random() * 64)
        pack = buffer.take()
        packs.append(sum(len(document) for _, document in pack))
        given += [place for place, _ in pack]
        waited = max(waited, *(arrived - document.arrived for _, document in pack))
    while len(buffer):
        given += [place for place, _ in buffer.take()]
    assert sorted(given) == list(range(1, arrived + 1))
    assert max(packs) <= 1000 and sum(packs) / len(packs) > 995
    assert waited < 2500


def test_packs_hold_what_the_shards_hold_and_only_once(root, tokenizer):
    steps, states = run(root, tokenizer, 12)
    ids = ids_of(steps)
    assert set(ids) <= EPOCH
    for batches in steps:
        packs = batches[0].packs
        assert len(packs) == 4 and all(0 < pack.num_tokens <= 256 for pack in packs)
        assert tuple(i for pack in packs for i in pack.ids) == batches[0].ids
    assert states[-1].num_seen == len(ids) and states[-1].num_skipped == 0


def epoch_of_a(states):
    return states[-1].progress[0].next // len(SIZES["a"])


@pytest.mark.parametrize("dp_size, workers", [(1, 0), (2, 0), (4, 0), (2, 2)])
def test_every_sample_once_per_epoch_over_all_ranks(root, tokenizer, dp_size, workers):
    """Uneven shards, and more readers than the source b has shards: nobody waits, nothing is lost or doubled."""
    steps, states = run(root, tokenizer, 60, dp_size=dp_size, workers=workers)
    assert epoch_of_a(states) >= 1
    counts = Counter(ids_of(steps))
    final = states[-1]
    for place, name in enumerate(SIZES):
        progress, n = final.progress[place], len(SIZES[name])
        for shard, size in enumerate(SIZES[name]):
            units = [u for u in range(max([progress.next, *progress.done, *progress.begun], default=0) + 1)]
            mine = [u for u in units if place_of(u, n, f"3/{name}")[1] == shard]
            whole = sum(progress.is_done(u) for u in mine)
            for i in range(size):
                partly = sum(progress.begun[u].taken >> i & 1 for u in mine if u in progress.begun)
                assert counts[f"{name}/{shard:03}.tar:{shard}-{i}"] == whole + partly
    assert len(json.dumps(final.to_dict())) < 4000


def test_workers_give_the_same_packs_each_time_and_close(root, tokenizer):
    first, _ = run(root, tokenizer, 6, workers=2)
    second, _ = run(root, tokenizer, 6, workers=2)
    assert ids_of(first) == ids_of(second)


@pytest.mark.parametrize("num_switches", [6])
def test_resume_loses_and_repeats_nothing(root, tokenizer, seed, num_switches):
    """One source, stopped at random steps and gone on with on other ranks and workers."""
    rng = random.Random(seed)
    sources = {"a": SourceConfig(path="a", mode="stream")}
    state, ids = None, []
    for _ in range(num_switches):
        dp_size = rng.choice([1, 2, 4])
        workers = rng.choice([0, 0, 1, 2])
        steps, states = run(root, tokenizer, rng.randint(1, 4), state, dp_size, workers=workers, sources=sources)
        state = states[-1]
        ids += ids_of(steps)
    progress = state.progress[0]
    partly = {u: part.taken for u, part in progress.begun.items()}
    expected = Counter()
    for unit in range(max([progress.next, *progress.done, *partly]) + 1):
        shard = place_of(unit, 6, "3/a")[1]
        expected.update(
            f"a/{shard:03}.tar:{shard}-{i}"
            for i in range(SIZES["a"][shard])
            if progress.is_done(unit) or partly.get(unit, 0) >> i & 1
        )
    assert Counter(ids) == expected
    assert state.num_seen == len(ids)


def test_weights_hold_by_samples(root, tokenizer):
    sources = {n: SourceConfig(path=n, mode="stream", weight=w) for n, w in (("a", 1), ("b", 3))}
    steps, _ = run(root, tokenizer, 80, sources=sources)
    ids = ids_of(steps)
    assert sum(i.startswith("b/") for i in ids) / len(ids) == pytest.approx(0.75, abs=0.02)


def test_the_end_of_all_sources_is_said(root, tokenizer):
    sources = {"b": SourceConfig(path="b", mode="stream", max_epochs=2)}
    ids = []
    steps = open_stream(root, tokenizer, sources=sources, global_batch=1).steps()
    with pytest.raises(DataError, match="max_epochs"):
        while True:
            ids += next(steps).ids
    assert Counter(ids) == {i: 2 for i in EPOCH if i.startswith("b/")}


# bad data


@pytest.fixture
def faulty(tmp_path):
    """Three shards: good, with bad rows, damaged in the middle."""
    (tmp_path / "x").mkdir()
    rows = [(f"{i}.json", row("x" * 30)) for i in range(20)]
    bad = [*rows[:5], ("n.json", b'{"conversations": NaN}'), ("l.json", row("y" * 999)), *rows[5:]]
    cut = bytearray(tar_bytes(rows))
    cut[10 * 1024 + 150] ^= 1
    for i, data in enumerate((tar_bytes(rows), tar_bytes(bad), bytes(cut))):
        (tmp_path / "x" / f"{i}.tar").write_bytes(data)
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_left_out_named_and_counted(faulty, tokenizer, caplog, workers):
    logging.getLogger("mmscale").propagate = True
    caplog.set_level(logging.INFO)
    sources = {"x": SourceConfig(path="x", mode="stream")}
    steps, states = run(faulty, tokenizer, 40, sources=sources, workers=workers)
    skips = [s for batches in steps for pack in batches[0].packs for s in pack.skipped]
    state = states[-1]
    assert {(s.id, s.reason) for s in skips} == {
        ("x/1.tar:n", "json_number"), ("x/1.tar:l", "too_long"), ("x/2.tar:9", DAMAGED),
    }  # fmt: skip
    assert state.num_skipped == len(skips) and state.num_bad == sum(s.reason != "too_long" for s in skips)
    assert state.num_seen == len(ids_of(steps)) + len(skips)
    text = "\n".join(r.getMessage() for r in caplog.records)
    assert "epoch 0 of 'x': read 52 = delivered 49 + skipped 3 (json_number 1, shard_damaged 1, too_long 1)" in text
    assert "stream mode: resume is exact to whole shards only" in text and "mmscale-data index" in text


def test_limits_on_bad_samples(faulty, tokenizer):
    sources = {"x": SourceConfig(path="x/{1,2}.tar", mode="stream")}
    with pytest.raises(DataError, match=r"n at offset .*json_number|shard_damaged.*on_error=skip"):
        run(faulty, tokenizer, 12, sources=sources, on_error="raise")
    with pytest.raises(DataError, match=r"data\.max_bad=1\.0%"):
        run(faulty, tokenizer, 150, sources=sources)
    only = {"x": SourceConfig(path="bad.tar", mode="stream")}
    (faulty / "bad.tar").write_bytes(tar_bytes([(f"{i}.json", b"{}") for i in range(50)]))
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"30 bad ones in a row.*missing_text"):
            run(faulty, tokenizer, 1, sources=only, max_bad_in_a_row=30, workers=workers)
    (faulty / "bad.tar").write_bytes(tar_bytes([(f"{i}.json", row("x" * 500)) for i in range(50)]))
    with pytest.raises(DataError, match="expected a usable sample"):
        run(faulty, tokenizer, 1, sources=only)
    with pytest.raises(DataError, match=r"raise data\.seq_len"):
        run(faulty, tokenizer, 1, sources=only, on_long="error")


class Trap(Encoder):
    """Does to its process what `trap` says, at the samples whose text holds it."""

    def encode(self, sample):
        text = sample.turns[0].text
        if text == "die":
            os._exit(7)
        if text == "hang":
            while True:
                pass
        return super().encode(sample)


@pytest.mark.parametrize("trap, reason", [("die", "worker_died"), ("hang", "decode_timeout")])
def test_a_process_that_ends_costs_its_sample_only(tmp_path, tokenizer, trap, reason):
    (tmp_path / "x").mkdir()
    for s in range(4):
        rows = [(f"{s}-{i}.json", row(trap if (s, i) == (1, 13) else "x" * 20)) for i in range(25)]
        (tmp_path / "x" / f"{s}.tar").write_bytes(tar_bytes(rows))
    sources = {"x": SourceConfig(path="x", mode="stream", max_epochs=1)}
    stream = open_stream(tmp_path, tokenizer, sources=sources, workers=2, global_batch=2, sample_timeout_s=0.6)
    one = stream.sources[0]
    trapped = Trap(**{name: getattr(one.encoder, name) for name in one.encoder.__dataclass_fields__})
    object.__setattr__(one, "encoder", trapped)
    ids, skips, steps = [], [], stream.steps()
    with pytest.raises(DataError, match="max_epochs"):
        while True:
            batch = next(steps)
            ids += batch.ids
            skips += [s for p in batch.packs for s in p.skipped]
    assert [(s.id, s.reason, s.source, s.epoch) for s in skips] == [("x/1.tar:1-13", reason, "x", 0)]
    assert max(Counter(ids).values()) == 1 and "x/1.tar:1-13" not in ids
    assert len(ids) > 50


def test_a_process_killed_from_outside_loses_at_most_the_sample_it_was_at(root, tokenizer, seed):
    rng, before = random.Random(seed), multiprocessing.active_children()
    sources = {"a": SourceConfig(path="a", mode="stream", max_epochs=2)}
    steps = open_stream(root, tokenizer, sources=sources, workers=1, global_batch=1).steps()
    ids, skips, kills = [], [], 0
    with closing(steps), pytest.raises(DataError, match="max_epochs"):
        while True:
            batch = next(steps)
            ids += batch.ids
            skips += [skip for pack in batch.packs for skip in pack.skipped]
            if rng.random() < 0.3:
                kills += 1
                os.kill(next(p.pid for p in multiprocessing.active_children() if p not in before), signal.SIGKILL)
    assert kills >= len(skips) and {skip.reason for skip in skips} <= {"worker_died"}
    assert Counter(ids + [skip.id for skip in skips]) == {i: 2 for i in EPOCH if i.startswith("a/")}


def test_nothing_is_left_behind_when_the_steps_are_closed(root, tokenizer):
    before = multiprocessing.active_children()
    steps = open_stream(root, tokenizer, workers=2).steps()
    next(steps)
    children = [child for child in multiprocessing.active_children() if child not in before]
    assert len(children) == 2
    steps.close()
    assert not [child for child in children if child.is_alive()]


# configuration and state


def test_state_of_other_data_is_refused_by_name(root, tokenizer, caplog):
    state = run(root, tokenizer, 2)[1][-1].to_dict()
    stream = open_stream(root, tokenizer)
    assert stream.restore(json.loads(json.dumps(state))).to_dict() == state
    for options in ({"seed": 4}, {"sources": {"a": SourceConfig(path="b", mode="stream")}}):
        with pytest.raises(CheckpointError, match=r"found others for the sources a"):
            open_stream(root, tokenizer, **options).restore(state)
    for broken in ({**state, "progress": {}}, {**state, "account": 3}, {**state, "mode": "indexed"}, {}):
        with pytest.raises(CheckpointError):
            stream.restore(broken)
    logging.getLogger("mmscale").propagate = True
    added = {
        "c": SourceConfig(path="a/000.tar", mode="stream"),
        "b": SourceConfig(path="b", mode="stream", weight=None),
    }
    other = open_stream(root, tokenizer, sources=added).restore(state)
    assert [p.to_dict() for p in other.progress] == [state["progress"]["b"], Progress().to_dict()]
    assert {"sources added since the checkpoint: c", "sources removed since the checkpoint: a"} <= {
        r.getMessage() for r in caplog.records
    }


def test_keys_that_need_an_index_are_refused(root, tokenizer, monkeypatch):
    with pytest.raises(ConfigError, match=r"max_samples=5.*index"):
        open_stream(root, tokenizer, sources={"a": SourceConfig(path="a", mode="stream", max_samples=5)})
    import webdataset.utils

    monkeypatch.setattr(webdataset.utils, "enforce_security", True)
    with pytest.raises(ConfigError, match="WDS_SECURE"):
        open_stream(root, tokenizer)
