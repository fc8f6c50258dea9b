"""What this machine's torch lacks for the examples."""

import importlib.util
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

# PyPI's torchvision is built for a torch with CUDA. Beside a torch without it, its compiled ops
# cannot be loaded; nothing here uses them, but importing it fails unless these two are declared.
_spec = importlib.util.find_spec("torchvision")
if _spec is not None and _spec.origin is not None:
    try:
        torch.ops.load_library(Path(_spec.origin).parent / "_C.so")
    except OSError:
        for _name in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{_name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor"
            )
