"""``python -m bench <command>``: kernels, training steps and scaling beside alternatives."""

from __future__ import annotations

import argparse
import importlib
import os

# Otherwise two lines per profile; must be set before torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

# command → module that has ``add_arguments`` and ``main``
COMMANDS = {
    "run": "bench.run",
    "step": "bench.step",
    "scale": "bench.scale",
    "accuracy": "bench.accuracy",
    "weight-bits": "bench.weight_bits",
    "ptq": "bench.ptq",
    "networks": "bench.networks",
    "host": "bench.triton_host",
    "tune": "bench.tune",
    "compare": "bench.compare",
    "readme": "bench.readme",
    "pictures": "bench.pictures",
    "notebook": "bench.notebook",
    "rejection": "bench.rejection",
    "runtimes": "bench.runtimes",
    "zoo": "bench.zoo",
    "ownership": "bench.ownership",
}


def parser() -> argparse.ArgumentParser:
    """The argument parser of all commands."""
    result = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = result.add_subparsers(dest="bench", required=True)
    for name, module_name in COMMANDS.items():
        module = importlib.import_module(module_name)
        first_line = (module.__doc__ or "").partition("\n")[0].partition(": ")[2]
        command = commands.add_parser(name, help=first_line, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(main=module.main)
    return result


if __name__ == "__main__":
    args = parser().parse_args()
    args.main(args)
