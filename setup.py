"""Package metadata. `pip install -e '.[dev]' -c constraints.txt` gives the tested set of versions."""

from pathlib import Path

from setuptools import find_packages, setup

EVALUATION = [
    "datasets>=3,<6",
    "scikit-learn>=1.5,<2",
    "seqeval>=1.2.2,<2",
    "sentence-transformers>=6,<7",
    "torchmetrics>=1.4,<2",
    "ir-measures>=0.3.7,<1",
    "scipy>=1.13,<2",
]

setup(
    name="megatron_ext",
    version="0.1.0",
    description="Pretrain text encoders on megatron-core with any sequence of CLM, MLM and MNTP phases",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_ext", "megatron_ext.*"]),
    package_data={"megatron_ext": ["hf/*.txt"]},
    install_requires=[
        "torch>=2.10,<3",  # older ones can be made to run code by a file, even with weights_only (CVE-2026-24747)
        "megatron-core>=0.16.1,<0.20",  # 0.17 and newer need Python 3.12: pip takes the newest that fits
        "transformers>=5.10,<6",  # native EuroBERT; older ones write outside the folder (CVE-2026-9856)
        "tokenizers>=0.22,<1",
        "safetensors>=0.5,<1",
        "blake3>=1.0,<2",  # sums of checkpoint files
        "sentencepiece>=0.2.3,<1",  # older ones crash on crafted models
        "protobuf>=5,<8",  # SentencePiece models are read through their protobuf definition
        "mlflow>=3.1,<4",
        "numpy>=2.0,<3",
        "psutil>=6.0,<8",  # megatron-core's checkpoint writer needs it and does not say so
        "packaging>=24",
        "pyarrow>=18,<27",
        "PyYAML>=6.0,<7",
        "matplotlib>=3.9,<4",
        "tqdm>=4.66,<5",
    ],
    extras_require={
        # Up to 2.15 it unpickles the state of FP8 layers in a checkpoint, and so runs code from there. Tried: 2.20.2.
        "gpu": ["transformer-engine[pytorch]>=2.16.1,<3"],
        # Fine-tuning and evaluation: metrics by the libraries that define them, data by those that read them.
        "eval": EVALUATION,
        "cluster": ["ray[default]>=2.40"],
        "dev": [
            "pytest>=8.3",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "setuptools>=77",
            "zstandard>=0.23",
            "accelerate>=1.1,<2",  # transformers' Trainer, a peer of the benchmarks
            "pandas>=2.2",
            *EVALUATION,
        ],
    },
)
