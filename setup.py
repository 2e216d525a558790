"""Package metadata. Build-system and tool settings are in pyproject.toml, exact pins in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "austeer" / "version.py").read_text(encoding="utf-8")).group(1)

REQUIRES = [
    "torch>=2.11,<2.14",
    'triton>=3.6,<3.8; platform_system == "Linux"',
    "transformers>=5.17,<6",
    "accelerate>=1.15,<2",
    "psutil>=5.9",
    "safetensors>=0.5",
    "huggingface_hub>=1.0",
    "jinja2>=3.1",
    "numpy>=2.0",
    "scipy>=1.15",
    "typer>=0.20",
    "rich>=13.9",
]

# Pairs in Zstandard files, in Parquet and in Hugging Face datasets.
DATA = ["zstandard>=0.23", "pyarrow>=21", "datasets>=4.4,<6"]

# `austeer bench`: generations that take turns are greenlets.
BENCH = ["greenlet>=3.1", "matplotlib>=3.9", "peft>=0.18", "pytest>=8", "pytest-benchmark>=5"]

# What the other libraries need that `austeer bench` measures beside this one. They themselves are installed by `make
# peers`, without their dependencies: some ask for older versions of packages than work with them.
PEERS = ["scikit-learn>=1.4"]

EXTRAS = {
    "data": DATA,
    "demo": ["gguf>=0.17", "matplotlib>=3.9"],
    "plots": ["matplotlib>=3.9"],
    # Adapters and control vectors for llama.cpp. Those for PEFT and vLLM need nothing.
    "gguf": ["gguf>=0.17"],
    "peft": ["peft>=0.18"],
    # Its tasks and metrics on a steered model: `austeer evaluate --lm-eval`.
    "lm-eval": ["lm_eval>=0.4.13,<0.5"],
    "bench": BENCH,
    "peers": [*BENCH, *PEERS],
    "dev": [
        *DATA,
        *BENCH,
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "bitsandbytes>=0.48; platform_system == 'Linux'",
        "ruff>=0.14",
        "mypy>=1.18",
        "import-linter>=2.14,<3",
    ],
}

setup(
    name="austeer",
    version=VERSION,
    description="Low-overhead activation steering of language models: fused Triton kernels and a "
    "Hugging Face wrapper for atomic-unit steering (AUSteer)",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10,<3.13",
    # In a checkout the benchmarks are `bench`; nobody else's site-packages should have a package of that name.
    packages=[
        *find_packages(include=["austeer", "austeer.*"]),
        *find_packages(where="kernels"),
        "austeer_bench",
        *(f"austeer_bench.{name}" for name in find_packages(where="bench")),
    ],
    package_dir={"austeer": "austeer", "austeer_kernels": "kernels/austeer_kernels", "austeer_bench": "bench"},
    package_data={
        "austeer_kernels": ["tables/*.json", "py.typed"],
        "austeer": ["data/*", "data/tasks/*", "py.typed"],
        "austeer_bench": ["published/*.md"],
    },
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["austeer=austeer.cli:main"],
        "austeer.commands": ["bench=austeer_bench.cli:app"],
        "vllm.general_plugins": ["austeer=austeer.vllm:register"],
    },
    classifiers=[
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
