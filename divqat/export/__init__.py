"""Export a trained model and verify the export against it."""

from divqat.export.onnx import ExportReport, export_onnx
from divqat.export.placement import Placement, placements
from divqat.export.summary import summary, with_kernels
from divqat.export.verify import VerifyReport, verify

__all__ = [
    "ExportReport",
    "Placement",
    "VerifyReport",
    "export_onnx",
    "placements",
    "summary",
    "verify",
    "with_kernels",
]
