"""Package definition. Tool settings (ruff, mypy, pytest) are in pyproject.toml."""

from setuptools import find_namespace_packages, setup

EVALUATION = ["lm-eval==0.4.13", "accelerate>=1.10"]

setup(
    name="occult_train",
    version="0.1.0",
    description="DeepSpeed trainer for mixture-of-experts GPTs: one copy of a token per device, not per expert",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_namespace_packages(include=["occult_train", "occult_train.*"]),
    install_requires=[
        "deepspeed==0.19.8",
        "torch>=2.11,<2.14",
        "triton>=3.6,<3.10",
        "transformers>=5.17,<6",
        "omegaconf>=2.4",
        "sentencepiece>=0.2",
        "tokenizers>=0.21",
        "safetensors>=0.5",
        "tensorboard>=2.18",
        "mpi4py>=4",
        "matplotlib>=3.9",
        "mtkahypar==1.7.post1",
        "numpy>=1.26",
        "psutil",
        "pyyaml>=6",
        "rich>=13",
        "typer>=0.15",
        "ninja",
    ],
    extras_require={
        "eval": EVALUATION,
        "dev": [*EVALUATION, "pytest>=8", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff", "mypy", "mpich"],
    },
    entry_points={"console_scripts": ["occult=occult_train.launcher.cli:main"]},
)
