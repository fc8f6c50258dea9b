"""A model as a graph of its operations that does the same as the model, in both modes.

Why not ``torch.fx.symbolic_trace``: it decides the mode when it traces, takes no branch on shapes,
loses hooks and classes, and knows no BatchNorm but that of torch.nn. Why not ``torch.export``: its
program has one mode, no modules, and no user's names; it refuses what this tracer refuses.
"""

from divqat.quantize.tracing.modes import capture, split
from divqat.quantize.tracing.recorded import Untraceable
from divqat.quantize.tracing.traced import PreparedModule, rename_keys

__all__ = ["PreparedModule", "Untraceable", "capture", "rename_keys", "split"]
