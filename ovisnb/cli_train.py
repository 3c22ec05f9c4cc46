"""The commands `ovisnb merge` and what else belongs to training beside `ovisnb train`.

    ovisnb plan sft.json --num_processes 2 --gpu_memory 24
    ovisnb merge --model_path outputs/sft/final --output_dir merged --layout released --dtype bfloat16

Nothing is imported before a command needs it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
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


def plan(words: Sequence[str]) -> int:
    """Print what a run with these settings will take of a GPU's memory, and what to change for it to fit."""
    own, words = _plan_flags().parse_known_args(list(words))
    from ovisnb.train import Settings
    from ovisnb.train.plan import CARDS, memory_plan
    from ovisnb.train.plan_model import planned_model
    from ovisnb.train.savings import savings

    settings = Settings.from_args(words)
    world = settings.num_processes or 1
    config, read = planned_model(settings)
    samples = read(settings)
    made = memory_plan(settings, config, samples, world, own.device)
    say(made.text())
    cards = CARDS if own.gpu_memory is None else (own.gpu_memory,)
    on_gpu = made if made.device == "cuda" else memory_plan(settings, config, samples, world, "cuda")
    fits = ", ".join(f"{card:g} GiB {'yes' if on_gpu.fits(card) else 'no'}" for card in cards)
    say(f"fits on a GPU of: {fits}")
    if own.gpu_memory is not None:
        say("what saves most, each alone:")
        for change in savings(settings, on_gpu, config, read, world):
            say(f"  {'fits' if on_gpu.fits(own.gpu_memory, change.left) else '    '}  {change}")
    return 0


def add_plan(commands: Any, formatter: type[argparse.HelpFormatter]) -> None:
    """Add `plan`, for its help: `plan` takes the words of its command line apart itself, most of them being settings."""
    commands.add_parser("plan", parents=[_plan_flags()], formatter_class=formatter, **_PLAN)


_PLAN: dict[str, Any] = {
    "help": "say what a training run takes of a GPU's memory",
    "usage": "ovisnb plan [CONFIG.json] [--SETTING VALUE ...] [--num_processes N] [--gpu_memory GIB] [--device DEVICE]",
    "description": "Say what a run of `ovisnb train` with these settings takes of each GPU's memory, before any weights are loaded.",
}


def _plan_flags() -> argparse.ArgumentParser:
    """What is no setting of `ovisnb plan`."""
    parser = argparse.ArgumentParser(prog="ovisnb plan", usage=_PLAN["usage"], allow_abbrev=False, add_help=False)
    parser.add_argument(
        "--gpu_memory", type=_gib, metavar="GIB", help="memory of a GPU in GiB: say what to change for it to fit"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="plan for this (default: what this machine trains on)"
    )
    return parser


def _gib(text: str) -> float:
    """A number of GiB above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of GiB above 0, such as 24")
    return value


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
