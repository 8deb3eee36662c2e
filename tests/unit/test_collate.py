"""A pack's labels, positions, borders and media places, against slow loops over its documents."""

import numpy as np
import pytest
import torch

from mmscale.errors import DataError
from mmscale.streaming.collate import collate
from mmscale.types import IGNORE, MODALITIES, AudioSpec, EncodedMedia, EncodedSample, ImageSpec, MediaSpecs, Skip

SPECS = MediaSpecs(
    ImageSpec(size=4, tokens=3), AudioSpec(rate_hz=100, window_samples=10, tokens=5, features="waveform")
)


def text_document(name, num_tokens, target_share, g):
    is_target = torch.rand(num_tokens, generator=g) < target_share
    return EncodedSample(name, torch.randint(0, 50, (num_tokens,), generator=g), is_target)


def random_document(name, g):
    """Text with up to four media items of any kind in between; media tokens are never targets."""
    parts, media, at = [], [], 0
    for _ in range(int(torch.randint(0, 5, (), generator=g))):
        n = int(torch.randint(0, 4, (), generator=g))
        parts.append(torch.rand(n, generator=g) < 0.5)
        at += n
        modality = MODALITIES[int(torch.randint(0, 3, (), generator=g))]
        inputs = int(torch.randint(1, 4, (), generator=g))
        tokens, rows = inputs * SPECS.rows_per_input(modality), None
        if modality == "audio":
            tokens -= int(torch.randint(0, 5, (), generator=g))
        if modality == "image" and inputs > 1:  # some rows in any order, and newlines
            some = torch.cat([torch.randperm(tokens, generator=g)[: tokens - 2], torch.full((3,), -1)])
            rows = some[
                torch.randperm(len(some), generator=g)[: int(torch.randint(0, len(some) + 1, (), generator=g))]
            ].numpy()
            tokens = len(rows)
        shape = (inputs, 10) if modality == "audio" else (inputs, 3, 4, 4)
        media.append(EncodedMedia(modality, torch.rand(shape, generator=g), at, tokens, rows))
        parts.append(torch.zeros(tokens, dtype=torch.bool))
        at += tokens
    n = int(torch.randint(1, 6, (), generator=g))
    parts.append(torch.rand(n, generator=g) < 0.5)
    is_target = torch.cat(parts)
    return EncodedSample(name, torch.randint(0, 50, is_target.shape, generator=g), is_target, tuple(media))


def slow_labels(documents):
    labels = []
    for d in documents:
        for t in range(len(d)):
            follows = t + 1 < len(d) and d.is_target[t + 1]
            labels.append(int(d.input_ids[t + 1]) if follows else IGNORE)
    return labels


def slow_source_index(documents):
    total = sum(map(len, documents))
    index, next_row = list(range(total)), total
    for modality in MODALITIES:
        start = 0
        for d in documents:
            for item in d.media:
                if item.modality == modality:
                    for k in range(item.num_tokens):
                        row = k if item.rows is None else int(item.rows[k])
                        if row >= 0:
                            index[start + item.slot + k] = next_row + row
                    next_row += len(item.data) * SPECS.rows_per_input(modality)
            start += len(d)
    return index


