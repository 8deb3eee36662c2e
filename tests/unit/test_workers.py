"""Worker processes: order and content never change, and a process that dies or hangs costs the sample it was at, by name."""

import ctypes
import gc
import logging
import multiprocessing
import os
import random
import signal
import socket
import threading
import time
from dataclasses import dataclass, field

import pytest
import torch

from mmscale.data_tools.writer import ShardWriter
from mmscale.errors import DataError
from mmscale.streaming import workers
from mmscale.streaming.chat import load_template
from mmscale.streaming.encode import Encoder
from mmscale.streaming.plan import Draw
from mmscale.streaming.rows import encode_row
from mmscale.streaming.shards import ShardSet
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.streaming.workers import Source, read_packs
from mmscale.types import MediaSpecs, Turn

NUM_ROWS = 60
FORK = multiprocessing.get_context("fork")


def hang_in_sleep():
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL})
    time.sleep(1e9)


def hang_in_a_loop():
    while True:
        pass


def hang_and_let_no_thread_run():
    ctypes.PyDLL(None).pause()


def end_quietly():
    os._exit(7)


def crash():
    ctypes.string_at(0)


@dataclass(frozen=True)
class Faulty(Encoder):
    """Does something bad at some samples."""

    faults: dict = field(default_factory=dict)  # key of the sample -> what to do instead of decoding it
    pause_s: float = 0.0

    def encode(self, sample):
        time.sleep(self.pause_s)
        self.faults.get(sample.id[-3:], lambda: None)()
        return super().encode(sample)


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer):
    return TextTokenizer.load(byte_tokenizer)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "text"
    with ShardWriter(folder, max_samples=20) as writer:
        for i in range(NUM_ROWS):
            row = encode_row([Turn("user", "q" * (i * 7 % 60)), Turn("assistant", "a" * (i % 5))])
            writer.write(f"{i:03}", {"json": row})
    return ShardSet.open(folder, "text")


@pytest.fixture(scope="module")
def planned(shards, tokenizer):
    """Draws of all rows, twice, with their true lengths."""
    whole = source(shards, tokenizer).encoder
    return [Draw(0, r, e, len(whole.encode(shards.read(r)))) for e in range(2) for r in range(NUM_ROWS)]


def source(shards, tokenizer, faults=None, pause_s=0.0):
    options = {"template": load_template("chatml"), "specs": MediaSpecs(), "max_pixels": 1 << 20}
    return Source(
        "s", shards, Faulty(tokenizer, max_tokens=512, on_long="drop", faults=faults or {}, pause_s=pause_s, **options)
    )


def in_packs(draws, size=3):
    return [tuple(draws[i : i + size]) for i in range(0, len(draws), size)]


def read(one, packs, num_workers=0, prefetch=2, timeout_s=30.0):
    return list(read_packs([one], iter(packs), num_workers, prefetch, timeout_s))


def same(a, b):
    plain = ("lengths", "ids", "tokens", "skipped")
    equal = all(map(torch.equal, a.tensors(), b.tensors()))
    return equal and all(getattr(a, name) == getattr(b, name) for name in plain)


def same_but_for(found, expected, lost):
    """Whether packs are equal, but that the documents in `lost` (pack, document) are named filler in `found`."""
    for p, (a, b) in enumerate(zip(found, expected, strict=True)):
        documents = [d for pack, d in lost if pack == p]
        assert [s.id for s in a.skipped] == [b.ids[d] for d in documents]
        assert a.ids == b.ids and a.lengths == b.lengths
        for d in range(len(a.ids)):
            span = slice(int(a.cu_seqlens[d]), int(a.cu_seqlens[d + 1]))
            if d in documents:
                assert (a.labels[span] == -100).all()
            else:
                assert torch.equal(a.input_ids[span], b.input_ids[span]) and torch.equal(a.labels[span], b.labels[span])
    return True


def children():
    gc.collect()
    return set(multiprocessing.active_children())


