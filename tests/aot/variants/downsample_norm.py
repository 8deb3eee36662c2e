"""What `downsample_norm` launches: SigLIP's 27 x 27 patches of 1,152 channels, even grids, a narrow tower, each type."""

from __future__ import annotations

from gate import Variant

from mmscale.kernels.downsample_norm import SUM_COLUMNS, SUM_ROWS, num_warps

POINTERS = {
    "forward": ("x_ptr", "weight_ptr", "bias_ptr", "y_ptr", "mean_ptr", "rstd_ptr"),
    "backward": ("dy_ptr", "x_ptr", "weight_ptr", "mean_ptr", "rstd_ptr", "dx_ptr"),
    "backward_with_sums": (
        *("dy_ptr", "x_ptr", "weight_ptr", "mean_ptr", "rstd_ptr", "dx_ptr"),
        *("dweight_ptr", "dbias_ptr"),
    ),
    "parameter_gradients": ("dy_ptr", "x_ptr", "mean_ptr", "rstd_ptr", "dweight_ptr", "dbias_ptr"),
}
FP32 = ("mean_ptr", "rstd_ptr", "dweight_ptr", "dbias_ptr")


def _variant(
    function: str, c: int, stride: int, dtype: str, divisible: bool, per_token: bool = False, must_fail: bool = False,
    is_single: bool = False,
) -> Variant:  # fmt: skip
    """A launch of `function`; `divisible` is about the runtime integers (grid and rows), not about constants.

    `is_single`: one patch comes out, and Triton makes constants of integers that are 1.
    """
    d = c if per_token else stride * stride * c
    sizes = ["h", "w", "out_h", "out_w", "x_rows"] + ["rows"] * ("dweight_ptr" in POINTERS[function])
    types = {name: "*fp32" if name in FP32 else f"*{dtype}" for name in POINTERS[function]} | dict.fromkeys(
        sizes, "i32"
    )
    if function == "forward":
        types["eps"] = "fp32"
    constants: dict[str, int] = {"C": c, "S": stride, "D": d, "X_STRIDE": c, "PER_TOKEN": per_token}
    by_columns = function == "parameter_gradients"
    constants |= {"ROWS": SUM_ROWS, "COLUMNS": SUM_COLUMNS} if by_columns else {"BLOCK": 1 << (d - 1).bit_length()}
    if is_single:
        ones = [name for name in ("out_h", "out_w", "rows") if name in sizes]
        constants |= dict.fromkeys(ones, 1)
        sizes = [name for name in sizes if name not in ones]
        types = {name: kind for name, kind in types.items() if name not in ones}
    of = " token" * per_token + " odd" * (not divisible) + " single" * is_single
    return Variant(
        name=f"downsample_norm.{function} {dtype} C{c} S{stride}{of}",
        kernel=f"downsample_norm.{function}",
        types=types,
        constants=constants,
        divisible=tuple(sizes) if divisible else (),
        num_warps=4 if by_columns else num_warps(d),
        wide=not by_columns,  # which stores little
        must_fail=must_fail,
    )


VARIANTS = [
    # channels, stride, type, integers divisible by 16
    _variant("forward", 1152, 2, "bf16", False),
    _variant("forward", 1152, 2, "bf16", True),
    _variant("forward", 1152, 2, "fp32", False),
    _variant("forward", 1152, 3, "bf16", False),
    _variant("forward", 72, 2, "bf16", False),
    _variant("forward", 1280, 2, "bf16", False, per_token=True),
    _variant("forward", 1152, 2, "fp16", False),
    _variant("forward", 1152, 2, "bf16", False, is_single=True),
    _variant("backward", 1152, 2, "bf16", False),
    _variant("backward", 1152, 3, "bf16", False),
    _variant("backward", 1152, 3, "fp32", True),
    _variant("backward", 1152, 3, "fp32", False),
    _variant("backward", 3072, 2, "fp32", False),
    _variant("backward", 4096, 2, "bf16", False),
    _variant("backward", 1152, 2, "fp16", False),
    _variant("backward_with_sums", 1152, 2, "bf16", False),
    _variant("backward_with_sums", 1152, 2, "bf16", True),
    _variant("backward_with_sums", 1152, 2, "fp32", False),
    _variant("backward_with_sums", 72, 2, "bf16", False),
    _variant("backward_with_sums", 1280, 2, "bf16", False, per_token=True),
    _variant("backward_with_sums", 1152, 2, "fp16", False),
    _variant("backward_with_sums", 1152, 2, "bf16", False, is_single=True),
    _variant("parameter_gradients", 1152, 2, "bf16", False),
    _variant("parameter_gradients", 1152, 3, "bf16", True),
    _variant("parameter_gradients", 1152, 3, "fp32", False),
    _variant("parameter_gradients", 1280, 2, "bf16", False, per_token=True),
    # the control of the gate itself: 10,368 sums for weight and bias each do not fit in the registers
    _variant("backward_with_sums", 1152, 3, "bf16", False, must_fail=True),
]
