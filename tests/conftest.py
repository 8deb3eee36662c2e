"""Settings that every test shares: few threads, no network, seeds printed."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import secrets

import pytest


@pytest.fixture
def seed(request):
    """A fresh random seed, printed when the test fails; set MMSCALE_TEST_SEED to repeat one."""
    value = int(os.environ.get("MMSCALE_TEST_SEED") or secrets.randbelow(2**31))
    print(f"\nMMSCALE_TEST_SEED={value}")
    return value


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory):
    """The demo's data set, made small: real tars with images, audio and text, and their tokenizer."""
    from mmscale.data_tools.demo import write_demo

    folder = tmp_path_factory.mktemp("demo") / "data"
    write_demo(folder, scale=0.03)
    return folder


@pytest.fixture(autouse=True)
def _logging_as_it_was():
    """What a test sets up in mmscale's logger (a handler on a captured stream, a level) ends with it."""
    import logging

    logger = logging.getLogger("mmscale")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = before
