"""Export a trained model and verify the export against it."""

from divqat.export.onnx import ExportReport, export_onnx
from divqat.export.verify import VerifyReport, verify

__all__ = ["ExportReport", "VerifyReport", "export_onnx", "verify"]
