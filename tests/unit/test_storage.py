"""Bytes from files, servers and object stores: joined reads, honest answers, retries, the cache and seekable zstd."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import re
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmscale.config.schema import CacheConfig
from mmscale.data_tools.writer import ShardWriter
from mmscale.errors import DataError, RefusedInputError
from mmscale.streaming.rows import encode_row
from mmscale.streaming.shards import ShardSet
from mmscale.streaming.storage import cache as cache_module
from mmscale.streaming.storage import http as http_module
from mmscale.streaming.storage import source as source_module
from mmscale.streaming.storage.cache import BlockCache, CachedFile
from mmscale.streaming.storage.http import HttpClient, HttpFile
from mmscale.streaming.storage.local import LocalFile
from mmscale.streaming.storage.source import coalesce, read_coalesced
from mmscale.streaming.storage.urls import join_root, join_url
from mmscale.types import Turn

DATA = random.Random(7).randbytes(300_000)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "RETRY_DELAYS_S", (0.0, 0.0, 0.0))


# ---------------------------------------------------------------- ranges


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 900)), max_size=30),
    st.integers(0, 300),
    st.integers(1, 2000),
)
def test_joined_reads_give_the_same_bytes_and_keep_their_limits(ranges, gap, max_bytes):
    data, reads = random.Random(1).randbytes(6000), []

    def read(offset: int, size: int) -> bytes:
        reads.append((offset, size))
        return data[offset : offset + size]

    assert read_coalesced(read, ranges, gap, max_bytes) == [data[o : o + n] for o, n in ranges]
    blocks = coalesce(ranges, gap, max_bytes)
    assert sorted(m for block in blocks for m in block.members) == list(range(len(ranges)))
    for block in blocks:
        assert block.size <= max(max_bytes, max(ranges[m][1] for m in block.members))
        assert block.offset == min(ranges[m][0] for m in block.members)
        assert block.offset + block.size == max(sum(ranges[m]) for m in block.members)
    useful = len({byte for offset, size in ranges for byte in range(offset, offset + size)})
    if sum(sum(ranges[m][1] for m in block.members) for block in blocks) == useful:  # no overlaps
        assert sum(block.size for block in blocks) <= useful + gap * max(0, len(ranges) - len(blocks))
    assert read_coalesced(read, ranges, gap, max_bytes, threads=3) == [data[o : o + n] for o, n in ranges]


def test_neighbours_of_small_members_are_one_system_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(DATA)
    file, calls, real = LocalFile(tmp_path / "a", len(DATA)), [], os.pread
    monkeypatch.setattr(os, "pread", lambda *args: calls.append(args) or real(*args))
    ranges = [(i * 1024, 600) for i in range(50)]
    assert file.read_many(ranges) == [DATA[o : o + n] for o, n in ranges]
    assert len(calls) == 1


def test_paths_and_urls_are_joined(tmp_path: Path) -> None:
    assert join_root("/data", "a/b") == Path("/data/a/b") and join_root("/data", "/c") == Path("/c")
    assert join_root("s3://bucket/x/", "a b") == "s3://bucket/x/a b"
    assert join_root("https://h/x", "/c") == Path("/c")
    assert join_root("https://h/x", "s3://b/c") == "s3://b/c"
    assert join_url("https://h/x?sig=1", "0 1.tar") == "https://h/x/0%201.tar?sig=1"
    assert join_root("C", "d") == Path("C/d")


BAD_PLACES = ["pipe:touch X; cat s.tar", "ftp://h/a", "file:///etc", "simplecache::s3://b/a", "shell://x", "ssh2://x"]


@pytest.mark.parametrize("place", BAD_PLACES)
def test_commands_and_unknown_schemes_are_refused_and_nothing_runs(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for action in (lambda: join_root("/data", place), lambda: join_root(place, "a"), lambda: ShardSet.open(place, "x")):
        with pytest.raises(RefusedInputError, match="nothing was"):
            action()
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- HTTP


class Server(ThreadingHTTPServer):
    """Serves a folder with ranges and does what a test asks for: `faults` are used up by requests for shards, in order."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.faults: list[str] = []
        self.requests: list[tuple[str, str | None]] = []
        self.num_connections = 0
        self.etag = '"1"'
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is what the tests are about."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def setup(self) -> None:
        super().setup()
        self.server.num_connections += 1

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        name, wanted = self.path.partition("?")[0].strip("/"), self.headers["Range"]
        self.server.requests.append((name, wanted))
        fault = self.server.faults.pop(0) if self.server.faults and ".tar" in name else ""
        path = self.server.folder / name
        if fault.isdigit():
            return self._answer(int(fault), b"no")
        if fault == "drop":
            self.close_connection = True
            return None
        if fault.startswith("to "):
            return self._answer(302, b"", Location=fault[3:])
        if not path.is_file():
            return self._answer(404, b"")
        data = path.read_bytes()
        if wanted is None or fault == "ignore":
            return self._answer(200, data)
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", wanted).groups())
        body, last = data[first : last + 1], min(last, len(data) - 1)
        if fault == "shift":
            first += 1
        etag = '"2"' if fault == "etag" else self.server.etag
        total = len(data) + (fault == "size")
        range_header = {"Content-Range": f"bytes {first}-{last}/{total}", "ETag": etag}
        if fault == "slow":
            time.sleep(0.5)
        return self._answer(206, body, cut=fault == "cut", **range_header)

    def _answer(self, status: int, body: bytes, cut: bool = False, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "a.tar").write_bytes(DATA)
    running = Server(folder)
    yield running
    running.shutdown()
    running.server_close()


