import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "hgkd_fairseq" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

# A package index shows this page alone, so links to other files become their names; the source distribution has them.
README = re.sub(r"\[([^]]+)\]\((?!\w+:)([^)]+)\)", r"\1 (`\2`)", (HERE / "README.md").read_text())

setup(
    name="hgkd-fairseq",
    version=VERSION,
    description="Hard-gate knowledge distillation of neural translation models, as a fairseq plugin",
    long_description=README,
    long_description_content_type="text/markdown",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["hgkd_fairseq", "hgkd_fairseq.*"]),
    package_data={"hgkd_fairseq": ["methods.toml"], "hgkd_fairseq.loss.native": ["*.c"]},
    # Version ranges; the tested versions are pinned in scripts/constraints.txt.
    install_requires=[
        "torch>=2.6",
        "ve-fairseq>=0.12.3,<0.13",
        "numpy>=1.26",
        "scipy>=1.12",
        "sacrebleu>=2.4",
        "sentencepiece>=0.2",
    ],
    extras_require={
        "triton": ["triton>=3.2"],
        "report": ["matplotlib>=3.8"],
        "export": ["ctranslate2>=4.5"],
        "examples": ["transformers>=5", "accelerate>=1.1"],
        "test": [
            *("pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6", "ruff>=0.6", "mypy>=1.10"),
            *("torchmetrics>=1.4", "matplotlib>=3.8", "tensorboardX>=2.6", "ctranslate2>=4.5"),
            *("transformers>=5", "accelerate>=1.1"),
        ],
        "recipes": ["sacremoses>=0.1", "subword-nmt>=0.3.8", "protobuf>=5"],
    },
    entry_points={"console_scripts": ["hgkd = hgkd_fairseq.cli:main"]},
)
