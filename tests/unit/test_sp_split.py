"""Packs cut into parts: nothing lost, nothing twice, every label with its position, media over a border."""

import pickle
from dataclasses import fields

import numpy as np
import pytest
import torch

from mmscale.config.specs import media_specs
from mmscale.errors import ParallelError
from mmscale.parallel.sp.media import TowerInput
from mmscale.parallel.sp.plan import local_index, padded_lengths
from mmscale.parallel.sp.split import PAD_TOKEN, bind, divide, split
from mmscale.streaming.make_pack import divided
from mmscale.types import IGNORE

LAYOUTS = ("contiguous", "zigzag", "per_document", "planned")
DEGREES = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4), (2, 4), (1, 8))


@pytest.fixture
def specs(tiny_config):
    config = tiny_config()
    return media_specs(config.model, config.data)


@pytest.fixture
def towers(specs):
    return {
        m: TowerInput(specs.rows_per_input(m), cost) for m, cost in (("image", 2.0), ("video", 2.0), ("audio", 3.0))
    }


def random_documents(rng, audio_window, with_media=True):
    kinds = [("text", 1), ("image", 1), ("video", 3), ("audio", 1)] if with_media else [("text", 1)]
    documents = []
    for _ in range(int(rng.integers(1, 6))):
        document = [("text", int(rng.integers(1, 12)))]
        for _ in range(int(rng.integers(0, 4))):
            kind, most = kinds[int(rng.integers(len(kinds)))]
            amount = int(rng.integers(1, 3 * audio_window)) if kind == "audio" else int(rng.integers(1, most + 1))
            document += [(kind, amount), ("text", int(rng.integers(1, 9)))]
        documents.append(document)
    return documents


def plan(pack, ulysses, ring, layout):
    return divided(pack, lambda lengths: divide(lengths, ulysses, ring, layout))


def holders(pack, ulysses, ring):
    lengths = padded_lengths(pack.lengths, ulysses * ring)
    return [local_index(pack.spans, lengths, r, u, ulysses) for r in range(ring) for u in range(ulysses)]


def join(values, held, total):
    """The values of all parts in the order of the pack, without padding; the last axis is that of the tokens."""
    joined = torch.empty_like(torch.cat(values, dim=-1))
    joined[..., torch.from_numpy(np.concatenate(held))] = torch.cat(values, dim=-1)
    return joined[..., :total]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_split_then_join_is_the_pack(seed, make_pack, specs, layout):
    """Tokens, positions, labels and media of random packs come back exactly, for every degree."""
    rng = np.random.default_rng(seed)
    towers = {m: TowerInput(specs.rows_per_input(m), 1.0) for m in ("image", "video", "audio")}
    for number in range(25):
        pack = make_pack(specs, random_documents(rng, specs.audio.window_samples), seed + number)
        for ulysses, ring in DEGREES:
            planned = plan(pack, ulysses, ring, layout)
            parts, held = split(planned, ulysses, ring, towers), holders(planned, ulysses, ring)
            total = pack.num_tokens
            assert len({p.input_ids.numel() for p in parts}) == 1
            assert sum(p.input_ids.numel() for p in parts) - total == -total % (ulysses * ring)
            for name in ("input_ids", "position_ids", "labels"):
                assert torch.equal(join([getattr(p, name) for p in parts], held, total), getattr(pack, name)), name
            targets = {int(h[t]): int(p.labels[t]) for h, p in zip(held, parts, strict=True) for t in p.target_idx}
            assert targets == {int(t): int(pack.labels[t]) for t in pack.target_idx}
            for modality, media in pack.media.items():
                encoded = [x for p in parts for x in p.inputs.get(modality, ())]
                assert len(encoded) == len(media.data)
                as_bytes = lambda xs: sorted(x.numpy().tobytes() for x in xs)  # noqa: E731
                assert as_bytes(encoded) == as_bytes(media.data)


