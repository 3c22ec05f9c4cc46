"""Training: settings, what trains, supervised fine-tuning.

    from ovisnb.train import Settings, run_sft
    run_sft(Settings.from_json("sft.json"))

`Settings` imports no torch; `run_sft` brings it in when it is first used.
"""

from __future__ import annotations

from typing import Any

from ovisnb.train.settings import Settings, SettingsError

__all__ = ["Settings", "SettingsError", "run_sft"]


def __getattr__(name: str) -> Any:
    if name == "run_sft":
        from ovisnb.train.sft import run_sft

        return run_sft
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
