"""Build of `klora-kernels`: the package `klora` is src/klora, and the folders at the root are its subpackages."""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel

SUBPACKAGES = ("kernels", "lora", "model", "ttt", "bench", "cli")
HERE = Path(__file__).parent
OPS = sorted(path.parent.name for path in HERE.glob("kernels/*/__init__.py"))
"""Ops of more than one file: folders of their own in kernels/."""


class Editable(editable_wheel):
    """Puts `src` on the import path, where `klora` finds its subpackages itself.

    With setuptools' import hook, which is asked last, a clone in the current folder that is called `klora` would be
    taken for the package.
    """

    def finalize_options(self):
        self.distribution.packages, self.distribution.package_dir = ["klora"], {"": "src"}
        super().finalize_options()


setup(
    name="klora-kernels",
    version=re.search(r'__version__ = "(.+)"', (HERE / "src/klora/version.py").read_text(encoding="utf-8"))[1],
    license="MIT",
    description="Kernels for adapting a language model to each document while it reads it",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=["klora", *(f"klora.{name}" for name in SUBPACKAGES), *(f"klora.kernels.{op}" for op in OPS)],
    package_dir={"klora": "src/klora"} | {f"klora.{name}": name for name in SUBPACKAGES},
    package_data={"klora": ["py.typed"]},
    cmdclass={"editable_wheel": Editable},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=1.26",
        "sentencepiece>=0.2",
        "zstandard>=0.22",
        "safetensors>=0.5",
        "nvtx>=0.2.10",
        "typer>=0.15",
        "rich>=13",
        "matplotlib>=3.8",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-cov>=5",
            "pytest-xdist>=3.6",
            "pytest-benchmark>=5",
            "hypothesis>=6.100",
            "jsonschema>=4.18",
            "ruff>=0.14",
            "setuptools>=70.1",
            "transformers>=5",
            "peft>=0.19",
        ],
        "bench": ["pytest-benchmark>=5", "jsonschema>=4.18"],
        "flash-attn": ["flash-attn>=2.7"],
        "fa4": ["flash-attn-4>=4.0.0b1"],
    },
    entry_points={"console_scripts": ["klora = klora.cli:main"]},
)
