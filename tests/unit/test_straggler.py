"""Which ranks are called slow."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mmscale.config.schema import WatchConfig
from mmscale.parallel.mesh import Mesh
from mmscale.train import straggler
from mmscale.train.straggler import Look, Slow, StragglerReport, probe_s, slow_ranks


def looks(probes: list[float], waits: list[float], step_s: float = 1.0) -> list[Look]:
    return [Look(rank, f"n{rank}", p, w, step_s) for rank, (p, w) in enumerate(zip(probes, waits, strict=True))]


@pytest.mark.parametrize(
    ("probes", "waits", "expected"),
    [
        ([1e-3] * 4, [0.0] * 4, []),
        ([1e-3, 1e-3, 1.25e-3, 1e-3], [0.0] * 4, []),
        ([1e-3, 1e-3, 2e-3, 1e-3], [0.0] * 4, [Slow(2, "n2", "compute", 2.0)]),
        ([1e-3, 2e-3], [0.0] * 2, [Slow(1, "n1", "compute", 2.0)]),
        ([1e-3] * 4, [0.1, 0.1, 0.1, 0.4], [Slow(3, "n3", "data", 4.0)]),
        ([1e-3] * 4, [0.001, 0.001, 0.001, 0.04], []),  # 40 times the others, and 4 % of a step
        ([1e-3] * 4, [0.5] * 4, []),  # all wait alike: the metrics show it
    ],
)
def test_a_rank_is_slow_against_the_median(probes, waits, expected) -> None:
    found = slow_ranks(looks(probes, waits), 1.3)
    assert [(s.rank, s.host, s.kind, pytest.approx(s.ratio)) for s in expected] == [
        (s.rank, s.host, s.kind, s.ratio) for s in found
    ]


def test_only_two_looks_in_a_row_name_a_rank(monkeypatch) -> None:
    """The gather is the test's: what two ranks would send."""
    events = []
    reporter = SimpleNamespace(event=lambda name, step, **details: events.append((name, step, details)))
    mesh = Mesh(0, 2, 0, 2, torch.device("cpu"))
    report = StragglerReport(mesh, WatchConfig(straggler_every=2), reporter)  # type: ignore[arg-type]
    of_rank_1 = iter([5.0, 1.0, 5.0, 5.0, 5.0])
    num_gathers = []

    def gather(_mesh: Mesh, own: Look) -> list[Look]:
        num_gathers.append(own)
        return looks([1e-3, next(of_rank_1) * 1e-3], [0.0, 0.0])

    monkeypatch.setattr(straggler, "gather_objects", gather)
    for step in range(1, 11):
        report.after_step(step, 0.1 * step, 1.0)
    assert [(name, step) for name, step, _ in events] == [("straggler", 8), ("straggler", 10)]
    assert events[0][2] == {"rank": 1, "host": "n1", "kind": "compute", "ratio": 5.0}
    assert [look.wait_s for look in num_gathers] == pytest.approx([0.15, 0.35, 0.55, 0.75, 0.95])


def test_off_and_alone_there_is_nothing_to_look_at(monkeypatch) -> None:
    monkeypatch.setattr(straggler, "gather_objects", lambda *_: pytest.fail("no look was due"))
    for world_size, every in ((1, 1), (2, 0)):
        mesh = Mesh(0, world_size, 0, world_size, torch.device("cpu"))
        StragglerReport(mesh, WatchConfig(straggler_every=every), None).after_step(1, 0.0, 1.0)  # type: ignore[arg-type]


def test_a_probe_is_short() -> None:
    """10 ms at most; the best of some, as the machine has other work."""
    times = [probe_s(torch.device("cpu")) for _ in range(5)]
    print(f"a probe takes {min(times) * 1e3:.2f} ms")
    assert 0 < min(times) < 10e-3


def test_the_probe_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    probe_s(torch.device("cpu"))
    assert torch.equal(before, torch.get_rng_state())
