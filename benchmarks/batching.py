"""Batches against batch size 1: the same samples, the same gradients, in one run. Then what planning them saves.

    python benchmarks/batching.py [--samples 32] [--repeats 5] [--planned 2000]

Users of the earlier scripts train at batch size 1 with gradient accumulation, because there pictures of different
sizes cannot be stacked. Here they lie one behind the other. Prints samples/s of both, their ratio, and the counted
work: patches and tokens are the same, padding and forwards differ.

Then the padding of batches in random order, of the same number of samples each, and of those that `plan_batches` fills
(sorted, and shuffled as in training), for the photographs over and over and for a made-up mix of lengths, and the
time that a length takes beside encoding the sample.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch

from ovisnb.chat import collate, encode
from ovisnb.chat.batching import Length, measure, padding, plan_batches
from ovisnb.data import read_records
from ovisnb.model import load
from ovisnb.paths import resolve


def gradients(model, batches, supervised: int) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss over all supervised tokens, accumulated over the batches."""
    model.zero_grad()
    for batch in batches:
        model(**batch, num_items_in_batch=supervised).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def mixed_lengths(count: int) -> list[Length]:
    """Captions, conversations about a picture, grounding with crops, and a few videos."""
    chance = random.Random(0)
    kinds = [(200, 600, 1), (300, 1500, 1), (1000, 4000, 6), (4000, 8000, 16)]
    drawn = chance.choices(kinds, [50, 30, 15, 5], k=count)
    return [Length(chance.randint(least, most), images) for least, most, images in drawn]


def compare_plans(name: str, lengths: list[Length], max_tokens: int) -> None:
    """Print the padding of batches in random order and of planned ones, of the same mean size."""
    plans = {"sorted": plan_batches(lengths, max_tokens=max_tokens)}
    plans["shuffled"] = plan_batches(lengths, max_tokens=max_tokens, seed=0)
    size = max(round(len(lengths) / len(plans["shuffled"])), 1)
    order = random.Random(0).sample(range(len(lengths)), len(lengths))
    plain = padding(lengths, [order[at : at + size] for at in range(0, len(order), size)]).share
    shares = ", ".join(f"{plan} {padding(lengths, batches).share:.1%}" for plan, batches in plans.items())
    print(f"{name}: {len(lengths):,} samples, padding at random, {size} a batch: {plain:.1%}; planned: {shares}")


def compare_lengths(records: list, processor, planned: int, repeats: int) -> None:
    """Print what measuring takes beside encoding, and the padding with and without a plan."""
    ways = {"encode": encode, "measure": measure}
    seconds = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            lengths = [way(record, processor, image_folder=resolve("data/photos")) for record in records]
            seconds[name].append((time.perf_counter() - began) / len(records))
    encoded, measured = (statistics.median(times) for times in seconds.values())
    print(f"a length: {measured * 1e3:.2f} ms, encoding: {encoded * 1e3:.2f} ms, ratio {encoded / measured:.1f}")
    repeated = [lengths[at % len(lengths)] for at in range(planned)]
    compare_plans("photographs", repeated, 16 * max(length.tokens for length in lengths))
    compare_plans("a made-up mix", mixed_lengths(planned), 16_384)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="data/tiny-ovis")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--planned", type=int, default=2000, help="samples of a plan")
    options = parser.parse_args()

    model, processor = load(resolve(options.model), dtype=torch.float32)
    photos = list(read_records(resolve("data/photos/photos.json")))
    records = [photos[i % len(photos)] for i in range(options.samples)]
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
    print(f"ratio {first / second:.2f}\n")
    compare_lengths(photos, processor, options.planned, options.repeats)


if __name__ == "__main__":
    main()