def remote(server: Server, name: str = "a.tar") -> HttpFile:
    return HttpFile(f"{server.url}/{name}", HttpClient())


def test_ranges_come_over_one_connection(server: Server) -> None:
    file = remote(server)
    assert file.size() == len(DATA)
    ranges = [(200_000, 10), (0, 5), (5, 0), (299_999, 1), (100, 70_000)]
    for offset, size in ranges:
        assert file.read(offset, size) == DATA[offset : offset + size]
    assert server.num_connections == 1
    assert file.read_many(ranges) == [DATA[o : o + n] for o, n in ranges]
    before = len(server.requests)
    assert file.read_many([(i * 1000, 400) for i in range(100)]) == [
        DATA[i * 1000 : i * 1000 + 400] for i in range(100)
    ]
    assert len(server.requests) == before + 1


@pytest.mark.parametrize("faults", [["503", "503"], ["cut"], ["drop"], ["429", "cut", "500"]])
def test_what_a_try_can_heal_is_tried_again(server: Server, faults: list[str]) -> None:
    file = remote(server)
    file.size()
    server.faults = list(faults)
    assert file.read(1000, 5000) == DATA[1000:6000]
    assert not server.faults


def test_a_server_that_stays_broken_is_an_error_with_object_and_offset(server: Server) -> None:
    server.faults = ["503"] * 9
    with pytest.raises(
        DataError, match=r"a\.tar: offset 1000: cannot be read after 4 tries \(the server answers 503\)"
    ):
        remote(server).read(1000, 5000)
    assert len(server.faults) == 5


def test_a_slow_server_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "TIMEOUT_S", 0.1)
    server.faults = ["slow"]
    assert remote(server).read(0, 10) == DATA[:10]  # by the second try
    server.faults = ["slow"] * 4
    with pytest.raises(DataError, match="TimeoutError"):
        remote(server).read(0, 10)


HOPELESS = {
    "404": r"answers 404",
    "416": r"answers 416",
    "ignore": r"ignores `Range`|at most 10 bytes",
    "shift": r"Content-Range 'bytes 6-14/300000'",
    "etag": r"the object changed",
    "size": r"the object changed",
    "to ftp://127.0.0.1/a.tar": r"redirect to 'ftp://.*not followed",
    "to file:///etc/passwd": r"redirect to 'file:.*not followed",
}


@pytest.mark.parametrize("fault", HOPELESS)
def test_what_no_try_can_heal_ends_at_once(server: Server, fault: str) -> None:
    file = remote(server)
    file.size()
    server.faults = [fault, *["503"] * 3]
    with pytest.raises(DataError, match=HOPELESS[fault]):
        file.read(5, 10)
    assert len(server.faults) == 3


