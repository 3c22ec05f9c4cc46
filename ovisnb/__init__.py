"""ovisnb: a workbook for Ovis2.5.

Importing this package imports nothing heavy: each public name is fetched from its
room on first use, so that `import ovisnb` and `ovisnb --help` answer at once.
"""

from __future__ import annotations

import importlib
import logging

__version__ = "0.1.0"

# On some CPUs bitsandbytes says while it is imported that a faster kernel, which nothing here asks for, is not installed.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# public name -> the module that defines it
_HOMES = {
    "load": "ovisnb.model",
    "save": "ovisnb.model",
    "assemble": "ovisnb.model",
    "Record": "ovisnb.data",
    "read_records": "ovisnb.data",
    "encode": "ovisnb.chat",
    "collate": "ovisnb.chat",
    "Encoded": "ovisnb.chat",
    "Ovis25Inference": "ovisnb.generate",
    "Answer": "ovisnb.generate",
    "Settings": "ovisnb.train",
    "run_sft": "ovisnb.train",
}


def __getattr__(name: str):
    """Fetch a public name from its module on first use (PEP 562)."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ovisnb' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
