"""The command `ovisnb`.

    ovisnb train sft.json --learning_rate 1e-4
    ovisnb merge --model_path outputs/sft/final --output_dir merged --layout released
    ovisnb infer --model_path data/tiny-ovis --image_path cat.jpg --question "What is it?"
    ovisnb run notebooks/03_sft.ipynb -p max_steps 20
    ovisnb data validate train.json images
    ovisnb demo

Each command imports what it needs when it is called, so that `ovisnb --help` answers at once. What goes
wrong for a reason of the user's (a missing file, a bad setting) is one sentence on stderr and exit code 1;
a mistake in the command line is exit code 2; a traceback means a fault of ours.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from ovisnb import __version__
from ovisnb.cli_data import add_data, at_least, check_report, printing, say
from ovisnb.cli_train import add_plan, add_training, plan


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            return _call(words)
        finally:
            with printing():
                print(end="", flush=True)  # what still waits: an error is shown now, not where Python ends
    except KeyboardInterrupt as stop:
        code, sentence = (*stop.args, 130, "stopped")[:2] if len(stop.args) != 1 else (stop.args[0], "stopped")
        if os.environ.get("RANK", "0") == "0":
            print(f"ovisnb: {sentence}", file=sys.stderr)
        return code
    except (ValueError, OSError, FloatingPointError) as error:
        if not _is_meant(error):
            raise
        print(f"ovisnb: {_sentence(error)}", file=sys.stderr)
        return 1


def _call(words: list[str]) -> int:
    # its flags are the settings themselves, which only Settings knows
    if words[:1] in (["train"], ["plan"]) and not {"-h", "--help"} & set(words):
        return (train if words[0] == "train" else plan)(words[1:])
    arguments = _parser().parse_args(words)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")  # what is wrong with a picture is said in a sentence
            return arguments.call(arguments)
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: Any) -> None:
    """End as Ctrl-C does, which leaves no unfinished file and no running kernel."""
    raise KeyboardInterrupt(128 + number)


def train(words: Sequence[str]) -> int:
    """Fine-tune as a settings file and flags say, and print the run folder; one process, or one of a launcher's."""
    from ovisnb.train import Settings, run_sft

    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with _member():
            say(run_sft(Settings.from_args(words)))
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _member() -> AbstractContextManager:
    """What a process that a launcher started keeps to: see `ovisnb.train.distributed.member`."""
    if "RANK" not in os.environ:
        return nullcontext()
    from ovisnb.train.distributed import member

    return member()


def infer(arguments: argparse.Namespace) -> int:
    """Ask one question about one picture; print the answer, and write it as JSON if asked to."""
    check_report(arguments, "output_json")
    from ovisnb.data import Media, open_image
    from ovisnb.data.files import write_json
    from ovisnb.generate import Ovis25Inference
    from ovisnb.paths import resolve_model

    # what can be refused now should not cost the loading of a model
    if not arguments.image_path.is_file():
        raise FileNotFoundError(f"there is no picture {arguments.image_path}")
    open_image(Media(path=arguments.image_path))
    ovis = Ovis25Inference(resolve_model(arguments.model_path))
    options = {
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature,
        "enable_thinking": arguments.enable_thinking,
    }
    if arguments.request_type:
        answer = ovis.grounding_inference(
            arguments.image_path, arguments.question, request_type=arguments.request_type, **options
        )
    else:
        answer = ovis.single_image_inference(arguments.image_path, arguments.question, **options)
    say(answer.text)
    if arguments.output_json:
        result = {"image_path": str(arguments.image_path), "question": arguments.question, **_as_json(answer)}
        write_json(result, arguments.output_json)
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Run one notebook with parameters, and print the page made of it."""
    from ovisnb.notebooks import default_output, parse_parameters, run_notebook
    from ovisnb.paths import resolve

    notebook = resolve(arguments.notebook)
    parameters = parse_parameters(notebook, arguments.parameters)
    output = arguments.output or default_output(notebook)
    say(run_notebook(notebook, output.absolute(), parameters))
    return 0


def demo(arguments: argparse.Namespace) -> int:
    """Run the notebooks on what is shipped."""
    from ovisnb.notebooks import run_demo

    run_demo()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ovisnb", description="A workbook for Ovis2.5: data, loss masks, training, grounding.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"ovisnb {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    command = commands.add_parser(
        "train",
        help="fine-tune a model",
        usage="ovisnb train [CONFIG.json] [--SETTING VALUE ...]",
        description="Fine-tune a model. Every setting may stand in CONFIG.json or be a flag; a flag wins.",
        formatter_class=_SettingsHelp,
    )
    add_plan(commands, _SettingsHelp)

    command = commands.add_parser("infer", help="ask a model about a picture", allow_abbrev=False)
    command.add_argument("--model_path", required=True, help="checkpoint folder or hub id")
    command.add_argument("--image_path", required=True, type=Path, help="the picture")
    command.add_argument("--question", required=True, help="what to ask about it")
    command.add_argument("--request_type", choices=("box", "point"), help="ask for coordinates of this kind")
    command.add_argument(
        "--max_new_tokens", type=at_least(1), help="longest answer (default: 1024, with thinking 3072)"
    )
    command.add_argument("--temperature", type=float, help="0: always the likeliest token (default: the checkpoint's)")
    command.add_argument("--enable_thinking", action="store_true", help="let the model think before it answers")
    command.add_argument("--output_json", type=Path, metavar="FILE", help="write the answer, its boxes and points here")
    command.set_defaults(call=infer, parser=command)

    command = commands.add_parser("run", help="run a notebook, headless", allow_abbrev=False)
    command.add_argument("notebook", help="the .ipynb file")
    command.add_argument(
        "-p",
        dest="parameters",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="a parameter of the notebook; may be given several times",
    )
    command.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the executed notebook (default: in a new folder in outputs/); its page is beside it as .html",
    )
    command.set_defaults(call=run)

    add_training(commands)
    add_data(commands)

    command = commands.add_parser("demo", help="run the notebooks on the shipped data into outputs/demo")
    command.set_defaults(call=demo)
    return parser


class _SettingsHelp(argparse.HelpFormatter):
    """The help of `train`: every setting with its default, under headings, from Settings only when somebody asks."""

    def format_help(self) -> str:
        from ovisnb.train import Settings

        return super().format_help() + Settings.help()


def _as_json(answer: Any) -> dict[str, Any]:
    """An Answer as plain JSON: boxes and points normalised and in pixels of the picture."""
    return {
        "response": answer.text,
        "parsed": {"think_content": answer.thinking, "answer_content": answer.answer},
        "boxes": [{"label": box.label, "box": list(box), "pixels": list(box.pixels)} for box in answer.boxes],
        "points": [
            {"label": point.label, "point": list(point), "pixels": list(point.pixels)} for point in answer.points
        ],
        "image_size": list(answer.image_size),
        "problems": answer.problems,
        "usage": answer.usage,
    }


def _is_meant(error: Exception) -> bool:
    """Whether our own code raised this to say something to the user, or the system said a file is not to be had."""
    if isinstance(error, OSError) or type(error).__module__.startswith("ovisnb."):
        return True
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    return frame.tb_frame.f_globals.get("__name__", "").startswith("ovisnb.")


def _sentence(error: Exception) -> str:
    """The error's message on one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    raise SystemExit(main())