def test_redirects_are_followed_some_times(server: Server) -> None:
    (server.folder / "b.tar").write_bytes(DATA[::-1])
    server.faults = [f"to {server.url}/b.tar"]
    assert remote(server).read(0, 10) == DATA[::-1][:10]
    server.faults = ["to /a.tar"] * 99
    with pytest.raises(DataError, match="more than 5 redirects"):
        remote(server).read(0, 10)


def test_https_is_not_left_for_http_and_passwords_stay_with_their_server(server: Server) -> None:
    with pytest.raises(DataError, match="not followed"):
        http_module._redirected("https://h/a", "https://h/a", "http://h/a")
    assert http_module._redirected("http://h/a", "http://h/a", "https://g/b") == "https://g/b"
    sent = []
    real = Handler.do_GET
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handler, "do_GET", lambda self: (sent.append(self.headers["Authorization"]), real(self))[1])
        other = f"http://localhost:{server.server_address[1]}/a.tar"
        server.faults = [f"to {other.replace('//', '//me:pw@')}"]
        file = HttpFile(f"http://me:pw@127.0.0.1:{server.server_address[1]}/a.tar?sig=s3cret", HttpClient())
        assert file.read(0, 3) == DATA[:3]
    assert sent == ["Basic bWU6cHc=", None]
    server.faults = ["404"]
    with pytest.raises(DataError) as caught:
        file.read(0, 3)
    assert "pw" not in str(caught.value) and "s3cret" not in str(caught.value)


def _read_in_child(file: HttpFile, out: multiprocessing.SimpleQueue) -> None:
    out.put(file.read(10, 100) == DATA[10:110])


def test_a_forked_process_opens_its_own_connections(server: Server) -> None:
    file = remote(server)
    file.size()
    context = multiprocessing.get_context("fork")
    out = context.SimpleQueue()
    process = context.Process(target=_read_in_child, args=(file, out))
    process.start()
    assert file.read(0, 50_000) == DATA[:50_000]
    assert out.get() is True
    process.join(10)
    assert server.num_connections == 2
    again = pickle.loads(pickle.dumps(file))
    assert again.read(3, 4) == DATA[3:7]
    server.etag = '"3"'  # what was learned before pickling still holds
    with pytest.raises(DataError, match="changed"):
        again.read(3, 4)


# ---------------------------------------------------------------- datasets behind URLs


def build(folder: Path, num: int = 12, per_shard: int = 4) -> Path:
    with ShardWriter(folder, max_samples=per_shard) as writer:
        for i in range(num):
            turns = [Turn("user", f"question {i}"), Turn("assistant", f"answer {i}")]
            writer.write(f"{i:05d}", {"json": encode_row(turns)})
    return folder


def texts(data: ShardSet, rows: list[int] | None = None) -> list[str]:
    return [sample.turns[1].text for sample in data.read_many(list(range(len(data))) if rows is None else rows)]


@pytest.mark.parametrize("cached", [False, True])
def test_a_dataset_over_http_equals_the_local_one(server: Server, tmp_path: Path, cached: bool) -> None:
    local = ShardSet.open(build(server.folder / "d"), "d")
    cache = CacheConfig(dir=str(tmp_path / "cache")) if cached else None
    data = ShardSet.open(f"{server.url}/d", "d", cache)
    assert (data.fingerprint, len(data), data.skipped) == (local.fingerprint, 12, Counter())
    assert [data.id(i) for i in range(12)] == [local.id(i) for i in range(12)]
    assert data.read_many([7, 3, 3, 11, 0]) == local.read_many([7, 3, 3, 11, 0])
    assert data.read(5) == local.read(5)
    again = pickle.loads(pickle.dumps(data))
    assert texts(again) == texts(local)
    asked = len(server.requests)
    assert texts(data) == texts(local)
    assert (len(server.requests) == asked) == cached
    assert data.shards[0].sidecars(".x.npz") == ((tmp_path / "cache/lengths/000000.x.npz",) if cached else ())
    with pytest.raises(DataError, match="remote"):
        _ = data.shards[0].path
    if cached:  # a new start asks for the manifest and each shard's size, nothing else
        del server.requests[:]
        assert texts(ShardSet.open(f"{server.url}/d", "d", cache)) == texts(local)
        assert Counter(name.rpartition(".")[2] for name, _ in server.requests) == {"json": 1, "tar": 3}


