"""The commands `ovisnb data ...`: make a sample, check, split, convert and measure data files.

    ovisnb data sample data/sample.json --num_samples 20
    ovisnb data validate train.json images --json faults.json --fix
    ovisnb data split full.json --train_ratio 0.8 --val_ratio 0.1 --test_ratio 0.1
    ovisnb data convert annotations.jsonl records.json --boxes normalised --image_folder images
    ovisnb data stats train.json images --model data/tiny-ovis --max_length 4096

Exit code 0 where all is well, 1 where something is wrong with the data, 2 for a mistake in the command line. `stats` only
counts: bad records are listed, and it is 1 where no record can be read.
Nothing is imported before a command needs it.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FORMS = "single, crop, several_pictures, thinking, system, text, turns, video"
_CONVENTIONS = ("pixels", "normalised", "thousand")


def add_data(commands: Any) -> None:
    """Add `data` and its commands to the subparsers of `ovisnb`."""
    data = commands.add_parser("data", help="make, check, split, convert and measure data files", allow_abbrev=False)
    parts = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_sample(parts)
    _add_validate(parts)
    _add_split(parts)
    _add_convert(parts)
    _add_stats(parts)


def sample(arguments: argparse.Namespace) -> int:
    """Write a small data set of coloured shapes."""
    from ovisnb.data.sample import make_sample

    path = make_sample(arguments.out, arguments.num_samples, seed=arguments.seed, kinds=arguments.kinds)
    say(f"{_records(arguments.num_samples)} written to {path}, their pictures to {path.stem}_images beside it")
    say(f"check them: ovisnb data validate {path} {path.parent}")
    return 0


def validate(arguments: argparse.Namespace) -> int:
    """List everything that is wrong with a data file and its pictures, in one pass."""
    check_report(arguments, "json")
    _check_limits(arguments)
    from ovisnb.data.checks import validate
    from ovisnb.data.checks.fix import clean_name, fix
    from ovisnb.data.checks.pictures import Pictures
    from ovisnb.data.files import wants_lines
    from ovisnb.data.formats import reader_of
    from ovisnb.data.record import RecordError

    out = None if arguments.fix is True else arguments.fix
    if out is not None:  # a name that will not do is refused before the work
        if out.exists():
            raise FileExistsError(f"{out} is there already: remove it, or give --fix another name")
        wants_lines(out)
    if arguments.fix and arguments.json and arguments.json.resolve() == (out or clean_name(arguments.file)).resolve():
        arguments.parser.error("--json and --fix name the same file: give one of them another name")
    options = _given(arguments, "max_length", "max_area", "against", "ignore", *_READING, *_LIMITS)
    folder = _folder(arguments)
    if arguments.format:
        reader_of(arguments.format)  # a format that is none is no fault of the file
    with Pictures(folder, max_area=arguments.max_area, contents=bool(arguments.against)) as pictures:
        options |= {"pictures": pictures, "processor": _processor(arguments.model)}
        try:
            report = validate(arguments.file, folder, **options, progress=True)
        except RecordError as error:
            if arguments.json and arguments.file.is_file():  # else an earlier report stays, which may say all is well
                _refused(arguments.file, error).write_json(arguments.json)
            raise
        say(report.text(arguments.show))
        if arguments.json:
            report.write_json(arguments.json)
            say(f"\nall faults: {arguments.json}")
        if arguments.fix:
            say("\n" + fix(arguments.file, out, folder, **options).text())
    return 0 if report.clean else 1


def split(arguments: argparse.Namespace) -> int:
    """Write FILE_train, FILE_val and FILE_test. All records of a picture go into the same one."""
    from ovisnb.data.split import check_ratios, split

    ratios = _given(arguments, "train_ratio", "val_ratio", "test_ratio")
    try:
        check_ratios(ratios)
    except ValueError as error:
        arguments.parser.error(str(error))
    options = {**ratios, **_given(arguments, "seed", "output_dir", "format")}
    say(split(arguments.file, **options, image_folder=_folder(arguments), progress=True).text())
    return 0


def convert(arguments: argparse.Namespace) -> int:
    """Write a data file in another format, or with its coordinates in another convention."""
    from ovisnb.data.checks.faults import plain
    from ovisnb.data.convert import convert_file

    options = _given(arguments, "to", "boxes", "calls", "pictures", *_READING)
    done = convert_file(arguments.source, arguments.out, **options, image_folder=_folder(arguments))
    say(f"{_records(done.records)} written to {done.path}")
    if arguments.pictures and arguments.pictures.is_dir():
        say(f"pictures written to {arguments.pictures}: give it as the image folder of {done.path}")
    for note in done.notes[:10]:
        say(f"  {plain(note)}")
    if len(done.notes) > 10:
        say(f"  ... and {len(done.notes) - 10:,} more notes")
    return 0


def stats(arguments: argparse.Namespace) -> int:
    """Print the numbers of a data file: kinds, turns, pictures, boxes and, with a model, tokens."""
    check_report(arguments, "json")
    _check_limits(arguments)
    from ovisnb.data.files import write_json
    from ovisnb.data.stats import summarise_file
    from ovisnb.data.stats_text import padding_of, stats_dict, stats_text

    options = _given(arguments, *_READING, *_LIMITS)
    processor, folder = _processor(arguments.model), _folder(arguments)
    found = summarise_file(arguments.file, processor, image_folder=folder, **options, progress=True)
    padding = padding_of(found, arguments.batch_tokens, arguments.batch_images, arguments.max_length)
    say(stats_text(found, arguments.max_length, padding))
    if arguments.json:
        write_json(stats_dict(found, arguments.max_length, padding), arguments.json)
    return 0 if found.records else 1


_READING = ("format", "template")
_LIMITS = ("min_pixels", "max_pixels", "min_frames", "max_frames")
_TOKENS = ("max_length", "batch_tokens", "batch_images")
_REPORTS = {
    "validate": rb'\[\]|\[\n\{"kind": "\w+", "id": .*, "line": \w+, "message": ',
    "stats": rb'\{\n "records": \d+,\n "kinds": \{',
    "infer": rb'\{\n +"image_path": ',
}
"""How the JSON begins that a command writes."""


def _command(parts: Any, call: Callable[[argparse.Namespace], int], help: str, **more: Any) -> argparse.ArgumentParser:
    """The parser of one command, called as the function that does it and described by its docstring."""
    command = parts.add_parser(call.__name__, help=help, description=call.__doc__, allow_abbrev=False, **more)
    command.set_defaults(call=call, parser=command)
    return command


def _add_sample(parts: Any) -> None:
    command = _command(parts, sample, "write a small data set to try things with")
    command.add_argument("out", metavar="OUT", type=Path, help="the .json or .jsonl file; pictures go beside it")
    command.add_argument("--num_samples", type=at_least(1), default=20, metavar="N", help="records (default: 20)")
    command.add_argument("--seed", type=int, default=0, help="another seed, other records (default: 0)")
    command.add_argument("--kinds", nargs="+", metavar="KIND", help=f"some of {_FORMS} (default: all in turn)")


def _add_validate(parts: Any) -> None:
    command = _command(parts, validate, "list everything that is wrong with a data file")
    _add_file(command)
    _add_reading(command, "image_folder", nargs="?")
    command.add_argument("--json", type=Path, metavar="FILE", help="write one entry a fault: kind, id, line, message")
    said = "write a cleaned copy (default: FILE_clean beside FILE); FILE itself is never touched"
    command.add_argument("--fix", nargs="?", const=True, type=Path, metavar="OUT", help=said)
    said = "other splits, to find pictures in both"
    command.add_argument("--against", nargs="+", default=[], type=Path, metavar="FILE", help=said)
    more = {"action": "extend", "default": [], "type": _kind, "metavar": "KIND"}
    command.add_argument("--ignore", nargs="+", **more, help="kinds not to report")
    command.add_argument(
        "--show", type=at_least(0), default=5, metavar="N", help="faults of a kind to print (default: 5)"
    )
    _add_numbers(command, max_area="most pixels a picture may have (default: 89,478,485)")
    _add_tokens(command)
    usual = command.format_help  # only for the help: argparse shows the usage with every mistake
    command.format_help = lambda: f"{usual()}\nkinds of faults:\n{_kinds()}\n"


def _add_split(parts: Any) -> None:
    command = _command(parts, split, "split a data file into train, val and test")
    _add_file(command)
    _add_reading(command, "--image_folder", template=False)
    for name, share in (("train", 0.8), ("val", 0.1), ("test", 0.1)):
        command.add_argument(f"--{name}_ratio", type=float, default=share, metavar="R", help=f"(default: {share})")
    command.add_argument("--seed", type=int, default=0, help="another seed, another split (default: 0)")
    command.add_argument("--output_dir", type=Path, metavar="DIR", help="where the files go (default: beside FILE)")


def _add_convert(parts: Any) -> None:
    command = _command(parts, convert, "write a data file in another format or convention of coordinates")
    command.add_argument("source", metavar="IN", type=Path, help="the data file")
    command.add_argument("out", metavar="OUT", type=Path, help="the file to write")
    command.add_argument("--to", metavar="FORMAT", help="the format of OUT (default: records)")
    command.add_argument("--boxes", choices=_CONVENTIONS, help="what <box> and <point> shall hold")
    command.add_argument("--calls", choices=_CONVENTIONS, help="what tool calls shall hold")
    said = "where pictures that lie in IN itself are written"
    command.add_argument("--pictures", type=Path, metavar="DIR", help=said)
    _add_reading(command, "--image_folder")


def _add_stats(parts: Any) -> None:
    command = _command(parts, stats, "print the numbers of a data file")
    _add_file(command)
    _add_reading(command, "image_folder", nargs="?")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here as well")
    limits = {"batch_tokens": "most tokens of a planned batch", "batch_images": "most pictures of a planned batch"}
    _add_numbers(command, **limits)
    _add_tokens(command)


def _add_file(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", metavar="FILE", type=Path, help="the data file, of any format that is read")


def _add_reading(command: argparse.ArgumentParser, folder: str, template: bool = True, **more: Any) -> None:
    """How a data file is read; `folder` is the name of the image folder, which is an option or an argument."""
    command.add_argument(folder, **more, metavar="IMAGE_FOLDER", type=Path, help="where the paths of pictures start")
    command.add_argument("--allow_absolute", action="store_true", help="take absolute paths from anywhere")
    command.add_argument("--format", metavar="NAME", help="the format of the file (default: told by its rows)")
    if template:
        command.add_argument("--template", metavar="TEXT", help="the question that goes with captions")


def _add_tokens(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", metavar="PATH", help="checkpoint folder or hub id, to count tokens with")
    _add_numbers(
        command,
        max_length="the limit of a sample in tokens",
        min_pixels="pictures are enlarged to this (default: the model's)",
        max_pixels="pictures are shrunk to this (default: the model's)",
        min_frames="least frames taken of a video",
        max_frames="most frames taken of a video",
    )


def _add_numbers(command: argparse.ArgumentParser, **options: str) -> None:
    for name, said in options.items():
        command.add_argument(f"--{name}", type=at_least(1), metavar="N", help=said)


def at_least(least: int) -> Callable[[str], int]:
    """What argparse reads a whole number with that is `least` or more."""

    def number(text: str) -> int:
        if not re.fullmatch(r"[-+]?\d{1,18}", text):
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)

    return number


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names}


def _kinds() -> str:
    """The table of kinds for the help of `validate`, read only when somebody asks."""
    from ovisnb.data.checks.faults import KINDS

    width = max(map(len, KINDS))
    return "\n".join(f"  {kind:<{width}}  {sentence}" for kind, sentence in KINDS.items())


def check_report(arguments: argparse.Namespace, option: str) -> None:
    """Refuse a file to write a command's JSON to that is there and was not written by that command."""
    out = getattr(arguments, option)
    if out is None or not (out.is_dir() or out.is_file()):
        return
    if out.is_file():
        with out.open("rb") as file:
            if re.match(rb"\s*$|" + _REPORTS[arguments.call.__name__], file.read(1 << 16)):
                return
    said = f"--{option} would replace {out}, which is no earlier report of this command"
    arguments.parser.error(f"{said}: give another name, or remove it")


