"""Package map: everything else about the package is declared in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "divqat/__init__.py").read_text())[1]

setup(
    version=VERSION,
    # The Triton kernels live in the top-level folder kernels/ and install as divqat.kernels.
    packages=[*find_packages(include=["divqat", "divqat.*"]), "divqat.kernels"],
    package_dir={"divqat.kernels": "kernels"},
    package_data={"divqat": ["py.typed"]},
)
