"""`mmscale train`: the stop handler first, then everything heavy."""

from __future__ import annotations

from mmscale.train.signals import StopFlag


def run(config_path: str, overrides: list[str]) -> None:
    """Trains, or goes on where the run directory's newest verified checkpoint stands."""
    stop = StopFlag().install()  # before torch: an early signal must not be lost
    from mmscale import logging
    from mmscale.config.checks import check_config
    from mmscale.config.env import launch_from_env, set_env_default
    from mmscale.config.load import load_config

    # Waiting threads sleep instead of spinning: measured on 2 cores shared with one other busy process, a spinning pool makes
    # single steps up to 50 times slower, because the spinner keeps the thread it waits for off the core.
    set_env_default("OMP_WAIT_POLICY", "PASSIVE")
    launch = launch_from_env()
    logging.setup(launch.rank)
    config = load_config(config_path, overrides)
    check_config(config, launch.world_size)  # refused before the seconds that torch takes to load
    from mmscale.streaming.decode.dsp import check_audio_backend

    check_audio_backend()  # before transformers, which a broken torchaudio takes down
    from mmscale.cli.decide import decide_run
    from mmscale.parallel.mesh import init_mesh
    from mmscale.train.loop import train

    config, reason = decide_run(config, launch)
    if reason:
        logging.get_logger(__name__).info("%s", reason)
    mesh = init_mesh(config.parallel, config.run.device, launch)
    try:
        train(config, mesh, stop)
    finally:
        mesh.close()
