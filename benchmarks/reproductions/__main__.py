"""Command line: ``python -m benchmarks.reproductions [--quick] [--seed N]``: all of them."""

import importlib
import pkgutil
import sys

import benchmarks.reproductions
from benchmarks.reproductions._record import Reproduction, main


def reproductions() -> list[Reproduction]:
    """One of each module, by name."""
    found = sorted(m.name for m in pkgutil.iter_modules(benchmarks.reproductions.__path__))
    modules = [
        importlib.import_module(f"benchmarks.reproductions.{name}")
        for name in found
        if not name.startswith("_")
    ]
    return [module.REPRODUCTION for module in modules]


if __name__ == "__main__":
    sys.exit(main(reproductions()))