def test_damaged_indexes_in_the_cache_are_fetched_again(server: Server, tmp_path: Path) -> None:
    build(server.folder / "d")
    cache = CacheConfig(dir=str(tmp_path / "cache"))
    data = ShardSet.open(f"{server.url}/d", "d", cache)
    whole = {path: path.read_bytes() for path in (tmp_path / "cache/indexes").iterdir()}
    assert len(whole) == 3
    for damage in (lambda path: os.truncate(path, 50), lambda path: path.write_bytes(b""), Path.unlink):
        for path in whole:
            damage(path)
        for shard in data.shards:
            shard.close()
        assert texts(data) == [f"answer {i}" for i in range(12)]
        assert {path: path.read_bytes() for path in (tmp_path / "cache/indexes").iterdir()} == whole
    for path, content in whole.items():
        path.write_bytes(content[:-1] + b"x")
    assert texts(ShardSet.open(f"{server.url}/d", "d", cache)) == [f"answer {i}" for i in range(12)]


def test_remote_shards_that_are_not_the_indexed_ones_are_put_aside(server: Server) -> None:
    folder = build(server.folder / "d")
    (folder / "000000.tar").unlink()
    (folder / "000001.idx").write_bytes((folder / "000000.idx").read_bytes())
    data = ShardSet.open(f"{server.url}/d", "d")
    assert list(data.quarantined) == ["000000.tar", "000001.tar"]
    assert "404" in data.quarantined["000000.tar"] and "not the index" in data.quarantined["000001.tar"]
    assert data.skipped == {"quarantined": 8} and data.indexed == 12
    with pytest.raises(RefusedInputError, match=r"manifest\.json.*404"):
        ShardSet.open(f"{server.url}/none", "d")


def test_a_remote_shard_that_changes_while_it_is_read_ends_the_run(server: Server) -> None:
    data = ShardSet.open(f"{build(server.folder / 'd') and server.url}/d", "d")
    assert data.read(0).turns
    server.etag = '"2"'
    with pytest.raises(DataError, match=r"000000\.tar: .*changed while it was read.*sample '00001' at offset"):
        data.read(1)


def test_a_manifest_cannot_lead_out_of_the_cache(server: Server, tmp_path: Path) -> None:
    folder = build(server.folder / "d")
    manifest = (folder / "manifest.json").read_text()
    digest = re.search(r'"idx_digest": "(\w+)"', manifest)[1]
    (folder / "manifest.json").write_text(manifest.replace(digest, "../../../evil"))
    with pytest.raises(RefusedInputError, match="digests"):
        ShardSet.open(f"{server.url}/d", "d", CacheConfig(dir=str(tmp_path / "cache/deep")))
    assert not (tmp_path / "evil.idx").exists()


def test_object_stores_are_read_through_fsspec(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    folder = build(tmp_path / "d")
    store = fsspec.filesystem("memory")
    for path in folder.iterdir():
        store.pipe_file(f"/bucket/d/{path.name}", path.read_bytes())
    local, data = ShardSet.open(folder, "d"), ShardSet.open("memory://bucket/d", "d")
    # each process opens its own file system; the one in memory keeps its files in the class
    assert texts(data) == texts(local) and data.fingerprint == local.fingerprint
    store.rm("/bucket/d/000001.tar")
    with pytest.raises(DataError, match="FileNotFoundError"):
        data.read(5)
    assert list(ShardSet.open("memory://bucket/d", "d").quarantined) == ["000001.tar"]


def test_a_store_without_its_package_names_the_extra() -> None:
    from mmscale.errors import MissingExtraError

    try:
        import s3fs  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtraError, match=r"mmscale\[remote\]"):
            ShardSet.open("s3://bucket/d", "d")
    else:
        pytest.skip("s3fs is installed")