def test_random_packs_equal_slow_loops(seed):
    g = torch.Generator().manual_seed(seed)
    for _ in range(30):
        documents = [random_document(f"d{i}", g) for i in range(int(torch.randint(1, 6, (), generator=g)))]
        pack = collate(documents, SPECS)
        assert pack.labels.tolist() == slow_labels(documents)
        assert pack.source_index.tolist() == slow_source_index(documents)
        num_rows = sum(len(m.data) * SPECS.rows_per_input(m.modality) for d in documents for m in d.media)
        where = {s - pack.num_tokens: t for t, s in enumerate(pack.source_index.tolist()) if s >= pack.num_tokens}
        assert pack.media_positions.tolist() == [where.get(row, -1) for row in range(num_rows)]
        assert pack.media_positions.dtype == torch.int32
        assert pack.target_idx.tolist() == [t for t, v in enumerate(pack.labels.tolist()) if v != IGNORE]
        assert pack.position_ids.tolist() == [t for d in documents for t in range(len(d))]
        assert pack.cu_seqlens.tolist() == [sum(pack.lengths[:i]) for i in range(len(documents) + 1)]
        assert pack.cu_seqlens.dtype == torch.int32 and pack.input_ids.dtype == torch.int64
        assert pack.ids == tuple(d.id for d in documents)
        assert sum(pack.tokens.values()) == pack.num_tokens == len(pack.input_ids)
        for modality in MODALITIES:
            items = [(i, m) for i, d in enumerate(documents) for m in d.media if m.modality == modality]
            assert (modality in pack.media) == bool(items)
            if items:
                batch = pack.media[modality]
                assert torch.equal(batch.data, torch.cat([m.data for _, m in items]))
                assert batch.document.tolist() == [i for i, _ in items]
                assert batch.slot.tolist() == [sum(pack.lengths[:i]) + m.slot for i, m in items]
                assert batch.num_inputs.tolist() == [len(m.data) for _, m in items]
                assert pack.tokens[modality] == sum(m.num_tokens for _, m in items)


def test_a_document_never_predicts_the_next_one():
    every_token = [EncodedSample(n, torch.tensor([7, 8, 9]), torch.ones(3, dtype=torch.bool)) for n in "ab"]
    assert collate(every_token, SPECS).labels.tolist() == [8, 9, IGNORE, 8, 9, IGNORE]


def test_changing_one_document_leaves_the_others_alone(seed):
    g = torch.Generator().manual_seed(seed)
    documents = [text_document(n, 5, 0.5, g) for n in "abc"]
    other = [documents[0], text_document("b", 5, 0.5, g), documents[2]]
    one, two = collate(documents, SPECS), collate(other, SPECS)
    for name in ("input_ids", "labels", "position_ids", "source_index"):
        a, b = getattr(one, name), getattr(two, name)
        assert torch.equal(a[:5], b[:5]) and torch.equal(a[10:], b[10:])


def test_filler_is_named_and_not_counted():
    filler = EncodedSample("bad", torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.bool))
    good = EncodedSample("good", torch.tensor([1, 2]), torch.tensor([False, True]))
    pack = collate([filler, good], SPECS, [Skip("bad", "decode_image", "cut off")])
    assert pack.tokens == {"text": 2} and pack.num_tokens == 6 and pack.num_targets == 1
    assert [s.id for s in pack.skipped] == ["bad"]
    twice = EncodedSample("bad", torch.tensor([1, 2, 3, 4]), torch.ones(4, dtype=torch.bool))
    again = collate([filler, good, twice], SPECS, pack.skipped)  # a tiny source, in its next epoch
    assert again.tokens == {"text": 6}


def test_one_token_and_no_target():
    pack = collate([EncodedSample("a", torch.tensor([3]), torch.tensor([True]))], SPECS)
    assert pack.num_targets == 0 and pack.labels.tolist() == [IGNORE]


@pytest.mark.parametrize(("num_tokens", "rows"), [(4, None), (2, [0, 3]), (2, [0]), (7, [0, 1, 2, -1, 0, 1, 2])])
def test_media_that_do_not_fit_their_rows_are_refused(num_tokens, rows):
    map_ = None if rows is None else np.array(rows)
    item = EncodedMedia("image", torch.zeros(1, 3, 4, 4, dtype=torch.uint8), 0, num_tokens, map_)
    document = EncodedSample("a", torch.zeros(6, dtype=torch.int64), torch.zeros(6, dtype=torch.bool), (item,))
    with pytest.raises(DataError, match="at most 3 image tokens"):
        collate([document], SPECS)


def test_a_row_at_two_tokens_is_refused():
    """Its gradient would be a sum; placement copies one row per row."""
    item = EncodedMedia("image", torch.zeros(1, 3, 4, 4, dtype=torch.uint8), 1, 3, np.array([2, -1, 2]))
    document = EncodedSample("a", torch.zeros(6, dtype=torch.int64), torch.zeros(6, dtype=torch.bool), (item,))
    with pytest.raises(DataError, match=r"each of the 3 image rows .* found 2 tokens for 1 rows at 1 in a"):
        collate([document], SPECS)
