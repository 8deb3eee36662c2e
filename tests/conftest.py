"""Settings that every test shares: few threads, no network, seeds printed."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
if not os.path.exists("/dev/nvidiactl"):
    os.environ["TRITON_INTERPRET"] = "1"  # before triton defines a kernel

import contextlib
import secrets
import shutil
import subprocess

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


class Disk:
    """A real file system of 24 MB."""

    def __init__(self, path):
        self.path = path

    def fill(self, leave=0):
        size = shutil.disk_usage(self.path).free - leave
        # a write that is cut short or refused was the last: somebody else writes here, too
        with contextlib.suppress(OSError), (self.path / "filler").open("wb", buffering=0) as file:
            while size > 0:
                size -= file.write(bytes(min(size, 1 << 20)))

    def empty(self):
        (self.path / "filler").unlink()

    def remount(self, mode):
        subprocess.run(["mount", "-o", f"remount,{mode}", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path):
    """A small file system that can be filled and made read-only; skipped where none can be mounted."""
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield Disk(path)
    subprocess.run(["umount", "-l", str(path)], check=True)
