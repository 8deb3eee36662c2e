"""Placement: widths of language models in both types, media in another type than the text, and a width that is no power of two."""

from gate import Variant

from mmscale.kernels.placement import block_columns, num_warps

_BF16, _FP32 = "*bf16", "*fp32"


def _variants(width, text, media, is_lookup, divisible, integers="*i64", is_single=False):
    sizes = {"WIDTH": width, "BLOCK": block_columns(width)}
    counted = ("num_tokens",) if divisible else ()
    ids = {"ids": integers} if is_lookup else {}
    absent = {} if is_lookup else {"ids": None}
    count = {} if is_single else {"num_tokens": "i32"}  # of a single token Triton makes a constant
    ones = {"num_tokens": 1} if is_single else {}
    # one warp reads a shorter row with accesses of 8 bytes or less
    is_wide = sizes["BLOCK"] * (2 if _BF16 in (text, media) else 4) >= 32 * 16
    name = (
        f"placement-{width}-{text[1:]}-{media[1:]}-{'lookup' if is_lookup else 'rows'}-{'16' if divisible else 'any'}"
        f"{integers[1:] if integers != '*i64' else ''}{'-single' if is_single else ''}"
    )
    yield Variant(
        f"{name}-forward",
        "placement.place_rows",
        {"text": text, **ids, "media": media, "source": integers, "out": text, **count},
        {**sizes, **absent, **ones},
        counted,
        num_warps(sizes["BLOCK"]),
        wide=is_wide,
    )
    if is_lookup:  # the gradient of media is the same after both
        yield Variant(
            f"{name}-media",
            "placement.gather_rows",
            {"grad": text, "positions": "*i32", "out": media},
            sizes,
            (),
            num_warps(sizes["BLOCK"]),
            wide=is_wide,
        )
    else:
        yield Variant(
            f"{name}-text",
            "placement.keep_text_rows",
            {"grad": text, "source": integers, "out": text, **count},
            {**sizes, **ones},
            counted,
            num_warps(sizes["BLOCK"]),
            wide=is_wide,
        )


_FP16 = "*fp16"
# width, text, media, lookup, is the number of tokens a multiple of 16
_CASES = [
    (4096, _BF16, _BF16, True, True),
    (4096, _BF16, _BF16, False, False),
    (4096, _FP32, _BF16, True, False),
    (3584, _FP32, _FP32, False, True),
    (72, _BF16, _BF16, True, False),
    (72, _FP32, _FP32, False, True),
    (4096, _FP16, _FP16, True, False, "*i32"),
    (4096, _BF16, _BF16, True, False, "*i64", True),
    (4096, _BF16, _BF16, False, False, "*i32", True),
]
VARIANTS = [variant for case in _CASES for variant in _variants(*case)]
