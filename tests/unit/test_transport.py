"""Values between processes: what arrives is what was sent, shared and not copied, and nothing is left behind."""

import gc
import os
import random
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from mmscale.streaming import transport
from mmscale.types import MediaBatch, PackedBatch, Skip


@pytest.fixture
def channel():
    ends = socket.socketpair()
    yield ends
    for end in ends:
        end.close()


def through(channel, value):
    """`value` as the other end gets it; a thread sends, since a large value needs somebody who reads."""
    sender = threading.Thread(target=transport.send, args=(channel[0], value))
    sender.start()
    found = transport.receive(channel[1])
    sender.join()
    return found


def a_pack(num_tokens, side=8):
    ids = torch.arange(num_tokens)
    data = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
    media = {"image": MediaBatch(data, *torch.arange(12).view(4, 3))}
    skips = (Skip("text/000000.tar:1", "length", "too short: é", 512),)
    borders = torch.tensor([0, num_tokens], dtype=torch.int32)
    return PackedBatch(
        ids, ids, borders, ids, ids[:0], ids, ids.int(), media, (num_tokens,), ("a",), {"text": 1}, skips
    )


@pytest.mark.parametrize("limit", [0, 1 << 40], ids=["shared", "inline"])
@pytest.mark.parametrize("num_tokens", [1, 77, 40_000])
def test_a_pack_arrives_as_it_was(channel, monkeypatch, limit, num_tokens):
    monkeypatch.setattr(transport, "SHARED_FROM_BYTES", limit)
    sent = a_pack(num_tokens)
    found = through(channel, sent)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(sent.tensors(), found.tensors(), strict=True))
    plain = ("lengths", "ids", "tokens", "skipped")
    assert [getattr(found, name) for name in plain] == [getattr(sent, name) for name in plain]
    for tensor in found.tensors():
        assert tensor.numel() == 0 or tensor.data_ptr() % 64 == 0
        tensor.add_(1)  # the receiver's own memory
    assert torch.equal(sent.input_ids, torch.arange(num_tokens))


@pytest.mark.parametrize("limit", [0, 1 << 40], ids=["shared", "inline"])
def test_any_tensor_arrives_as_it_was(channel, monkeypatch, seed, limit):
    monkeypatch.setattr(transport, "SHARED_FROM_BYTES", limit)
    rng = random.Random(seed)
    kinds = (torch.uint8, torch.int64, torch.int32, torch.bool, torch.float32, torch.float16)
    for _ in range(30):
        shape = [rng.randrange(0, 7) for _ in range(rng.randrange(4))]
        tensors = [torch.randint(0, 2, shape).to(rng.choice(kinds)) for _ in range(rng.randrange(6))]
        value = {
            "tensors": [t.T if t.ndim == 2 else t for t in tensors],
            "array": np.arange(rng.randrange(9)),
            "x": None,
        }
        found = through(channel, value)
        assert all(
            torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(value["tensors"], found["tensors"], strict=True)
        )
        assert np.array_equal(found["array"], value["array"]) and found["x"] is None


def test_a_message_is_what_a_receiver_understands(channel):
    channel[0].sendall(transport.message((3, "task")) + transport.message([1]))
    assert transport.receive(channel[1]) == (3, "task")
    assert transport.receive(channel[1]) == [1]


def test_nothing_is_left_behind(channel, monkeypatch):
    monkeypatch.setattr(transport, "SHARED_FROM_BYTES", 0)
    value = {name: torch.arange(50) for name in "abc"}

    def left():
        gc.collect()
        return len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count("mmscale-pack")

    before = left()
    for _ in range(10_000):
        transport.send(channel[0], value)
        kept = transport.receive(channel[1])
    assert torch.equal(kept["c"], torch.arange(50))
    assert left() == (before[0] + 1, before[1] + 1), "one descriptor and one map for the value that is still held"
    del kept
    assert left() == before


def test_memory_outlives_the_channel_and_its_sender(channel):
    value = through(channel, torch.arange(1_000_000))
    for end in channel:
        end.close()
    part = value[500_000:]
    del value
    gc.collect()
    assert int(part[0]) == 500_000


@pytest.mark.parametrize("num_bytes", [0, 4, 8, 40])
def test_an_end_that_is_gone_is_told(channel, num_bytes):
    channel[0].sendall(transport.message(torch.arange(9))[:num_bytes])
    channel[0].close()
    with pytest.raises(EOFError):
        transport.receive(channel[1])
    with pytest.raises(EOFError):
        transport.send(channel[1], "anything")
        transport.send(channel[1], "the first may still find room")


def test_an_end_that_left_without_reading_is_told_after_its_last_word(channel):
    channel[1].sendall(b"a task that nobody reads")
    transport.send(channel[0], "last word")
    channel[0].close()
    assert transport.receive(channel[1]) == "last word"
    with pytest.raises(EOFError):
        transport.receive(channel[1])


@pytest.mark.parametrize("num_tokens", [1, 40_000])
def test_a_block_is_read_where_it_was_written(num_tokens):
    """As bytes in a larger buffer, whose place the tensors share."""
    sent = a_pack(num_tokens)
    block = transport.Block.of(sent)
    place = torch.zeros(block.num_bytes + 64, dtype=torch.uint8)
    block.write(place.numpy().data)
    found = transport.read_block(place.numpy().data)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(sent.tensors(), found.tensors(), strict=True))
    start, size = place.data_ptr(), block.num_bytes
    assert all(
        start <= t.data_ptr() < start + size and t.data_ptr() % 64 == start % 64 for t in found.tensors() if t.numel()
    )
