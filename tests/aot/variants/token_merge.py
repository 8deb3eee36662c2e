"""Token merging: widths of SigLIP so400m (1152), CLIP ViT-L (1024) and one that 16 does not divide (72), bf16 and fp32."""

import torch
from gate import Variant

from mmscale.kernels.token_merge import match_options, row_options

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INDEX = {name: "*i32" for name in ("cu_seqlens", "merges", "cu_out", "ptr", "is_valid", "target", "slot", "lst")}


def index(*names):
    return {name: INDEX[name] for name in names}


def _tiles(is_single):
    """(types, constants): of a single tile Triton makes a constant."""
    return ({}, {"tiles": 1}) if is_single else ({"tiles": "i32"}, {})


def _match(width, kind, max_len, divisible, is_single=False):
    options = match_options(width, max_len, TYPES[kind])
    tile = {name: options[name] for name in ("BM", "BN", "BK")}
    count, one = _tiles(is_single)
    return Variant(
        f"token_merge match {kind} C{width} {'x'.join(map(str, tile.values()))}{' /16' if divisible else ''}{' single' if is_single else ''}",
        "token_merge.match_kernel",
        {"metric": f"*{kind}", **index("cu_seqlens", "merges", "target"), "score": "*fp32", **count},
        {"C": width, **tile, "WIDEN": False, **one},
        divisible=("tiles",) if divisible else (),
        num_warps=options["num_warps"],
        num_stages=options["num_stages"],
        tensor_cores=kind != "fp32",
    )


def _merge(width, kind, has_sizes, is_mean):
    options = row_options(width)
    name = f"token_merge {'merge' if is_mean else 'unmerge backward'} {kind} C{width}{' sizes' if has_sizes else ''}"
    types = {"x": f"*{kind}", "sizes": "*fp32", **index("ptr", "lst"), "rows": f"*{kind}", "totals": "*fp32"}
    constants = {"C": width, "BC": options["BC"], "HAS_SIZES": has_sizes, "IS_MEAN": is_mean}
    return Variant(
        name, "token_merge.merge_kernel", types, constants, num_warps=options["num_warps"], wide=width >= 256
    )


def _spread(width, kind, has_sizes, is_mean):
    options = row_options(width)
    name = f"token_merge {'merge backward' if is_mean else 'unmerge'} {kind} C{width}{' sizes' if has_sizes else ''}"
    types = {"rows": f"*{kind}", "sizes": "*fp32", "totals": "*fp32", "slot": "*i32", "x": f"*{kind}"}
    constants = {"C": width, "BC": options["BC"], "HAS_SIZES": has_sizes, "IS_MEAN": is_mean}
    return Variant(
        name, "token_merge.spread_kernel", types, constants, num_warps=options["num_warps"], wide=width >= 256
    )


def _segments(divisible):
    counts = ("num_segments", "num_in", "num_out", "max_len")
    return Variant(
        f"token_merge segments{' /16' if divisible else ''}",
        "token_merge.segments_kernel",
        {**index("cu_seqlens", "merges", "cu_out", "ptr", "is_valid"), **dict.fromkeys(counts, "i32")},
        {"BLOCK": 256},
        divisible=counts if divisible else (),
    )


def _by_tiles(name, pointers, divisible, is_single=False):
    count, one = _tiles(is_single)
    types = index(*pointers) | ({"score": "*fp32"} if name == "rank" else {}) | count
    return Variant(
        f"token_merge {name}{' /16' if divisible else ''}{' single' if is_single else ''}",
        f"token_merge.{name}_kernel",
        types,
        {"BM": 64, "BN": 32, **one},
        divisible=("tiles",) if divisible else (),
    )


VARIANTS = [
    *(_segments(divisible) for divisible in (False, True)),
    _match(1152, "bf16", 729, False),
    _match(1152, "bf16", 729, True),
    _match(1152, "bf16", 4096, False),
    _match(72, "bf16", 729, False),
    _match(72, "bf16", 4096, False),
    _match(1152, "fp32", 729, False),
    _match(72, "fp32", 729, False),
    _match(1152, "fp16", 729, False),
    _match(1152, "bf16", 16, False, is_single=True),
    _by_tiles("rank", ("cu_seqlens", "merges", "target"), False, is_single=True),
    _by_tiles("place", ("cu_seqlens", "cu_out", "target", "slot", "ptr", "lst"), False, is_single=True),
    *(_by_tiles("rank", ("cu_seqlens", "merges", "target"), divisible) for divisible in (False, True)),
    *(
        _by_tiles("place", ("cu_seqlens", "cu_out", "target", "slot", "ptr", "lst"), divisible)
        for divisible in (False, True)
    ),
    *(
        make(width, kind, *flags)
        for make in (_merge, _spread)
        for width, kind, flags in (
            *((1152, "bf16", flags) for flags in ((True, True), (False, True), (False, False))),
            (1152, "fp32", (True, True)),
            (1152, "fp16", (True, True)),
            (72, "bf16", (True, True)),
        )
    ),
]
