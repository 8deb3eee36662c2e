"""Stream mode on real ranks: they meet once per step, share the shards, and hold one state."""

import io
import tarfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from mmscale.config.schema import DataConfig, SourceConfig
from mmscale.parallel.comm import all_gather_objects
from mmscale.parallel.mesh import Mesh
from mmscale.streaming.rows import encode_row
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.streaming.unindexed.stream import UnindexedStream
from mmscale.types import MediaSpecs, Turn


def read_steps(mesh: Mesh, folder: str, tokenizer: str, saved: Any, num_steps: int) -> Any:
    sources = {"x": SourceConfig(path="*.tar", mode="stream")}
    data = DataConfig(sources=sources, seq_len=192, root=folder)
    stream = UnindexedStream.open(
        data, sources, TextTokenizer.load(tokenizer), MediaSpecs(), global_batch=2 * mesh.dp_size, dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size, workers=0, exchange=partial(all_gather_objects, mesh),
    )  # fmt: skip
    state, ids, own = None if saved is None else stream.restore(saved), [], []
    steps = stream.steps(state)
    for _ in range(num_steps):
        batch = next(steps)
        state = batch.state_after(state, ())
        ids += batch.ids
        own += [i for pack in batch.packs for i in pack.ids]
    steps.close()
    assert state is not None
    return ids, own, state.to_dict()


def test_ranks_share_the_shards_and_one_state(ranks, demo_data: Path, tmp_path: Path) -> None:
    for s in range(40):
        with tarfile.open(tmp_path / f"{s:02}.tar", "w") as tar:
            for i in range(10):
                body = encode_row([Turn("user", "x" * (7 * i)), Turn("assistant", "y")])
                info = tarfile.TarInfo(f"{s}-{i}.json")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
    saved, ids = None, []
    for world_size, num_steps in ((2, 2), (4, 1), (2, 1)):
        found = ranks(world_size).run(read_steps, str(tmp_path), str(demo_data / "tokenizer"), saved, num_steps)
        for other in found:
            assert other[0] == found[0][0] and other[2] == found[0][2]
        assert Counter(i for _, own, _ in found for i in own) == Counter(found[0][0])
        saved = found[0][2]
        ids += found[0][0]
    assert saved["num_seen"] == len(ids) > 20
    assert max(Counter(ids).values()) == 1
