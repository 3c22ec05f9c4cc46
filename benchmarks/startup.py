"""How long a person waits for the package and for the command line.

    python benchmarks/startup.py [--repeats 7]

Prints the median wall time of `import ovisnb` and of `ovisnb --help` over that of a bare interpreter, and which heavy
packages they load (none).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

HEAVY = ("torch", "transformers", "numpy", "pydantic", "matplotlib", "PIL")


def median_seconds(words: list[str], repeats: int) -> float:
    """Median wall time of a command."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        subprocess.run(words, check=True, capture_output=True)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import ovisnb": [sys.executable, "-c", "import ovisnb"],
        "ovisnb --help": [sys.executable, "-m", "ovisnb.cli", "--help"],
    }
    for name, words in commands.items():
        print(f"{name:>15}: {median_seconds(words, repeats):.3f} s (median of {repeats})")
    program = f"import sys, ovisnb.cli; print([name for name in {HEAVY} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    print(f"heavy packages loaded: {loaded.strip()}")


if __name__ == "__main__":
    main()
