"""Export a trained model and verify the export against it."""

from divqat.export.executorch import ExecuTorchReport, export_executorch
from divqat.export.onnx import ExportReport, export_onnx
from divqat.export.openvino import OpenVINOReport, export_openvino
from divqat.export.outputs import verify_outputs
from divqat.export.placement import Placement, placements
from divqat.export.program import export_program
from divqat.export.summary import summary, with_kernels
from divqat.export.verify import VerifyReport, verify
from divqat.victim.metadata import InputMetadata, read_metadata

__all__ = [
    "ExecuTorchReport",
    "ExportReport",
    "InputMetadata",
    "OpenVINOReport",
    "Placement",
    "VerifyReport",
    "export_executorch",
    "export_onnx",
    "export_openvino",
    "export_program",
    "placements",
    "read_metadata",
    "summary",
    "verify",
    "verify_outputs",
    "with_kernels",
]
