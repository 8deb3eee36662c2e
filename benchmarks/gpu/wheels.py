"""Packages for a GPU machine without a network: `download` fetches wheels here, `install` puts the missing ones into a folder there.

    python -m benchmarks.gpu.wheels download            into `wheels/`, for Python 3.12 on x86-64 Linux
    python -m benchmarks.gpu.wheels install build/site  what that machine has is left alone

PyTorch, Triton, transformers and what comes with them are expected there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[2]
WHEELS = REPO / "wheels"
PACKAGES = (
    *("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions", "PyYAML"),
    *("webdataset", "braceexpand", "zstandard", "xxhash", "psutil", "liger-kernel"),
    *("pytest", "pytest-timeout", "pluggy", "iniconfig", "hypothesis", "sortedcontainers"),
)
"""What the GPU tests and benchmarks import beside PyTorch's and transformers' own requirements. Nothing that reads media files:
they invent their pixels."""
LIMIT_BYTES = 55 << 20
PYTHON = "3.12"
_PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")


def download(folder: Path) -> None:
    """Fetches one wheel of each package, in the versions of `constraints-cpu.txt` where it names them.

    Raises:
        SystemExit: pip fails, or the wheels are larger than `LIMIT_BYTES`.
    """
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
    ]
    command += ["--python-version", PYTHON, "--implementation", "cp", *(f"--platform={p}_x86_64" for p in _PLATFORMS)]
    subprocess.run([*command, *pinned(PACKAGES)], check=True)
    size = sum(path.stat().st_size for path in folder.glob("*.whl"))
    print(f"{len(list(folder.glob('*.whl')))} wheels, {size / 2**20:.1f} MiB in {folder}")
    if size > LIMIT_BYTES:
        raise SystemExit(f"at most {LIMIT_BYTES >> 20} MiB are expected, so that they travel with the repository")


def pinned(packages: tuple[str, ...]) -> list[str]:
    """The packages as requirements. One that belongs to a certain version of another is pinned by what is installed here."""
    lines = (REPO / "constraints-cpu.txt").read_text().splitlines()
    versions = {_normal(name): version for name, _, version in (line.partition("==") for line in lines) if version}
    for name in packages:
        try:
            versions.setdefault(_normal(name), importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
    return [f"{name}=={versions[_normal(name)].split()[0]}" if _normal(name) in versions else name for name in packages]


def missing(folder: Path) -> list[Path]:
    """The wheels whose packages this Python does not have."""
    have = {_normal(dist.metadata["Name"]) for dist in importlib.metadata.distributions() if dist.metadata["Name"]}
    return [path for path in sorted(folder.glob("*.whl")) if _normal(path.name.partition("-")[0]) not in have]


def install(folder: Path, target: Path) -> None:
    """Installs the missing ones into `target`, which belongs onto PYTHONPATH. Without wheels nothing happens."""
    wheels = missing(folder)
    if wheels:
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            "--no-compile",
            "--upgrade",
        ]
        subprocess.run([*command, "--target", str(target), *map(str, wheels)], check=True)
    print(
        f"installed into {target}: {', '.join(path.name.partition('-')[0] for path in wheels) or 'nothing was missing'}"
    )


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    """See the head of the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.wheels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("download")
    commands.add_parser("install").add_argument("target", type=Path)
    args = parser.parse_args()
    if args.command == "download":
        download(WHEELS)
    else:
        install(WHEELS, args.target)


if __name__ == "__main__":
    main()