# ---------------------------------------------------------------- some shards of a folder


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{000000..000001}.tar", [0, 1]),
        ("00000{0,2}.tar", [0, 2]),
        ("*.tar", [0, 1, 2]),
        ("00000[12].tar", [1, 2]),
        ("000001.tar", [1]),
    ],
)
def test_a_pattern_takes_some_shards(server: Server, pattern: str, expected: list[int]) -> None:
    folder = build(server.folder / "d")
    whole = ShardSet.open(folder, "d")
    wanted = [f"answer {i}" for shard in expected for i in range(shard * 4, shard * 4 + 4)]
    for place in (folder / pattern, str(folder / pattern), f"{server.url}/d/{pattern}"):
        data = ShardSet.open(place, f"d/{pattern}")
        assert texts(data) == wanted
        assert data.id(0) == f"d/{expected[0]:06d}.tar:{expected[0] * 4:05d}"
        assert data.quarantined == {}
        assert (data.fingerprint == whole.fingerprint) == (expected == [0, 1, 2])


@pytest.mark.parametrize(
    "pattern", ["{000000..000003}.tar", "x*.tar", "{000000,000009}.tar", "{0..200000}.tar", "{0.tar"]
)
def test_a_pattern_that_misses_is_refused(tmp_path: Path, pattern: str) -> None:
    folder = build(tmp_path / "d")
    with pytest.raises(RefusedInputError, match=r"no shard is called|more than|expected"):
        ShardSet.open(folder / pattern, "d")


# ---------------------------------------------------------------- the cache


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(cache_module, "BLOCK_BYTES", 1 << 14)
    return 1 << 14


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "blocks").glob("*/*"))


def test_every_block_is_fetched_once(server: Server, tmp_path: Path, small_blocks: int, seed: int) -> None:
    file = CachedFile(remote(server), BlockCache(tmp_path / "c", 10**9))
    rng = random.Random(seed)
    for _ in range(30):
        ranges = [(o := rng.randrange(len(DATA)), rng.randrange(min(60_000, len(DATA) - o))) for _ in range(3)]
        assert file.read_many(ranges) == [DATA[o : o + n] for o, n in ranges]
    fetched = Counter(wanted for _, wanted in server.requests)
    del fetched["bytes=0-0"]
    assert set(fetched.values()) == {1}
    assert all(int(re.match(r"bytes=(\d+)", wanted)[1]) % small_blocks == 0 for wanted in fetched)


def _read_all(file: CachedFile, seed: int, out: multiprocessing.SimpleQueue) -> None:
    rng = random.Random(seed)
    ok = True
    for _ in range(20):
        offset = rng.randrange(len(DATA) - 30_000)
        ok &= file.read(offset, 30_000) == DATA[offset : offset + 30_000]
    out.put(ok)


@pytest.mark.parametrize("max_bytes", [10**9, 5 << 14])
def test_many_processes_share_it(server: Server, tmp_path: Path, small_blocks: int, max_bytes: int) -> None:
    file = CachedFile(remote(server), BlockCache(tmp_path / "c", max_bytes))
    context = multiprocessing.get_context("fork")
    out = context.SimpleQueue()
    processes = [context.Process(target=_read_all, args=(file, seed, out)) for seed in range(4)]
    for process in processes:
        process.start()
    assert all(out.get() for _ in processes)
    for process in processes:
        process.join(10)
    if max_bytes == 10**9:
        fetched = Counter(wanted for _, wanted in server.requests if wanted != "bytes=0-0")
        assert max(fetched.values()) == 1  # the others waited for it
    assert used(tmp_path / "c") <= max_bytes + 4 * small_blocks
    assert not [path for end in ("tmp", "lock") for path in (tmp_path / "c").glob(f"**/*.{end}")]


def test_the_blocks_used_least_recently_go_first(server: Server, tmp_path: Path, small_blocks: int) -> None:
    folder = tmp_path / "c"
    stored = small_blocks + 8  # with its checksum
    file = CachedFile(remote(server), BlockCache(folder, 4 * stored))
    for number in range(4):
        file.read(number * small_blocks, 1)
        time.sleep(0.01)
    file.read(0, 1)  # used again
    file.read(4 * small_blocks, 1)
    assert sorted(int(path.name) for path in folder.glob("blocks/*/[0-9]*")) == [0, 3, 4]
    assert used(folder) == int((folder / "used").read_text()) == 3 * stored