def is_gone(pid):
    """Whether a process has ended, a zombie that waits for somebody else included."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def wait_until(claim, limit_s=20.0):
    limit = time.monotonic() + limit_s
    while not claim():
        assert time.monotonic() < limit, "did not happen in time"
        time.sleep(0.01)


@pytest.mark.parametrize(("num_workers", "prefetch"), [(1, 1), (2, 2), (3, 5)])
def test_workers_change_nothing(shards, tokenizer, planned, num_workers, prefetch):
    one, packs, before = source(shards, tokenizer), in_packs(planned), children()
    found = read(one, packs, num_workers, prefetch)
    assert all(map(same, found, read(one, packs))) and len(found) == len(packs)
    assert children() == before


def test_packs_are_asked_for_only_so_far_ahead(shards, tokenizer, planned):
    asked = []
    packs = (asked.append(i) or pack for i, pack in enumerate(in_packs(planned)))
    reader = read_packs([source(shards, tokenizer)], packs, 2, 3, 30.0)
    for taken in range(1, 5):
        next(reader)
        assert len(asked) == 2 * 3 + taken
    reader.close()


def test_tasks_and_results_larger_than_the_socket_do_not_wait_for_each_other(shards, tokenizer, planned, monkeypatch):
    whole = socket.socketpair

    def small():
        ends = whole()
        for end in ends:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return ends

    monkeypatch.setattr(socket, "socketpair", small)
    found = read(source(shards, tokenizer), in_packs(planned * 5, 60), num_workers=1, prefetch=10)
    assert [len(pack.ids) for pack in found] == [60] * 10


FATAL = {"end_quietly": "exit code 7", "crash": "SIGSEGV"}
HANGS = ("hang_in_sleep", "hang_in_a_loop", "hang_and_let_no_thread_run")


@pytest.mark.parametrize("what", [*FATAL, *HANGS])
def test_a_worker_that_dies_or_hangs_costs_one_sample(shards, tokenizer, planned, what):
    packs, before = in_packs(planned[:NUM_ROWS]), children()
    expected = read(source(shards, tokenizer), packs)
    started = time.monotonic()
    found = read(source(shards, tokenizer, {"031": globals()[what]}), packs, num_workers=2, timeout_s=1.5)
    assert same_but_for(found, expected, [(10, 1)])
    (skip,) = [s for pack in found for s in pack.skipped]
    assert skip.id == "text/000001.tar:031" and skip.source == "s" and skip.offset == shards.offset(31)
    assert (skip.reason, FATAL.get(what, "after 1.5 s") in skip.detail) == (
        "worker_died" if what in FATAL else "decode_timeout",
        True,
    )
    assert sum(pack.tokens["text"] for pack in found) == sum(p.tokens["text"] for p in expected) - planned[31].tokens
    assert time.monotonic() - started < 15
    assert children() == before


def test_every_bad_document_has_one_try(shards, tokenizer, planned, tmp_path):
    log = tmp_path / "tries"

    def die():
        with log.open("a") as file:
            file.write("x")
        os._exit(3)

    packs = in_packs(planned[:NUM_ROWS])
    one = source(shards, tokenizer, dict.fromkeys(("004", "003", "050"), die))
    found = read(one, packs, num_workers=2)
    assert same_but_for(found, read(source(shards, tokenizer), packs), [(1, 0), (1, 1), (16, 2)])
    assert log.read_text() == "xxx"


def test_workers_that_die_again_and_again_end_the_run_by_name(shards, tokenizer, planned):
    one, before = source(shards, tokenizer, {f"{i:03}": end_quietly for i in range(NUM_ROWS)}), children()
    names = ".*".join(f"text/000000.tar:{i:03} .*exit code 7" for i in range(4))
    with pytest.raises(DataError, match=rf"found 4: .*{names}.*data\.workers"):
        read(one, in_packs(planned, 6), num_workers=1)
    assert children() == before


def test_many_deaths_in_many_packs_end_the_run_too(shards, tokenizer, planned, monkeypatch):
    monkeypatch.setattr(workers, "MAX_RESTARTS_PER_1000", 3)
    one = source(shards, tokenizer, dict.fromkeys(("004", "011", "023", "037"), end_quietly))
    with pytest.raises(DataError, match=r"found 4: .*:004 .*:011 .*:023 .*:037 "):
        read(one, in_packs(planned), num_workers=2)


def test_a_worker_that_dies_between_samples_is_replaced(shards, tokenizer, planned, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mmscale"), "propagate", True)
    one, whole, before = source(shards, tokenizer), in_packs(planned), children()

    def packs():
        yield whole[0]
        (process,) = [p for p in children() if p not in before]
        os.kill(process.pid, signal.SIGKILL)  # it has sent its only pack and has no other
        yield from whole[1:]

    found = list(read_packs([one], packs(), 1, 1, 30.0))
    assert all(map(same, found, read(one, whole)))
    assert [r.getMessage() for r in caplog.records if "takes its place" in r.getMessage()] == [
        "worker_died: the loader process ended with SIGKILL, between samples; another one takes its place"
    ]


def test_kills_at_any_moment_lose_nothing_in_silence(shards, tokenizer, planned, seed):
    packs, rng = in_packs(planned[:NUM_ROWS] * 5), random.Random(seed)
    one, expected, before = source(shards, tokenizer, pause_s=0.001), read(source(shards, tokenizer), packs), children()
    found, kills, reader = [], 0, read_packs([one], iter(packs), 2, 2, 30.0)
    for pack in reader:
        found.append(pack)
        if len(found) % 11 == 3:
            time.sleep(rng.uniform(0, 0.01))
            os.kill(rng.choice([p for p in children() if p not in before]).pid, signal.SIGKILL)
            kills += 1
    lost = [(p, pack.ids.index(s.id)) for p, pack in enumerate(found) for s in pack.skipped]
    assert same_but_for(found, expected, lost)
    assert {s.reason for pack in found for s in pack.skipped} <= {"worker_died"}
    assert len(lost) <= kills == 9
    assert children() == before


def test_a_suspended_run_has_no_slow_samples(shards, tokenizer, planned):
    """SIGSTOP, as a scheduler sends it, in the middle of a sample: the time away is nobody's fault."""
    started, stop = FORK.Pipe(duplex=False)

    def run(pause):
        os.setpgid(0, 0)
        one = source(shards, tokenizer, {"001": lambda: (pause.send(0), time.sleep(0.4))})
        os._exit(len([s for p in read(one, in_packs(planned[:6]), num_workers=1, timeout_s=1.0) for s in p.skipped]))

    process = FORK.Process(target=run, args=(stop,))
    process.start()
    assert started.poll(20)
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.killpg(process.pid, signal.SIGCONT)
    process.join(20)
    assert process.exitcode == 0