def test_padding_is_a_document_of_its_own(seed, make_pack, specs):
    """At most P - 1 tokens, without target, at its own positions, reading its own text row."""
    pack = make_pack(specs, [[("text", 5)], [("text", 8)]], seed)
    parts = split(plan(pack, 2, 4, "contiguous"), 2, 4, {})
    pads = [(p, t) for p, h in zip(parts, holders(plan(pack, 2, 4, "contiguous"), 2, 4), strict=True)
            for t in range(len(h)) if h[t] >= 13]  # fmt: skip
    assert [int(p.position_ids[t]) for p, t in pads] == [0, 1, 2]
    for part, t in pads:
        assert (int(part.input_ids[t]), int(part.labels[t]), int(part.source_index[t])) == (PAD_TOKEN, IGNORE, t)
    assert parts[0].lengths == (5, 8, 3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_position_axes(seed, make_pack, specs, layout):
    """Positions [4, T] (text, time, height, width) are cut along their last axis."""
    pack = make_pack(specs, [[("text", 9)], [("text", 4)]], seed)
    axes = torch.stack([pack.position_ids, *torch.randint(0, 99, (3, 13))])
    pack = plan(type(pack)(**{f.name: axes if f.name == "position_ids" else getattr(pack, f.name) for f in fields(pack)}),
                1, 4, layout)  # fmt: skip
    parts = split(pack, 1, 4, {})
    assert torch.equal(join([p.position_ids for p in parts], holders(pack, 1, 4), 13), axes)


def test_media_over_a_border(seed, make_pack, specs, towers):
    """An image whose tokens lie on two ranks is encoded on one, and both get the rows that they use."""
    rows = specs.rows_per_input("image")
    pack = plan(make_pack(specs, [[("text", 10), ("image", 1), ("text", 10 - rows % 2)]], seed), 1, 2, "contiguous")
    parts = split(pack, 1, 2, towers)
    assert sorted(len(p.inputs.get("image", ())) for p in parts) == [0, 1]
    received = [sum(p.routing.num_received) for p in parts]
    assert sum(received) == rows and min(received) > 0
    for part, count in zip(parts, received, strict=True):
        held = part.source_index[part.media_positions.long()]
        assert held.tolist() == [len(part.source_index) + row for row in range(count)]


def test_parts_without_targets(seed, make_pack, specs, towers):
    """A rank whose positions are all ignored has an empty, not a missing, list of targets."""
    pack = make_pack(specs, [[("text", 40)], [("text", 3)]], seed, target_share=0.0)
    for part in split(plan(pack, 1, 2, "contiguous"), 1, 2, towers):
        assert part.target_idx.shape == (0,) and part.target_idx.dtype == torch.int64


def test_every_rank_has_a_route_or_none(seed, make_pack, specs, towers):
    """One image is a route on all ranks, those without media too, for they wait for each other in it; text has none."""
    documents = [[("text", 60), ("image", 1)], [("text", 3)]]
    assert all(p.routing for p in split(plan(make_pack(specs, documents, seed), 1, 4, "planned"), 1, 4, towers))
    text = plan(make_pack(specs, [[("text", 9)]], seed), 1, 4, "planned")
    assert all(p.routing is None for p in split(text, 1, 4, towers))


def test_one_rank_has_the_pack_itself(seed, make_pack, specs):
    """Tensor-parallel ranks alone get whole packs, with rows where they were and no route."""
    pack = make_pack(specs, [[("text", 6), ("image", 2), ("audio", 9)]], seed)
    (part,) = split(pack, 1, 1, {})
    for name in ("input_ids", "position_ids", "labels", "target_idx", "source_index", "media_positions"):
        assert torch.equal(getattr(part, name), getattr(pack, name)), name
    assert part.routing is None and {m: x.shape for m, x in part.inputs.items()} == {
        m: b.data.shape for m, b in pack.media.items()
    }


def test_parts_can_be_pickled(seed, make_pack, specs, towers):
    """They travel to other processes."""
    pack = plan(make_pack(specs, [[("text", 9), ("image", 2)]], seed), 2, 1, "contiguous")
    part = split(pack, 2, 1, towers)[1]
    again = pickle.loads(pickle.dumps(part))
    assert torch.equal(again.input_ids, part.input_ids)
    assert again.spans == part.spans and again.routing.num_sent == part.routing.num_sent


def test_a_plan_for_other_degrees_is_refused(seed, make_pack, specs):
    """Named are the degree and what was found."""
    pack = plan(make_pack(specs, [[("text", 16)]], seed), 1, 2, "contiguous")
    for ulysses, ring in (
        (1, 4),
        (
            2,
            2,
        ),
    ):
        if (ulysses, ring) == (2, 2):
            pack = plan(make_pack(specs, [[("text", 14)]], seed), 1, 2, "contiguous")
        with pytest.raises(ParallelError, match=rf"parallel.ring={ring}.*open the stream"):
            split(pack, ulysses, ring, {})


def test_a_lost_label_would_be_seen(seed, make_pack, specs):
    """The join is not blind: one part's labels moved by a position are another table."""
    pack = plan(make_pack(specs, [[("text", 16)]], seed, target_share=1.0), 1, 2, "contiguous")
    parts, held = split(pack, 1, 2, {}), holders(pack, 1, 2)
    moved = [parts[0].labels.roll(1), parts[1].labels]
    assert not torch.equal(join(moved, held, 16), pack.labels)


def test_bind_gives_what_a_forward_reads(seed, make_pack, specs):
    """Without sequence ranks the documents of a bound part see what they see in the whole pack."""
    from mmscale.parallel.mesh import Mesh

    pack = make_pack(specs, [[("text", 6), ("image", 1)], [("text", 3)]], seed)
    batch = bind(split(pack, 1, 1, {})[0], Mesh(0, 1, 0, 1, torch.device("cpu")), "exchange", "auto")
    assert batch.attention.num_tokens == pack.num_tokens and batch.route is None
    assert torch.equal(batch.source_index, pack.source_index)
    assert torch.equal(batch.media_positions, pack.media_positions)
