"""Batches against batch size 1: the same samples, the same gradients, in one run.

    python benchmarks/batching.py [--samples 32] [--repeats 5]

Users of the earlier scripts train at batch size 1 with gradient accumulation, because there pictures of different
sizes cannot be stacked. Here they lie one behind the other. Prints samples/s of both, their ratio, and the counted
work: patches and tokens are the same, padding and forwards differ.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from ovisnb.chat import collate, encode
from ovisnb.data import read_records
from ovisnb.model import load
from ovisnb.paths import resolve


def gradients(model, batches, supervised: int) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss over all supervised tokens, accumulated over the batches."""
    model.zero_grad()
    for batch in batches:
        model(**batch, num_items_in_batch=supervised).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="data/tiny-ovis")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    model, processor = load(resolve(options.model), dtype=torch.float32)
    records = list(read_records(resolve("data/photos/photos.json")))
    records = [records[i % len(records)] for i in range(options.samples)]
    samples = [
        encode(
            record,
            processor,
            image_folder=resolve("data/photos"),
            min_pixels=32 * 32,
            max_pixels=(48 + 16 * i % 97) ** 2,
        )
        for i, record in enumerate(records)
    ]
    model.train()
    # the loss of a token is that of its successor, so the first label of a row never counts
    supervised = sum(int((sample.labels[1:] != -100).sum()) for sample in samples)
    plans = {"batch size 1": [collate([s]) for s in samples], f"batch size {len(samples)}": [collate(samples)]}

    made = {name: gradients(model, batches, supervised) for name, batches in plans.items()}
    one, many = made.values()
    worst = max(((one[n] - many[n]).norm() / one[n].norm().clamp(min=1e-8)).item() for n in one)
    seconds = {name: [] for name in plans}
    for _ in range(options.repeats):
        for name, batches in plans.items():
            began = time.perf_counter()
            gradients(model, batches, supervised)
            seconds[name].append(time.perf_counter() - began)

    print(
        f"{len(samples)} samples, {torch.get_num_threads()} thread(s), largest relative difference of a gradient {worst:.1e}"
    )
    for name, batches in plans.items():
        padded = sum(batch["input_ids"].numel() for batch in batches)
        real = sum(int(batch["attention_mask"].sum()) for batch in batches)
        median, spread = statistics.median(seconds[name]), statistics.pstdev(seconds[name])
        print(
            f"{name:>14}: {len(samples) / median:7.1f} samples/s (median of {options.repeats}, spread {spread / median:.0%}), "
            f"{len(batches)} forwards, {real} tokens, {padded - real} of padding"
        )
    first, second = (statistics.median(times) for times in seconds.values())
    print(f"ratio {first / second:.2f}")


if __name__ == "__main__":
    main()
