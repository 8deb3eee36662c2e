"""Packaging. `mmscale.kernels`, `mmscale.data_tools`, `mmscale.configs` and `mmscale.slurm` live at the top level of the repository and are
mapped here; symlinks in `mmscale/` do the same for an editable install. There is never a `kernels/__init__.py`: Hugging
Face's own package is called `kernels`, and transformers imports it when it is found.
"""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "mmscale/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

EXTRAS = {
    "deepspeed": ["deepspeed>=0.19.8", "ninja"],
    "megatron": ["megatron-core>=0.16"],
    "audio": ["torchaudio>=2.9"],
    "fast": ["simplejpeg>=1.8"],
    "parquet": ["pyarrow>=17"],
    "peft": ["peft>=0.18"],
    "remote": ["fsspec>=2025.3", "s3fs>=2025.3"],
    "demo": ["scikit-learn>=1.5", "matplotlib>=3.9"],
    "dev": [
        "pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.14", "mypy>=1.18", "scipy>=1.13",
        "types-PyYAML", "megatron-core>=0.16", "simplejpeg>=1.8", "pyarrow>=17", "fsspec>=2025.3",
        "triton>=3.6", "liger-kernel>=0.8",
    ],
    "gpu": ["triton>=3.6", "liger-kernel>=0.8"],
}  # fmt: skip

setup(
    name="mmscale",
    version=VERSION,
    description="Trains large multimodal language models from sharded WebDataset tars",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["mmscale", "mmscale.*"]), "mmscale.kernels", "mmscale.kernels.attention", "mmscale.kernels.triton_kernels", "mmscale.data_tools", "mmscale.data_tools.readers", "mmscale.data_tools.inspection", "mmscale.configs", "mmscale.slurm"],
    package_dir={
        "mmscale.kernels": "kernels/mmscale_kernels",
        "mmscale.data_tools": "data_tools/mmscale_data_tools",
        "mmscale.configs": "configs",
        "mmscale.slurm": "slurm",
    },
    package_data={"mmscale.configs": ["**/*.yaml"], "mmscale.slurm": ["*.sbatch", "site.env.example", "lib/*.sh"], "mmscale": ["py.typed"]},
    install_requires=[
        "torch>=2.11", "transformers>=5.17", "tokenizers>=0.22", "webdataset>=1.0", "zstandard>=0.23", "braceexpand>=0.1.7", "safetensors>=0.6", "numpy>=2.0",
        "pydantic>=2.11", "typer>=0.20", "PyYAML>=6.0", "rich>=13", "pillow>=11", "av>=18,<19", "soundfile>=0.13", "xxhash>=3.5", "psutil>=6",
        "tensorboard>=2.19",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["mmscale=mmscale.cli.main:main", "mmscale-data=mmscale.data_tools.cli:main"]},
)  # fmt: skip
