"""Metadata and dependencies; the settings of the tools are in pyproject.toml."""

import os
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup

HERE = Path(__file__).parent
VERSION: dict[str, str] = {}
exec((HERE / "pma_megatron" / "version.py").read_text(), VERSION)

MEGATRON = ["megatron-core>=0.12"]
DEEPSPEED = ["deepspeed>=0.14"]
PLOTS = ["matplotlib>=3.7", "jinja2>=3"]  # jinja2: the page of `pma report`
TENSORBOARD = ["tensorboard>=2.12"]
WANDB = ["wandb>=0.16"]
MLFLOW = ["mlflow-skinny>=2.9"]  # the client alone; a whole mlflow that is there does as well
YAML = ["pyyaml>=6"]  # files for `--from`; JSON needs nothing
COMPLETION = ["shtab>=1.9"]  # the first that speaks fish
STORES = ["obstore>=0.7"]  # s3://, gs://, az://
MSC = ["multi-storage-client>=1.3.1"]  # msc://, profiles of its own configuration
TRANSFORMERS = ["transformers>=4.45"]  # opens and scores what `pma export` wrote
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
    *WANDB,
    *MLFLOW,
    *COMPLETION,
    *YAML,
    *STORES,
    *MSC,
    *DOCS,
    "moto[s3,server]>=5.1",  # a real S3 server on loopback, and boto3, which looks into it
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
    *TRANSFORMERS,
    # megatron-core imports these without asking for them in every release
    "packaging",
    "six",  # of Megatron-LM's tokenizers
    "typing_extensions",
]

# One build for all Pythons from 3.11 on: before it the limited API has no buffers, and a Python
# without the GIL has no limited API.
LIMITED = sys.version_info >= (3, 11) and not sysconfig.get_config_var("Py_GIL_DISABLED")
KERNEL = Extension(
    "pma_megatron.merging._kernel",
    ["pma_megatron/merging/_kernel.c"],
    # Nothing may be fused, reordered or approximated but what the source says.
    extra_compile_args=["-std=c11", "-O3", "-ffp-contract=off", "-fno-fast-math"],
    libraries=["m"],
    define_macros=[("Py_LIMITED_API", "0x030B0000")] if LIMITED else [],
    py_limited_api=LIMITED,
    # Without a compiler the package is installed without it, and sums with torch. A wheel for
    # others must not come about like that: their builds set this.
    optional=os.environ.get("PMA_MEGATRON_REQUIRE_KERNEL") != "1",
)

setup(
    name="pma-megatron",
    version=VERSION["__version__"],
    description="Average sharded Megatron pre-training checkpoints into one that resumes (PMA)",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["pma_megatron", "pma_megatron.*"]),
    package_data={"pma_megatron": ["py.typed", "pages/page.html"]},
    ext_modules=[KERNEL],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if LIMITED else {},
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
        "wandb": WANDB,
        "mlflow": MLFLOW,
        "completion": COMPLETION,
        "yaml": YAML,
        "transformers": TRANSFORMERS,
        "stores": STORES,
        "msc": MSC,
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
