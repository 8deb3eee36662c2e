"""A picture of one pack exactly as it is trained."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from mmscale.data_tools.inspection.pack_html import render_html
from mmscale.data_tools.inspection.pack_png import render_png
from mmscale.data_tools.inspection.pack_view import PackView, view_pack
from mmscale.data_tools.inspection.run_stream import RunStream
from mmscale.errors import ConfigError, RefusedInputError
from mmscale.streaming.make_pack import make_pack
from mmscale.streaming.plan import PlanState


def write_pack_preview(opened: RunStream, pack: int, out: Path) -> PackView:
    """Draws pack number `pack` (from 0) of a run, and gives what the picture shows.

    Args:
        opened: the run.
        pack: its number in the order of the plan; step s holds the packs from `(s - 1) * train.global_batch` on.
        out: `.png`, or `.html` with all documents and all text.

    Raises:
        ConfigError: `out` has another ending or cannot be written.
        RefusedInputError: the plan has no such pack.
    """
    if out.suffix not in (".png", ".html"):
        raise ConfigError(f"--out {out}: expected a name that ends with .png or .html, found '{out.suffix}'; rename it")
    view = read_pack(opened, pack)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".html":
            out.write_text(render_html(view), encoding="utf-8", errors="replace")
        else:
            render_png(view).save(out, "PNG")
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}; give another --out") from error
    return view


def read_pack(opened: RunStream, number: int) -> PackView:
    """Pack `number` of a run, made as a loader's worker makes it. Raises RefusedInputError when the plan ends before it."""
    if number < 0:
        raise RefusedInputError(f"--pack is {number}, expected a number from 0 on; give the number of a pack")
    stream, batch = opened.stream, opened.config.train.global_batch
    if number >= opened.config.train.steps * batch:
        raise RefusedInputError(
            f"--pack is {number}, and the run has {opened.config.train.steps * batch} packs (train.steps={opened.config.train.steps} "
            f"x train.global_batch={batch}); give a smaller number"
        )
    packs = (pack for pack, _, _ in stream.plan.packs(PlanState()))
    pack = next(islice(packs, number, None), None)
    if pack is None:
        raise RefusedInputError(f"--pack is {number}, and the plan ends before it; give a smaller number")
    name = f"pack {number} (step {number // batch + 1}, pack {number % batch} of {batch})"
    return view_pack(make_pack(stream.sources, pack), name, opened.config.data.seq_len, opened.tokenizer.decode)
