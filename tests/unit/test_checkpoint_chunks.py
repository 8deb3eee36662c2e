"""Tensors written in chunks are read back whole; chunks with a gap or an overlap never become a checkpoint."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmscale.config.env import Launch
from mmscale.config.schema import ParallelConfig
from mmscale.errors import CheckpointError
from mmscale.parallel.layout import Chunk, Piece, ShardLayout, chunks
from mmscale.parallel.mesh import init_mesh
from mmscale.train.checkpoint import find_checkpoint, open_checkpoint, save_checkpoint
from mmscale.train.coverage import Box, coverage_problem

MESH = init_mesh(ParallelConfig(), "cpu", Launch())
Named = list[tuple[str, Chunk]]


class Given:
    """An engine as far as a save looks at it."""

    def __init__(self, found: Iterable[tuple[str, Chunk]], *forgotten: str) -> None:
        self.found = list(found)
        self.state_names = frozenset(name for name, _ in self.found) | {*forgotten}

    def state_views(self) -> Iterator[tuple[str, Chunk]]:
        return iter(self.found)


def save(root: Path, found: Named, step: int = 1):
    return open_checkpoint(save_checkpoint(root, step, Given(found), {}, MESH, 5))


def cut_up(rng: random.Random, shape: tuple[int, ...], num_cuts: int) -> list[Box]:
    """A random partition: boxes are cut in two again and again, along any dimension, not in a grid."""
    boxes = [Box((0,) * len(shape), shape)]
    for _ in range(num_cuts if shape else 0):
        box = boxes.pop(rng.randrange(len(boxes)))
        dim = rng.randrange(len(shape))
        at = rng.randrange(box.sizes[dim] + 1)  # also at the border: empty chunks happen
        for start, size in ((0, at), (at, box.sizes[dim] - at)):
            offsets, sizes = list(box.offsets), list(box.sizes)
            offsets[dim] += start
            sizes[dim] = size
            boxes.append(Box(tuple(offsets), tuple(sizes)))
    rng.shuffle(boxes)
    return boxes


def pieces(whole: Tensor, boxes: list[Box]) -> list[Chunk]:
    def part(box: Box) -> Tensor:
        return whole[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))]

    return [Chunk(part(box), box.offsets, whole.shape) for box in boxes]


def random_tensors(rng: random.Random, count: int) -> dict[str, Tensor]:
    shapes = [tuple(rng.choice((1, 2, 3, 5, 8, 0)) for _ in range(rng.randrange(4))) for _ in range(count)]
    dtypes = (torch.float32, torch.int64, torch.float64, torch.bfloat16)
    return {f"t.{i}": (torch.randn(shape) * 100).to(rng.choice(dtypes)) for i, shape in enumerate(shapes)}


def test_any_partition_is_read_back(tmp_path, seed) -> None:
    rng = random.Random(seed)
    tensors = random_tensors(rng, 120)
    found = [
        (name, chunk)
        for name, t in tensors.items()
        for chunk in pieces(t, cut_up(rng, tuple(t.shape), rng.randrange(7)))
    ]
    rng.shuffle(found)
    reader = save(tmp_path / "checkpoints", found)
    assert reader.names == frozenset(tensors)
    for name, tensor in tensors.items():
        got = reader.read(name)
        assert got.dtype == tensor.dtype and torch.equal(got, tensor) and got.is_contiguous()


def test_chunks_and_whole_tensors_are_one_format(tmp_path, seed) -> None:
    rng = random.Random(seed)
    tensors = random_tensors(rng, 20)
    whole = save(tmp_path / "whole", [(name, Chunk(t, (0,) * t.dim(), t.shape)) for name, t in tensors.items()])
    cut = save(
        tmp_path / "cut", [(n, c) for n, t in tensors.items() for c in pieces(t, cut_up(rng, tuple(t.shape), 4))]
    )
    for name in tensors:
        assert torch.equal(whole.read(name), cut.read(name))
    assert find_checkpoint(tmp_path / "whole", MESH).step == find_checkpoint(tmp_path / "cut", MESH).step == 1


def fused_layouts(parts: list[int], ways: int, dim: int, shape: torch.Size) -> list[ShardLayout]:
    """Layouts of all ranks for a projection of several parts, each cut evenly: a rank holds a slice of each."""
    layouts = []
    for rank in range(ways):
        own, start, local = [], 0, 0
        for size in parts:
            own.append(Piece(start + rank * (size // ways), local, size // ways))
            start, local = start + size, local + size // ways
        layouts.append(ShardLayout(shape, dim, tuple(own)))
    return layouts


@pytest.mark.parametrize("dim", [0, 1])
def test_tensor_parallel_pieces_and_uneven_rows(tmp_path, seed, dim) -> None:
    rng = random.Random(seed)
    sizes = [8 * rng.randrange(1, 4), 4 * rng.randrange(1, 4), 4 * rng.randrange(1, 4)]  # queries, keys, values
    shape = [5, 5]
    shape[dim] = sum(sizes)
    whole = torch.randn(shape)
    found: Named = []
    for layout in fused_layouts(sizes, 4, dim, whole.shape):
        local = layout.cut(whole)
        borders = sorted({0, len(local), *(rng.randrange(len(local) + 1) for _ in range(3))})
        for first, end in itertools.pairwise(borders):
            found += [("w", chunk) for chunk in chunks(local[first:end], layout, first)]
    reader = save(tmp_path / "checkpoints", found)
    assert len(found) > 4 and torch.equal(reader.read("w"), whole)


def spoil(rng: random.Random, found: list[Chunk]) -> list[Chunk]:
    """Chunks with a gap, an overlap, or both of the same size, so that the volume alone shows nothing."""
    kind = rng.choice(("lost", "twice", "moved", "both"))
    victim = rng.randrange(len(found))
    if kind == "lost":
        return found[:victim] + found[victim + 1 :]
    if kind == "twice":
        return [*found, found[victim]]
    chunk = found[victim]
    dim = rng.randrange(len(chunk.offsets))
    if kind == "moved":
        step = rng.choice((-1, 1))
        return [*found[:victim], replace(chunk, offsets=tuple(o + step * (d == dim) for d, o in enumerate(chunk.offsets))),
                *found[victim + 1 :]]  # fmt: skip
    half = Chunk(chunk.value[:1], chunk.offsets, chunk.whole)
    return [*found[:victim], half, half, *found[victim + 1 :]]


def test_a_gap_or_an_overlap_is_refused_by_name_and_nothing_is_kept(tmp_path, seed) -> None:
    rng = random.Random(seed)
    root = tmp_path / "checkpoints"
    for _ in range(40):
        whole = torch.randn(*(rng.randrange(2, 7) for _ in range(rng.randrange(1, 4))))
        good = [chunk for chunk in pieces(whole, cut_up(rng, tuple(whole.shape), 9)) if chunk.value.numel()]
        if len(good) == 1:
            continue
        assert coverage_problem(whole.shape, [Box(c.offsets, tuple(c.value.shape)) for c in good]) is None
        found = [("first", chunk) for chunk in good] + [("second", chunk) for chunk in spoil(rng, good)]
        with pytest.raises(CheckpointError, match=r"^second: .*nothing was saved"):
            save(root, found)
        assert not list(root.glob("step_????????"))
    assert find_checkpoint(root, MESH) is None


def test_chunks_of_two_tensors_under_one_name_are_refused(tmp_path) -> None:
    value = torch.ones(2, 3)
    other = [Chunk(value.double(), (2, 0), torch.Size((4, 3))), Chunk(value, (2, 0), torch.Size((5, 3)))]
    for chunk in other:
        with pytest.raises(CheckpointError, match=r"^w: .*different tensors"):
            save(tmp_path / "checkpoints", [("w", Chunk(value, (0, 0), torch.Size((4, 3)))), ("w", chunk)])


def is_covered_by_counting(whole: tuple[int, ...], boxes: list[Box]) -> bool:
    counts = torch.zeros(whole, dtype=torch.int64)
    for box in boxes:
        if any(o < 0 or o + n > w for o, n, w in zip(box.offsets, box.sizes, whole, strict=True)):
            return False
        counts[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))] += 1
    return bool((counts == 1).all()) and bool(boxes)


def test_coverage_is_what_counting_says(seed) -> None:
    rng = random.Random(seed)
    answers = []
    for _ in range(600):
        shape = tuple(rng.randrange(1, 6) for _ in range(rng.randrange(4)))
        boxes = cut_up(rng, shape, rng.randrange(6))
        if rng.random() < 0.6 and shape:
            boxes = [Box(tuple(max(0, o + rng.choice((0, 0, 0, 0, -1, 1))) for o in b.offsets), b.sizes) for b in boxes]
        answers.append(is_covered_by_counting(shape, boxes))
        assert (coverage_problem(shape, boxes) is None) == answers[-1], (shape, boxes)
    assert 100 < sum(answers) < 500
    assert coverage_problem((), []) == "no chunk" and math.prod(()) == 1


def test_a_tensor_that_no_rank_gives_is_refused(tmp_path) -> None:
    found = [("model.a", Chunk(torch.ones(2), (0,), torch.Size((2,))))]
    with pytest.raises(CheckpointError, match=r"model\.b: expected chunks of all ranks .* found none"):
        save_checkpoint(tmp_path, 1, Given(found, "model.b"), {}, MESH, 5)
    assert not list(tmp_path.glob("step_0*1"))
