"""Where the time of a step goes: `run.profile` records a few steps, writes a trace and tells the shares.

Two tables, each of which adds up to the whole step. What the host does: it waits for data, runs forward, backward and update.
What kind of work it is: by operator on a CPU, by the kernels that an operator starts on a GPU, where waiting is what no kernel fills.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from mmscale.logging import get_logger
from mmscale.parallel.engines.base import Batch, Engine, StateReader, StepResult
from mmscale.parallel.layout import Chunk
from mmscale.parallel.mesh import Mesh

log = get_logger(__name__)

STEPS = 5
"""Steps that are recorded."""
_WAIT = 3
"""Steps before that: compilation, first allocations and the loader's start are no part of a steady step."""

DATA, FORWARD_BACKWARD, UPDATE = "mmscale::data", "mmscale::forward_backward", "mmscale::update"
_STEP, _BACKWARD = "ProfilerStep", "autograd::engine::evaluate_function"
_MARKS = (DATA, FORWARD_BACKWARD, UPDATE, _STEP, "autograd::", "torch::autograd::", "Optimizer.", "cuda")
"""Events that are not operators: their own time is Python's, or the autograd engine's."""

_INSIDE = (("head and loss", ("cross_entropy", "nll_loss")), ("attention", ("attention", "_Attend")))
"""Kinds that take all that is called inside them."""
_KINDS = (
    ("communication", ("nccl", "gloo", "c10d", "record_param_comms", "all_reduce", "all_gather", "reduce_scatter", "all_to_all")),
    ("matmul", ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "grouped_mm", "convolution", "conv_depthwise", "mkldnn")),
    ("head and loss", ("log_softmax",)),
    ("copies, casts, lookups", ("copy", "clone", "contiguous", "aten::cat", "stack", "index", "embed", "zero", "fill", "memcpy", "place")),
    ("views", ("transpose", "as_strided", "view", "reshape", "aten::slice", "select", "expand", "permute", "squeeze", "split", "narrow",
               "alias", "detach", "unfold", "flatten", "chunk", "empty", "aten::lift", "resolve", "result_type")),
)  # fmt: skip
"""Kind -> parts of operator names; the first that fits counts."""
ELEMENTWISE, OPTIMIZER, WAIT, REST = "norms and elementwise", "optimizer", "data wait", "Python and idle"
COMPUTE = ("matmul", "attention", "head and loss", ELEMENTWISE, "copies, casts, lookups")
"""Kinds that compute the model; the others only serve it."""


@dataclass(frozen=True, slots=True)
class Shares:
    """What the recorded steps were made of.

    steps       how many they were; `step_s`: mean seconds of one
    host        phase -> share of the step, by what the host was doing
    kinds       kind of work -> share of the step
    operators   the dearest operators: (name, calls per step, milliseconds per step)
    syncs       calls per step in which the host waits for the GPU; None on a CPU
    """

    steps: int
    step_s: float
    host: Mapping[str, float]
    kinds: Mapping[str, float]
    operators: Sequence[tuple[str, float, float]]
    syncs: float | None

    def lines(self) -> Iterator[str]:
        """The tables as text."""
        yield f"{self.steps} steps of {self.step_s * 1e3:.1f} ms"
        for title, table in (("what the host does", self.host), ("kind of work", self.kinds)):
            yield f"{title:<28} share    ms per step"
            for name, share in sorted(table.items(), key=lambda item: -item[1]):
                yield f"  {name:<26} {share:6.1%}  {share * self.step_s * 1e3:9.2f}"
        if self.syncs is not None:
            yield f"the host waits for the GPU {self.syncs:.1f} times per step"


