"""Packs made by one rank of a replica and trained on by all; encoded rows and their gradients between sequence ranks."""

import pytest
import torch

from mmscale.kernels.placement import media_positions
from mmscale.types import IGNORE, MediaBatch, PackedBatch

ROWS = {"image": 3, "video": 3, "audio": 4}
SIZE = {"image": 5, "video": 5, "audio": 7}  # numbers in a tower input


def towers():
    from mmscale.parallel.sp.media import TowerInput

    return {"image": TowerInput(3, 2.0), "video": TowerInput(3, 2.0), "audio": TowerInput(4, 5.0)}


def random_pack(seed, with_media=True):
    """A pack of random documents, in which some positions take media rows, in any order; some rows stand nowhere."""
    g = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=g))

    lengths = tuple(draw(1, 30) for _ in range(draw(1, 6)))
    total = sum(lengths)
    counts = {m: draw(0, 5) for m in ROWS} if with_media else {}
    counts = {m: n for m, n in counts.items() if n}
    num_rows = sum(ROWS[m] * n for m, n in counts.items())
    source = torch.arange(total)
    if num_rows:
        at = torch.randperm(total, generator=g)[: draw(0, min(total, num_rows) + 1)]
        source[at] = total + torch.randperm(num_rows, generator=g)[: len(at)]
    labels = torch.randint(0, 50, (total,), generator=g)
    labels[torch.rand(total, generator=g) < 0.5] = IGNORE
    zero = torch.zeros(0, dtype=torch.int64)
    media = {m: MediaBatch(torch.randn(n, SIZE[m], generator=g), zero, zero, zero, zero) for m, n in counts.items()}
    return PackedBatch(
        input_ids=torch.randint(0, 50, (total,), generator=g),
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        labels=labels,
        target_idx=(labels != IGNORE).nonzero().flatten(),
        source_index=source,
        media_positions=media_positions(source, num_rows),
        media=media,
        lengths=lengths,
        ids=(),
        tokens={},
    )


def planned(pack, mesh, layout="planned"):
    from mmscale.parallel.sp.split import divide
    from mmscale.streaming.make_pack import divided

    if mesh.sequence.size == 1:
        return pack
    return divided(pack, lambda lengths: divide(lengths, mesh.ulysses.size, mesh.ring.size, layout))


GRIDS = {2: [(1, 2, 1), (1, 1, 2), (2, 1, 1)], 4: [(1, 2, 1), (1, 2, 2), (2, 2, 1), (2, 1, 2), (4, 1, 1)]}


def share_everywhere(pool, seed):
    """Every rank's part of every pack against the split of the whole pack, on all layouts, with uneven ownership."""
    from grids import grid

    from mmscale.parallel.share import Sharing, share_packs
    from mmscale.parallel.sp.split import split

    for degrees in GRIDS[pool.world_size]:
        mesh = grid(pool, *degrees)
        sharing = Sharing(mesh, towers())
        sent = 0
        for step, num_packs in enumerate((1, 3, 8)):
            whole = [planned(random_pack(seed + 100 * mesh.dp_rank + 10 * step + k), mesh) for k in range(num_packs)]
            places = [k for k in range(num_packs) if (step + k) % mesh.replica.size == mesh.replica.rank]
            shared = share_packs(sharing, [whole[k] for k in places], places, num_packs)
            assert len(shared.batches) == num_packs
            sent += shared.sent_bytes
            for pack, batch, spans in zip(whole, shared.batches, shared.spans, strict=True):
                want = split(pack, mesh.ulysses.size, mesh.ring.size, towers())[mesh.sequence.rank]
                assert spans == want.spans
                for name in ("input_ids", "position_ids", "labels", "target_idx", "source_index", "media_positions"):
                    got = getattr(batch, name)
                    assert torch.equal(got, getattr(want, name)), (degrees, name)
                assert batch.inputs.keys() == want.inputs.keys()
                assert all(torch.equal(batch.inputs[m], want.inputs[m]) for m in want.inputs)
                assert (batch.route is None) == (want.routing is None)
                assert batch.attention.num_tokens == want.input_ids.numel()
        assert sent > 0 and not mesh.meter.num_bytes, "the meter is the main thread's"


def miscounted(pool):
    """Two ranks that both give the first pack of a step."""
    from grids import grid

    from mmscale.errors import ParallelError
    from mmscale.parallel.share import Sharing, share_packs

    mesh = grid(pool, 1, 2, 1)
    try:
        share_packs(Sharing(mesh, towers()), [planned(random_pack(1), mesh)], [0], 2)
    except ParallelError as error:
        return str(error)
    return ""