def _check_limits(arguments: argparse.Namespace) -> None:
    """Refuse limits that nothing would keep to, and those that cross."""
    given = {name for name in (*_TOKENS, *_LIMITS) if getattr(arguments, name, None) is not None}
    if given and arguments.model is None:
        arguments.parser.error(f"--{min(given)} is for tokens, which depend on the model: name it with --model")
    for what in ("pixels", "frames"):
        least, most = getattr(arguments, f"min_{what}"), getattr(arguments, f"max_{what}")
        if least and most and least > most:
            arguments.parser.error(f"--min_{what} {least} is above --max_{what} {most}: swap them, or leave one out")


def _kind(name: str) -> str:
    from ovisnb.data.checks.faults import check_kinds

    try:
        return check_kinds([name])[0]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _folder(arguments: argparse.Namespace) -> Any:
    """The image folder as the data room takes it."""
    folder = arguments.image_folder
    if folder is not None and not folder.is_dir():
        raise NotADirectoryError(f"the image folder {folder} is not a folder: give the folder of the pictures")
    if not arguments.allow_absolute:
        return folder
    from ovisnb.data.media import ImageFolder

    return ImageFolder(folder or Path(), allow_absolute=True)


def _processor(model: str | None) -> Any:
    if model is None:
        return None
    from ovisnb.model.checkpoint import load_processor
    from ovisnb.paths import resolve_model

    return load_processor(resolve_model(model))


def _refused(path: Path, error: Any) -> Any:
    """The report of a file that a RecordError refuses as a whole."""
    from ovisnb.data.checks.faults import Report

    report = Report(str(path))
    kind = "unknown_format" if error.kind == "wrong_form" else error.kind  # which is every error's own until it says
    report.add(kind, error.record_id, None, str(error))
    return report


def _records(count: int) -> str:
    return f"{count:,} {'record' if count == 1 else 'records'}"


def say(text: Any) -> None:
    """Print, also where the terminal cannot show every character."""
    encoding = (sys.stdout and sys.stdout.encoding) or "utf-8"  # no stdout: it was closed, and print() knows that
    with printing():
        print(str(text).encode(encoding, "backslashreplace").decode(encoding), flush=True)


@contextmanager
def printing() -> Iterator[None]:
    """Where something is printed: a reader that has read enough (`| head -1`) ends the command, and is no fault."""
    try:
        yield
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python will try once more at its end
        if error.errno == errno.EPIPE:
            raise SystemExit(128 + signal.SIGPIPE) from None
        raise OSError(error.errno, f"what is printed cannot be written ({error.strerror})") from None