@pytest.mark.parametrize("what", ["idle", *HANGS])
def test_workers_leave_when_the_trainer_is_killed(shards, tokenizer, planned, what):
    ours, theirs = FORK.Pipe()

    def run():
        one = source(shards, tokenizer, {"009": lambda: (theirs.send("at it"), globals().get(what, lambda: None)())})
        reader = read_packs([one], iter(in_packs(planned)), 2, 2, 30.0)
        next(reader)
        theirs.send([p.pid for p in multiprocessing.active_children()])
        signal.pause()

    process = FORK.Process(target=run)
    process.start()
    said = []
    while len(said) < 2:
        assert ours.poll(20)
        said.append(ours.recv())
    (pids,) = [words for words in said if words != "at it"]
    assert len(pids) == 2 and not any(map(is_gone, pids))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    wait_until(lambda: all(map(is_gone, pids)), limit_s=5)


def test_closing_ends_workers_that_hang(shards, tokenizer, planned):
    before, started = children(), time.monotonic()
    reader = read_packs([source(shards, tokenizer, {"004": hang_in_sleep})], iter(in_packs(planned)), 2, 2, 30.0)
    next(reader)
    pids = [p.pid for p in children() if p not in before]
    reader.close()
    assert len(pids) == 2 and not any(os.path.exists(f"/proc/{pid}") for pid in pids), "gone, and no zombies"
    assert time.monotonic() - started < 5


def test_nothing_is_left_of_many_short_readers(shards, tokenizer, planned):
    one, packs = source(shards, tokenizer), in_packs(planned[:12])
    read(one, packs, num_workers=2)
    gc.collect()
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(5):
        read(one, packs, num_workers=2)
    gc.collect()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_a_bug_outside_of_the_samples_ends_the_run(shards, tokenizer, planned, monkeypatch):
    monkeypatch.setattr("mmscale.streaming.make_pack.collate", lambda *_: 1 // 0)
    with pytest.raises(DataError, match=r"ZeroDivisionError.*log"):
        read(source(shards, tokenizer), in_packs(planned), num_workers=1)
