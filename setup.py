"""Packaging: the library, its command, and the embedded cascade's weights beside the code."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
HOME = "https://github.com/mtl-anagram/mtl_anagram"
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "mtl_anagram/__init__.py").read_text(), re.M).group(1)

# weights/ lies at the top of the repository and is installed as mtl_anagram/weights, so that the command
# finds the embedded cascade from any folder.
WEIGHTS = [str(p.relative_to(ROOT / "weights")) for p in (ROOT / "weights").rglob("*") if p.is_file()]

setup(
    name="mtl_anagram",
    version=VERSION,
    description="Visual anagrams from pixel-space diffusion cascades of the IF family, in plain PyTorch",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The mtl_anagram authors",
    url=HOME,
    project_urls={
        "Documentation": f"{HOME}/tree/main/docs",
        "Source": HOME,
        "Issues": f"{HOME}/issues",
        "Paper": "https://arxiv.org/abs/2412.02693",
    },
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["visual anagrams", "optical illusions", "diffusion", "DeepFloyd IF", "PyTorch"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Multimedia :: Graphics",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=[*find_packages(include=["mtl_anagram", "mtl_anagram.*"]), "mtl_anagram.weights"],
    package_dir={"mtl_anagram": "mtl_anagram", "mtl_anagram.weights": "weights"},
    package_data={"mtl_anagram": ["py.typed", "evaluation/page.html"], "mtl_anagram.weights": WEIGHTS},
    install_requires=[
        "torch>=2.5",
        "safetensors>=0.4",
        "huggingface_hub>=0.25",
        "sentencepiece>=0.2",
        "einops>=0.7",
        "pillow>=10",
        "tqdm>=4.60",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-xdist>=3",
            "ruff>=0.6",
            "mypy>=1.11",
            "diffusers>=0.30",
            "transformers>=4.40",
            "protobuf",
            "numpy",
            "scipy",
            "ftfy",
            "triton>=3; platform_system == 'Linux'",
            "nbclient>=0.9",
            "ipykernel>=6",
        ],
        "bench": ["diffusers>=0.30", "transformers>=4.40", "protobuf"],
        "train": ["numpy", "scipy"],
    },
    entry_points={"console_scripts": ["mtl-anagram = mtl_anagram.__main__:main"]},
)
