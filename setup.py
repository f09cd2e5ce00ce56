"""Packaging of bas. The shipped weights travel inside the package, as bas/weights."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (ROOT / "bas" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

STUDIO = ["starlette>=1.10", "uvicorn>=0.54"]

setup(
    name="bas",
    version=VERSION,
    description="Break-A-Scene in plain PyTorch: several concepts from a single image",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["bas", "bas.*"]), "bas.weights"],
    package_dir={"bas.weights": "weights"},
    package_data={
        "bas": ["py.typed", "web/templates/*", "web/static/*", "pretrained/*.json", "pretrained/clip_vocabulary/*"],
        "bas.weights": ["**/*"],
    },
    install_requires=[
        "torch>=2.10",
        "transformers>=5.3",
        "tokenizers>=0.20",
        "safetensors>=0.5",
        "huggingface_hub>=0.30",
        "einops>=0.8",
        "numpy>=1.26",
        "pillow>=12.2",
        "jinja2>=3.1",
        "filelock>=4.3",
    ],
    extras_require={
        "studio": STUDIO,
        "evaluation": ["scipy>=1.11", "matplotlib>=3.9"],
        "tensorboard": ["tensorboard>=2.15"],
        "bitsandbytes": ["bitsandbytes>=0.46"],
        "completion": ["shtab>=1.7"],
        "heic": ["pillow-heif>=1.0"],
        "docs": ["mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"],
        "test": [
            *STUDIO,
            "httpx2>=2",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "axe-core-python>=0.1",  # brings axe-core (MPL-2.0), a script that finds barriers on the studio's page
            "diffusers>=0.35",
            "peft>=0.17",
            "ruff>=0.11",
            "pyright[nodejs]>=1.1.400",
            "scipy>=1.11",
            "matplotlib>=3.9",
            "pycocotools>=2.0.8",
        ],
    },
    entry_points={"console_scripts": ["bas = bas.cli.entry:main"]},
)