class StepProfiler:
    """Records steps of one rank, or does nothing at all.

    It writes `trace-rank<rank>.json.gz` (for Perfetto or Chrome) on every rank, and on rank 0 `table.txt` and `shares.json`.

    Args:
        folder: where to write, made when needed; None = do nothing.
        num_steps: that the run still has; of a short run fewer steps are recorded, after fewer others.
    """

    def __init__(self, folder: Path | None, mesh: Mesh, num_steps: int) -> None:
        self._folder, self._mesh = folder, mesh
        self._profile: Any = None
        if folder is None or num_steps < 1:
            return
        active = min(STEPS, max(1, num_steps // 2))
        warm_up = min(1, num_steps - active)
        wait = min(_WAIT, num_steps - active - warm_up)
        is_cuda = mesh.device.type == "cuda"
        self._profile = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])],
            schedule=schedule(wait=wait, warmup=warm_up, active=active, repeat=1),
            on_trace_ready=self._write,
        )

    def watch(self, engine: Engine) -> Engine:
        """The engine, whose phases are recorded if anything is."""
        return engine if self._profile is None else _WatchedEngine(engine)

    def data(self) -> AbstractContextManager[object]:
        """Around the wait for data."""
        return nullcontext() if self._profile is None else record_function(DATA)

    def after_step(self) -> None:
        """At the end of each step; after the last one that is recorded it writes the files."""
        if self._profile is not None:
            self._profile.step()

    def __enter__(self) -> StepProfiler:
        if self._profile is not None:
            self._profile.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is not None:
            self._profile.stop()

    def _write(self, recorded: Any) -> None:
        assert self._folder is not None, "nothing is recorded without a folder"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(self._folder / f"trace-rank{self._mesh.rank}.json.gz"))
            if self._mesh.is_main:
                shares = shares_of(recorded.events(), self._mesh.device)
                write_shares(shares, self._folder)
                log.info("profile of %s, more in %s:", self._mesh.device, self._folder)
                for line in shares.lines():
                    log.info("%s", line)
        except OSError as error:  # a profile is not worth a run
            log.error("the profile cannot be written to %s: %s", self._folder, error)


def write_shares(shares: Shares, folder: Path) -> None:
    """Writes `table.txt`, for people, and `shares.json`, for programs."""
    dearest = [f"  {name:<60} {calls:8.1f} {ms:10.3f}" for name, calls, ms in shares.operators]
    head = f"{'operator, without what it calls':<62} {'calls':>8} {'ms':>10}  per step"
    (folder / "table.txt").write_text("\n".join([*shares.lines(), head, *dearest]) + "\n", encoding="utf-8")
    (folder / "shares.json").write_text(json.dumps(asdict(shares), indent=1) + "\n", encoding="utf-8")


def shares_of(events: Iterable[Any], device: torch.device) -> Shares:
    """The shares of recorded events (`torch.profiler.profile.events()`) of one process that computes on `device`.

    Raises ValueError when no whole step was recorded.
    """
    events = list(events)
    on_host = [e for e in events if e.device_type == DeviceType.CPU]
    steps = [e for e in on_host if e.name.startswith(_STEP)]
    if not steps:
        raise ValueError("expected a recorded step, found none")
    wall = sum(_microseconds(e) for e in steps)
    is_cuda = device.type == "cuda"
    main = {e.thread for e in steps}
    operators = [e for e in on_host if is_cuda or (e.thread in main and _is_operator(e.name))]
    operators = [e for e in operators if not e.name.startswith(_MARKS)]
    # on a GPU every kernel counts towards the time in which it is busy, a validation's too
    phases = (DATA, UPDATE) if is_cuda else (DATA, UPDATE, FORWARD_BACKWARD)
    spans = {name: _Spans(e for e in on_host if e.name == name and e.thread in main) for name in phases}
    times, by_name, calls = Counter[str](), Counter[str](), Counter[str]()
    for event in operators:
        own = event.self_device_time_total if is_cuda else event.self_cpu_time_total
        kind = _kind(event, spans)
        if kind not in (WAIT, REST):
            times[kind] += own
            by_name[event.name] += own
            calls[event.name] += 1
    busy = _busy(events) if is_cuda else sum(times.values())
    scale = busy / max(sum(times.values()), 1e-9)  # kernels of several streams run at the same time
    kinds = {kind: own * scale / wall for kind, own in times.items()}
    if not is_cuda:
        kinds[WAIT] = spans[DATA].total / wall
    kinds[REST] = max(0.0, 1 - sum(kinds.values()))
    n = len(steps)
    dearest = tuple((name, calls[name] / n, own / 1e3 / n) for name, own in by_name.most_common(20))
    syncs = sum(e.name.startswith("cuda") and "Synchronize" in e.name for e in on_host) / n if is_cuda else None
    return Shares(n, wall / 1e6 / n, _host(on_host, wall, main), kinds, dearest, syncs)


