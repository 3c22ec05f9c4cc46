"""How long a person waits for a data file, and how much memory it takes, whatever its size.

    python benchmarks/opening.py [--lines 10000 100000 1000000] [--folder FOLDER]

Writes JSON-lines files of generated records (and the same records as one JSON list) and opens them in every way
there is, each in a process of its own: seconds to the first record, records a second (all of them; of
`LocalRecords` also 10,000 at random), the peak of the process's memory, and how much of it is `own`: not a mapped
file's, which is given back when others need it (Linux only), less what importing alone takes. Ratios are to
`json.load` in the same run.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ovisnb.data.formats import read_records
from ovisnb.data.local import LocalRecords
from ovisnb.data.spread import spread
from ovisnb.data.stream import RecordStream

WORDS = (
    "the",
    "a",
    "cat",
    "dog",
    "sees",
    "box",
    "point",
    "what",
    "is",
    "this",
    "red",
    "blue",
    "person",
    "left",
    "table",
)
SAMPLE = 200
AT_RANDOM = 10_000


def write(path: Path, lines: int) -> None:
    """A question and an answer about one of a thousand pictures a line, about 330 bytes each."""
    chance = random.Random(0)
    with path.open("w") as file, path.with_suffix(".json").open("w") as whole:
        for number in range(lines):
            asked, answered = (" ".join(chance.choices(WORDS, k=chance.randint(*k))) for k in ((5, 15), (10, 50)))
            turns = [{"from": "human", "value": f"<image>\n{asked}?"}, {"from": "gpt", "value": answered}]
            record = {"id": f"r{number}", "image": f"images/{number % 1000:06}.jpg", "conversations": turns}
            line = json.dumps(record)
            file.write(line + "\n")
            whole.write(("[" if number == 0 else ",\n") + line)
        whole.write("]")


def load_json(path: Path) -> Iterator[dict]:
    with path.with_suffix(".json").open() as file:
        yield from json.load(file)


def at_random(path: Path) -> Iterator:
    """Records of a table that is there already, in random order."""
    records = LocalRecords(path, cache_folder=path.parent / "cache")
    chance = random.Random(0)
    for _ in range(min(AT_RANDOM, len(records))):
        yield records[chance.randrange(len(records))]


def stream(path: Path) -> Iterator:
    return iter(RecordStream(path))


WAYS = {
    "json.load of a list": load_json,
    "read_records": read_records,
    f"spread, {SAMPLE} of them": lambda path: spread(path, SAMPLE),
    "LocalRecords, first time": lambda path: iter(LocalRecords(path, cache_folder=path.parent / "cache")),
    "LocalRecords, again": lambda path: iter(LocalRecords(path, cache_folder=path.parent / "cache")),
    "LocalRecords, at random": at_random,
    "RecordStream": stream,
}


def measure(way: str, path: Path) -> dict[str, float]:
    """What one way takes in this process."""
    import datasets  # its second is not the file's, nor that of torch, which its streams import

    if way == "RecordStream":
        datasets.IterableDataset.from_generator(iter, gen_kwargs={})

    imports = own_memory()
    began = time.perf_counter()
    records = WAYS[way](path)
    next(records)
    first = time.perf_counter() - began
    own, count = own_memory(), 1
    for count, _ in enumerate(records, start=2):
        if count % 10_000 == 0:
            own = max(own, own_memory())
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"first": first, "seconds": seconds, "count": count, "peak": peak, "own": max(own - imports, 0.0)}


def own_memory() -> float:
    """MB of this process that are no file's; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, help="where the files are written (default: a temporary folder)")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FILE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure[0], Path(given.measure[1]))))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        for lines in given.lines:
            path = Path(folder) / f"{lines}.jsonl"
            write(path, lines)
            print(f"\n{lines:,} lines, {path.stat().st_size / 1e6:.1f} MB")
            print(f"{'':<26}{'first record':>14}{'all':>10}{'records/s':>12}{'peak MB':>9}{'own MB':>9}")
            whole = None
            for way in WAYS:
                command = [sys.executable, __file__, "--measure", way, str(path)]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                whole = whole or found
                print(
                    f"{way:<26}{found['first']:>12.4f} s{found['seconds']:>8.2f} s"
                    f"{found['count'] / found['seconds']:>12,.0f}{found['peak']:>9.0f}{found['own']:>9.1f}"
                    f"   first {found['first'] / whole['first']:.3f}x, memory {found['peak'] / whole['peak']:.2f}x",
                    flush=True,
                )


if __name__ == "__main__":
    main()
