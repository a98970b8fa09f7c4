"""Metadata and dependencies; the settings of the tools are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION: dict[str, str] = {}
exec((HERE / "pma_megatron" / "version.py").read_text(), VERSION)

MEGATRON = ["megatron-core>=0.12"]
DEEPSPEED = ["deepspeed>=0.14"]
PLOTS = ["matplotlib>=3.7"]
TENSORBOARD = ["tensorboard>=2.12"]
DOCS = [
    "mkdocs>=1.6,<2",  # pages generated while it builds; 2 has no plugins
    "mkdocs-material>=9.7,<10",
    "mkdocstrings[python]>=1.0",
    "ruff>=0.6",  # formats the signatures
]
TEST = [
    *MEGATRON,
    *DEEPSPEED,
    *PLOTS,
    *TENSORBOARD,
    *DOCS,
    "build>=1.2",
    "coverage>=7.10",  # the first that follows subprocesses by itself
    "hypothesis>=6.100",
    "mypy>=1.10",
    "pytest>=8",
    "pytest-cov>=7",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.6",
    "setuptools>=68",  # builds without isolation
    "twine>=6",
    "wheel",
    # resumes of merges by other trainers that drive DeepSpeed
    "accelerate>=1.0",
    "transformers>=4.45",
    # megatron-core imports these without asking for them in every release
    "packaging",
    "pyyaml",
    "six",  # of Megatron-LM's tokenizers
    "typing_extensions",
]

setup(
    name="pma-megatron",
    version=VERSION["__version__"],
    description="Average sharded Megatron pre-training checkpoints into one that resumes (PMA)",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["pma_megatron", "pma_megatron.*"]),
    package_data={"pma_megatron": ["py.typed"]},
    install_requires=[
        "isal>=1.8",  # crc32 at memory speed, crc32_combine
        "numpy>=1.24",
        "rich>=13",
        "safetensors>=0.4.3",  # opens every exported file before it is published
        "torch>=2.4",  # trainers of today ask for more themselves: megatron-core 0.16 for 2.6
    ],
    extras_require={
        "megatron": MEGATRON,
        "deepspeed": DEEPSPEED,
        "plots": PLOTS,
        "tensorboard": TENSORBOARD,
        "docs": DOCS,
        "test": TEST,
    },
    entry_points={"console_scripts": ["pma = pma_megatron.cli:main"]},
    keywords=[
        "averaging",
        "checkpoint",
        "deepspeed",
        "megatron",
        "model merging",
        "pma",
        "pre-training",
    ],
    project_urls={"Paper": "https://arxiv.org/abs/2505.12082"},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
