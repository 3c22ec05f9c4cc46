"""The commands `ovisnb merge` and what else belongs to training beside `ovisnb train`.

    ovisnb merge --model_path outputs/sft/final --output_dir merged --layout released --dtype bfloat16

Nothing is imported before a command needs it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ovisnb.cli_data import say


def add_training(commands: Any) -> None:
    """Add the commands of this file to the subparsers of `ovisnb`."""
    _add_merge(commands)


def merge(arguments: argparse.Namespace) -> int:
    """Write the model that an adapter and its base make together, and print its folder."""
    adapter, base = arguments.adapter_path or arguments.model_path, arguments.base_model
    if adapter is None:
        arguments.parser.error("give the adapter's folder: --model_path ADAPTER")
    if arguments.adapter_path and arguments.model_path:  # the other way to say it: --model_path is the base then
        if base is not None:
            arguments.parser.error("--model_path, --adapter_path and --base_model are three paths for two models")
        base = arguments.model_path
    from ovisnb.paths import resolve_model
    from ovisnb.train.merge import merge

    base = None if base is None else resolve_model(base)
    options = {"base_model": base, "layout": arguments.layout, "dtype": arguments.dtype}
    say(merge(resolve_model(adapter), arguments.output_dir, **options))
    return 0


def _add_merge(commands: Any) -> None:
    command = commands.add_parser("merge", help="write an adapter and its base as one model", allow_abbrev=False)
    command.add_argument("--model_path", metavar="ADAPTER", help="adapter folder or hub id")
    command.add_argument(
        "--adapter_path", "--lora_path", metavar="ADAPTER", help="the same; --model_path beside it is then the base"
    )
    command.add_argument(
        "--base_model",
        "--base_model_path",
        "--base_model_name_or_path",
        metavar="BASE",
        help="what to merge into (default: the base that the adapter names)",
    )
    command.add_argument(
        "--output_dir", "--output_path", "--save_path", required=True, type=Path, help="a new or empty folder"
    )
    command.add_argument(
        "--layout",
        choices=("native", "released"),
        default="native",
        help='"native" for ovisnb and transformers (default), "released" for vLLM, ms-swift and the released code',
    )
    command.add_argument(
        "--dtype",
        help="bfloat16, float16 or float32 weights (default: as the base was in training, else as the base is)",
    )
    command.set_defaults(call=merge, parser=command)