def test_deleted_and_cut_blocks_are_fetched_again(server: Server, tmp_path: Path, small_blocks: int) -> None:
    file = CachedFile(remote(server), BlockCache(tmp_path / "c", 10**9))
    expected = DATA[:40_000]
    assert file.read(0, 40_000) == expected
    blocks = sorted(tmp_path.glob("c/blocks/*/[0-9]*"))
    blocks[0].unlink()
    os.truncate(blocks[1], 100)
    assert file.read(0, 40_000) == expected
    for path in sorted(tmp_path.glob("c/**/*"), reverse=True):  # everything, folders included
        path.rmdir() if path.is_dir() else path.unlink()
    assert file.read(0, 40_000) == expected and file.read(0, 40_000) == expected
    assert len(list(tmp_path.glob("c/blocks/*/[0-9]*"))) == 3


def test_a_flipped_bit_in_a_block_is_noticed(server, tmp_path, monkeypatch, caplog, seed):
    monkeypatch.setattr(cache_module, "BLOCK_BYTES", 200_000)  # several pieces with checksums of their own
    file = CachedFile(remote(server), BlockCache(tmp_path / "c", 10**9))
    rng = random.Random(seed)
    for _ in range(20):
        assert file.read(0, len(DATA)) == DATA
        (path,) = (path for path in tmp_path.glob("c/blocks/*/0"))
        damaged = bytearray(path.read_bytes())
        place = rng.randrange(200_000)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        offset = max(0, place - rng.randrange(100_000))
        assert file.read(offset, place - offset + 1) == DATA[offset : place + 1]
    assert caplog.text.count("is damaged and fetched again") == 20


def test_a_new_version_has_other_blocks(server: Server, tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "c", 10**9)
    assert CachedFile(remote(server), cache).read(0, 10) == DATA[:10]
    (server.folder / "a.tar").write_bytes(DATA[::-1])
    server.etag = '"2"'
    assert CachedFile(remote(server), cache).read(0, 10) == DATA[::-1][:10]


DISK_FAULTS: dict[str, Callable[[Path, pytest.MonkeyPatch], None]] = {
    "full": lambda folder, patch: patch.setattr(Path, "write_bytes", _full),
    "a file in its place": lambda folder, patch: folder.write_text("x") and None,
}


def _full(path: Path, data: bytes) -> int:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fault", DISK_FAULTS)
def test_a_disk_that_takes_nothing_is_survived_with_one_warning(server, tmp_path, fault, caplog, monkeypatch):
    DISK_FAULTS[fault](tmp_path / "c", monkeypatch)
    file = CachedFile(remote(server), BlockCache(tmp_path / "c", 10**9))
    with caplog.at_level("WARNING", logger="mmscale"):
        for _ in range(3):
            assert file.read_many([(5, 10), (9000, 20)]) == [DATA[5:15], DATA[9000:9020]]
    assert caplog.text.count("WITHOUT the cache") == 1
    assert server.requests[-1][1] == "bytes=5-9019"  # exact ranges from then on, not whole blocks


def test_a_read_only_cache_still_serves_what_it_has(server, tmp_path, small_blocks, caplog):
    CachedFile(remote(server), BlockCache(tmp_path / "c", 10**9)).read(0, 100)
    folders = [tmp_path / "c", *(tmp_path / "c").glob("**/")]
    if os.geteuid() == 0:  # root may write anywhere: what a read-only mount says
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
            patch.setattr(os, "utime", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
            _read_from_read_only(server, tmp_path, caplog)
        return
    for folder in folders:
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        _read_from_read_only(server, tmp_path, caplog)
    finally:
        for folder in folders:
            folder.chmod(stat.S_IRWXU)


def _read_from_read_only(server, tmp_path, caplog):
    file = CachedFile(remote(server), BlockCache(tmp_path / "c", 10**9))
    file.size()
    asked = len(server.requests)
    assert file.read(50, 50) == DATA[50:100] and len(server.requests) == asked
    with caplog.at_level("WARNING", logger="mmscale"):
        assert file.read(200_000, 50) == DATA[200_000:200_050]
    assert "WITHOUT the cache" in caplog.text
