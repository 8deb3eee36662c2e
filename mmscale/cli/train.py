"""`mmscale train`: the stop handler first, then everything heavy."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from mmscale.config.env import agent_from_env
from mmscale.train.signals import StopFlag, tie_to_agent

if TYPE_CHECKING:
    from mmscale.config.env import Launch
    from mmscale.config.schema import Config
    from mmscale.train.job import Job


def run(config_path: str, overrides: list[str]) -> None:
    """Trains, or goes on where the run directory's newest verified checkpoint stands."""
    stop = StopFlag().install()  # before torch: an early signal must not be lost
    agent = agent_from_env()
    tie_to_agent(agent)
    from mmscale import logging
    from mmscale.config.env import job_limits_from_env, launch_from_env, set_env_default
    from mmscale.config.load import load_config
    from mmscale.train.job import Job

    # Waiting threads sleep instead of spinning: measured on 2 cores shared with one other busy process, a spinning pool makes
    # single steps up to 50 times slower, because the spinner keeps the thread it waits for off the core.
    set_env_default("OMP_WAIT_POLICY", "PASSIVE")
    launch = launch_from_env()
    logging.setup(launch.rank)
    config = load_config(config_path, overrides)
    job = Job.of(config, stop, job_limits_from_env(), agent)
    try:
        with job.attempt.recording(launch.rank):
            _train(config, launch, job)
    finally:
        gc.freeze()  # or Python walks all objects again before it ends: 1.4 to 4 s measured, 0.3 s without


def _train(config: Config, launch: Launch, job: Job) -> None:
    from mmscale import logging
    from mmscale.config.checks import check_config

    check_config(config, launch.world_size)  # refused before the seconds that torch takes to load
    gc.disable()  # 0.8 of 4.9 s of the imports went into collections that find nothing
    from mmscale.streaming.decode.dsp import check_audio_backend

    check_audio_backend()  # before transformers, which a broken torchaudio takes down
    from mmscale.cli.decide import decide_run
    from mmscale.parallel.links import check_links
    from mmscale.parallel.mesh import init_mesh
    from mmscale.train.loop import train

    gc.freeze()  # modules stay: no later collection need walk them
    gc.enable()
    config, reason = decide_run(config, launch)
    if reason:
        logging.get_logger(__name__).info("%s", reason)
    mesh = init_mesh(config.parallel, config.run.device, launch)
    try:
        check_links(mesh, config.parallel.timeout_s)
        train(config, mesh, job)
    finally:
        mesh.close()