def routed_gradients(pool, seed):
    """The worst difference of embedded packs and encoder gradients from the whole pack, float64, and the bytes counted."""
    from grids import grid

    from mmscale.kernels.placement import place_media
    from mmscale.parallel.share import Sharing, share_packs

    g = torch.Generator().manual_seed(seed)
    weights = {m: torch.randn(SIZE[m], 2 * ROWS[m], generator=g, dtype=torch.float64) for m in ("image", "audio")}
    names = {"image": "image", "video": "image", "audio": "audio"}
    table = torch.randn(50, 2, generator=g, dtype=torch.float64)

    def embed(batch, inputs, leaves):
        rows = [(x.double() @ leaves[names[m]]).reshape(-1, 2) for m in ROWS if (x := inputs.get(m)) is not None]
        unused = [
            leaf.sum() * torch.ones(0, 2, dtype=leaf.dtype) for leaf in leaves.values()
        ]  # what the composite's zero rows do
        media = torch.cat([*rows, *unused])
        media = media if getattr(batch, "route", None) is None else batch.route(media)
        return place_media(table[batch.input_ids], media, batch.source_index, batch.media_positions)

    worst, calls = 0.0, 0
    for degrees in GRIDS[pool.world_size]:
        mesh = grid(pool, *degrees)
        if mesh.sequence.size == 1:
            continue
        for case in range(6):
            pack = planned(random_pack(seed + 7 * case + 1000 * mesh.dp_rank, case != 3), mesh)
            want = {name: w.clone().requires_grad_() for name, w in weights.items()}
            weight = torch.sin(torch.arange(2 * pack.num_tokens).double()).reshape(-1, 2)
            tokens = embed(pack, {m: b.data for m, b in pack.media.items()}, want)
            (tokens * weight).sum().backward()

            own = [(0, pack)] if mesh.replica.rank == 0 else []
            shared = share_packs(Sharing(mesh, towers()), [p for _, p in own], [k for k, _ in own], 1)
            batch = shared.batches[0]
            held = held_positions(pack, mesh)
            got = {name: w.clone().requires_grad_() for name, w in weights.items()}
            part = embed(batch, batch.inputs, got)
            real = held < pack.num_tokens
            worst = max(worst, float((part[real] - tokens[held[real]]).abs().max().detach()) if real.any() else 0.0)
            (part[real] * weight[held[real]]).sum().backward()
            for name, leaf in got.items():
                total = leaf.grad.clone()
                torch.distributed.all_reduce(total, group=mesh.sequence.group)
                size = max(1.0, float(want[name].grad.abs().max()))
                worst = max(worst, float((total - want[name].grad).abs().max()) / size)
            calls += 2 * bool(pack.media)
            if pack.media:
                routing = batch.route.keywords["routing"]
                there = sum(routing.num_sent) - routing.num_sent[mesh.sequence.rank]
                back = sum(routing.num_received) - routing.num_received[mesh.sequence.rank]
                assert mesh.meter.num_calls["media"] == 2
                assert mesh.meter.take()[0]["media"] == (there + back) * 2 * 8
    return worst, calls


def held_positions(pack, mesh):
    from mmscale.parallel.sp.plan import local_index, padded_lengths

    lengths = padded_lengths(pack.lengths, mesh.sequence.size)
    index = local_index(pack.spans, lengths, mesh.ring.rank, mesh.ulysses.rank, mesh.ulysses.size)
    return torch.from_numpy(index)


@pytest.mark.parametrize("world", [2, 4])
def test_every_rank_gets_its_part(ranks, seed, world):
    """Of every pack, whoever made it: equal parts on tensor ranks, nothing from another replica."""
    ranks(world).run(share_everywhere, seed)


def test_packs_that_do_not_fill_the_step_are_refused(ranks):
    """The place that came twice is named on every rank."""
    for text in ranks(2).run(miscounted):
        assert "micro-batches 0 to 1" in text and "found [0, 0]" in text


@pytest.mark.parametrize("world", [2, 4])
def test_rows_and_their_gradients_are_those_of_one_process(ranks, seed, world):
    """Rows used on several ranks get the sum of their gradients; ranks without media take part; text has no exchange."""
    for worst, calls in ranks(world).run(routed_gradients, seed):
        assert worst <= 1e-12
        assert calls > 0
