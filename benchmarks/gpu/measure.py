"""How a kernel is measured on a GPU: device time with cold caches, peak memory, no waiting for the device, float64 checks.

A call's device time is taken between two events that are queued while the device is held busy: what the host needs for
launching is hidden, as it is in a training step whose host runs ahead, and stated apart. A call that waits for the device
shows that wait. Before each call 256 MB are read, so that no input is in the L2 cache and nothing waits there to be written.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.gpu.report import Claim, Entry, Report, Timing

Run = Callable[[], object]
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
"""Largest relative error against float64."""
COPY, MATMUL = "copy TB/s", "matmul TFLOP/s"
"""Texts of the figures of the group `ceilings`."""
_FLUSH_BYTES = 256 << 20
_CYCLES_PER_MS = 2_000_000
"""Of the device's clock, about: at 1.98 GHz on an H100 or H200."""
_MAX_HOLD_MS = 50.0


@dataclass(frozen=True)
class Bench:
    """What a group of benchmarks measures with.

    dry      tiny shapes on the CPU and no meaningful times: every line runs, nothing is measured
    rep_ms   about how long each of the two rounds of one implementation takes
    known    what earlier groups of this run have found
    """

    device: torch.device
    dtype: torch.dtype
    report: Report
    dry: bool = False
    rep_ms: float = 250.0
    known: Sequence[Entry] = ()
    _buffers: dict[str, Tensor] = field(default_factory=dict)

    def randn(self, *shape: int, scale: float = 1.0, grad: bool = False) -> Tensor:
        """Fresh normal numbers in the benchmark's type."""
        values = torch.randn(*shape, device=self.device, dtype=self.dtype).mul_(scale)
        return values.requires_grad_(grad)

    def figure(self, group: str, start: str, end: str = "") -> float:
        """The value of the first figure of an earlier group whose text starts and ends so; NaN when there is none."""
        claims = [e for e in self.known if isinstance(e, Claim) and e.group == group]
        return next((c.value for c in claims if c.text.startswith(start) and c.text.endswith(end)), math.nan)

    @property
    def copy_bytes_per_s(self) -> float:
        """Bytes read and written per second that this device was measured to reach; NaN = not measured."""
        return self.figure("ceilings", COPY) * 1e12

    @property
    def matmul_flops_per_s(self) -> float:
        """Operations per second in bf16 that this device was measured to reach; NaN = not measured."""
        return self.figure("ceilings", MATMUL) * 1e12

    def compiled(self, function: Callable[..., object]) -> Callable[..., object]:
        """The function through torch.compile with static shapes, as if it were compiled for the first time in this process."""
        torch._dynamo.reset()

        def plain(*args: Tensor) -> object:  # what is compiled is a function, whatever kind of callable was given
            return function(*args)

        return torch.compile(plain, dynamic=False, backend="eager" if self.dry else "inductor")

    def case(
        self,
        name: str,
        runs: Mapping[str, Run],
        floor_bytes: float = 0.0,
        floor_flops: float = 0.0,
        prepare: Run = lambda: None,
    ) -> dict[str, Timing]:
        """Times every implementation of a case; one that fails is reported, the others still run.

        Args:
            runs: implementation -> the call; it gives its outputs back, so that they count as memory.
            floor_bytes: that any implementation reads and writes; `floor_flops`: of its products of matrices.
            prepare: called before each call and not timed, such as to write inputs again that a call overwrites.
        """
        floors = (floor_bytes / self.copy_bytes_per_s, floor_flops / self.matmul_flops_per_s)
        floor_s = max((s for s in floors if not math.isnan(s)), default=0.0)
        found = {}
        for impl, run in runs.items():
            try:
                found[impl] = self._timing(name, impl, run, floor_s, prepare)
            except torch.OutOfMemoryError:
                nothing = dict.fromkeys(("ms", "spread", "host_ms", "peak_mb", "extra_mb", "floor_share"), math.nan)
                found[impl] = self.report.timing(name, impl, **nothing)
            except Exception as error:  # a peer that cannot run here must not hide the others
                self.report.failure(f"{name}, {impl}: {brief(error)}")
        return found

    def _timing(self, name: str, impl: str, run: Run, floor_s: float, prepare: Run) -> Timing:
        prepare()
        run()  # compiles, loads libraries
        prepare()
        peak_mb, extra_mb = self.memory(run)
        medians, host_ms = [], math.nan
        for _ in range(2):
            ms, host_ms = self.time(run, prepare)
            medians.append(ms)
        best, worst = min(medians), max(medians)
        share = floor_s * 1e3 / best if floor_s > 0 else 0.0
        return self.report.timing(
            name,
            impl,
            ms=best,
            spread=worst / best - 1,
            host_ms=host_ms,
            peak_mb=peak_mb,
            extra_mb=extra_mb,
            floor_share=share,
        )

    def time(self, run: Run, prepare: Run = lambda: None) -> tuple[float, float]:
        """Median milliseconds of a call on the device and on the host."""
        prepare()
        if self.device.type != "cuda":
            started = time.perf_counter()
            run()
            ms = (time.perf_counter() - started) * 1e3
            return ms, ms
        started = time.perf_counter()
        run()
        host_ms = (time.perf_counter() - started) * 1e3
        torch.cuda.synchronize()
        whole_ms = (time.perf_counter() - started) * 1e3
        hold_ms = min(1.5 * host_ms + 0.2, _MAX_HOLD_MS)
        num_calls = int(min(max(self.rep_ms / (whole_ms + hold_ms), 5), 100))
        pairs = [self._timed(run, prepare, hold_ms) for _ in range(num_calls)]
        return statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs)

    def _timed(self, run: Run, prepare: Run, hold_ms: float) -> tuple[float, float]:
        prepare()
        if "flush" not in self._buffers:
            self._buffers["flush"] = torch.zeros(_FLUSH_BYTES // 4, device=self.device)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._buffers["flush"].sum()
        torch.cuda._sleep(int(hold_ms * _CYCLES_PER_MS))
        start.record()
        started = time.perf_counter()
        run()
        host_ms = (time.perf_counter() - started) * 1e3
        end.record()
        end.synchronize()
        return start.elapsed_time(end), host_ms

    def memory(self, run: Run) -> tuple[float, float]:
        """Megabytes in use at the peak of a call beyond those before it, and beyond those of its result."""
        if self.device.type != "cuda":
            run()
            return 0.0, 0.0
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        torch.cuda.synchronize()
        peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        del result
        return (peak - before) / 1e6, (peak - after) / 1e6

    def require_close(
        self, name: str, got: Sequence[Tensor], want: Sequence[Tensor], limit: float | None = None
    ) -> None:
        """Raises AssertionError unless each tensor is within the limit of its type of the float64 one."""
        bound = LIMITS[self.dtype] if limit is None else limit
        errors = [relative(a, b) for a, b in zip(got, want, strict=True)]
        assert all(error <= bound for error in errors), (
            f"{name}: relative errors {errors} against float64, at most {bound} expected"
        )

    def require_no_sync(self, run: Run) -> None:
        """Raises RuntimeError when a call waits for the device, also in its backward pass."""
        run()  # compilation may wait
        if self.device.type != "cuda":
            return
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def claim_ratio(
        self, text: str, times: Mapping[str, Timing], peer: str, target: str = "", ours: str = "ours"
    ) -> None:
        """The peer's time over ours; nothing when one of the two failed and is reported as such."""
        if peer in times and ours in times:
            self.report.claim(f"{text}/{peer}", times[peer].ms / times[ours].ms, "x", target)


def backward(forward: Callable[[], Tensor], inputs: Sequence[Tensor], upstream: Tensor) -> Run:
    """Forward and backward as one call that gives the gradients of `inputs` and adds none up."""
    return lambda: torch.autograd.grad(forward(), inputs, upstream)


def relative(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||; NaN where one of them holds a NaN; shapes must agree."""
    assert got.shape == want.shape, f"shapes {tuple(got.shape)} and {tuple(want.shape)}"
    if want.numel() == 0:
        return 0.0
    with torch.no_grad():
        return ((got.double() - want.double()).norm() / want.double().norm()).item()


def brief(error: BaseException) -> str:
    """Type and first line of an error."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]