def _host(on_host: Sequence[Any], wall: float, main: set[Any]) -> dict[str, float]:
    """Shares of the phases; on a GPU forward and backward are the launches, and the wait for the end counts as forward."""
    own = [e for e in on_host if e.thread in main]
    both, data, update = (_Spans(e for e in own if e.name == name) for name in (FORWARD_BACKWARD, DATA, UPDATE))
    backward = _Spans(e for e in on_host if e.name.startswith(_BACKWARD) and both.holds(e)).total
    phases = {WAIT: data.total, "forward": both.total - backward, "backward": backward, "update": update.total}
    shares = {name: time / wall for name, time in phases.items()}
    return {**shares, "rest of the loop": max(0.0, 1 - sum(shares.values()))}


def _is_operator(name: str) -> bool:
    """Whether it is an operator or a collective, and no node of the autograd graph, whose own time is no computing."""
    return "::" in name or name.startswith(("nccl", "gloo"))


def _kind(event: Any, spans: Mapping[str, _Spans]) -> str:
    """The kind of work of an operator's own time."""
    if spans[DATA].holds(event):
        return WAIT
    if spans[UPDATE].holds(event):
        return OPTIMIZER
    if FORWARD_BACKWARD in spans and not spans[FORWARD_BACKWARD].holds(event):
        return REST
    above = event
    while above is not None:
        for kind, parts in _INSIDE:
            if any(part in above.name for part in parts):
                return kind
        above = above.cpu_parent
    return next((kind for kind, parts in _KINDS if any(part in event.name for part in parts)), ELEMENTWISE)


def _busy(events: Iterable[Any]) -> float:
    """Microseconds in which at least one kernel or copy ran on the GPU."""
    return _Spans(e for e in events if e.device_type != DeviceType.CPU and not e.is_user_annotation).total


def _microseconds(event: Any) -> float:
    return float(event.time_range.end - event.time_range.start)


class _Spans:
    """The time that some events cover, overlaps once."""

    def __init__(self, events: Iterable[Any]) -> None:
        self._starts: list[float] = []
        self._ends: list[float] = []
        for start, end in sorted((e.time_range.start, e.time_range.end) for e in events):
            if self._ends and start <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end)
            else:
                self._starts.append(start)
                self._ends.append(end)

    @property
    def total(self) -> float:
        """Microseconds."""
        return float(sum(self._ends) - sum(self._starts))

    def holds(self, event: Any) -> bool:
        """Whether the event begins in one of them."""
        at = bisect_right(self._starts, event.time_range.start) - 1
        return at >= 0 and event.time_range.start < self._ends[at]


class _WatchedEngine:
    """An engine whose two phases are events of the profiler."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def forward_backward(self, micro_batches: Sequence[Batch], num_targets: int) -> float:
        with record_function(FORWARD_BACKWARD):
            return self._engine.forward_backward(micro_batches, num_targets)

    def step(self, lrs: Sequence[float]) -> StepResult:
        with record_function(UPDATE):
            return self._engine.step(lrs)

    def evaluate(self, batch: Batch) -> float:
        return self._engine.evaluate(batch)

    @property
    def state_names(self) -> frozenset[str]:
        return self._engine.state_names

    def state_views(self) -> Iterator[tuple[str, Chunk]]:
        return self._engine.state_views()

    def load_state(self, reader: StateReader) -> None:
        self._engine.load_state(reader)

    def close(self) -> None:
        self._engine.close()
