"""`mmscale replay`: one step of a run done again and compared with what was recorded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mmscale import logging
from mmscale.config.env import launch_from_env, set_env_default
from mmscale.streaming.decode.dsp import check_audio_backend
from mmscale.train.replay import Replayed, replay, replay_config


def run(folder: str, step: int) -> None:
    """Replays and prints the step, one line per fact and one per pack."""
    set_env_default("OMP_WAIT_POLICY", "PASSIVE")  # as in training
    launch = launch_from_env()
    logging.setup(launch.rank)
    config = replay_config(Path(folder), launch)
    check_audio_backend()
    from mmscale.parallel.mesh import init_mesh

    mesh = init_mesh(config.parallel, config.run.device, launch)
    try:
        replayed = replay(config, mesh, step)
    finally:
        mesh.close()
    if mesh.is_main:
        print("\n".join(report(replayed)))


def report(replayed: Replayed) -> list[str]:
    """What a person reads, line by line."""
    source = f"the checkpoint of step {replayed.base}" if replayed.base else "the beginning"
    num_ids = sum(len(pack.ids) for pack in replayed.packs)
    lines = [
        f"step {replayed.step}: weights from {source}; steps done again: {replayed.step - 1 - replayed.base}",
        f"ids        {num_ids} samples in {len(replayed.packs)} packs, equal to the ledger",
    ]
    if replayed.reason is not None:
        lines.append(f"passed over by the run: {replayed.reason}")
    lines += [
        _compared("loss", replayed.loss, _number(replayed.recorded["loss_hex"])),
        _compared("grad_norm", replayed.grad_norm, _recorded_norm(replayed.recorded)),
    ]
    for number, pack in enumerate(replayed.packs):
        loss = "none" if pack.loss is None else f"{pack.loss:.6g}"
        mark = "" if pack.loss is None or math.isfinite(pack.loss) else " NOT FINITE"
        lines.append(f"pack {number}: targets {pack.targets}, loss {loss}{mark}, ids {' '.join(pack.ids)}")
    return lines


def _number(text: str | None) -> float | None:
    return None if text is None else float.fromhex(text)


def _recorded_norm(recorded: dict[str, Any]) -> float | None:
    """The gradient norm on record, which stands there as null when it was not finite."""
    if recorded["loss_hex"] is None:
        return None
    return math.nan if recorded["grad_norm"] is None else float(recorded["grad_norm"])


def _compared(name: str, now: float, recorded: float | None) -> str:
    """One number now and then."""
    text = f"{name:<10} now {now:.9g} {now.hex()}"
    if recorded is None:
        return f"{text}, recorded none"
    return f"{text}, recorded {recorded:.9g} {recorded.hex()}: {_verdict(now, recorded)}"


def _verdict(now: float, recorded: float) -> str:
    if now == recorded:
        return "equal"
    if not (math.isfinite(now) and math.isfinite(recorded)):
        return "not finite then and now" if math.isfinite(now) == math.isfinite(recorded) else "DIFFERENT"
    return f"relative difference {abs(now - recorded) / max(abs(recorded), abs(now)):.1e}"
