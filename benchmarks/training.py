"""Batch size 1, gradient accumulation and whole logits, as users of the earlier scripts train, against a packed batch.

    python benchmarks/training.py                      # both parts below, on the CPU
    python benchmarks/training.py --part speed --samples 8 --repeats 7
    python benchmarks/training.py --part memory --tokens 4096 --supervised 0.5 --checkpointing
    python benchmarks/training.py --part gpu --shape 9b --lora     # on a CUDA device

Both ways take the same samples to the same gradients, which is checked and printed.

speed: the tiny checkpoint on scenes of the shapes world and on the photographs. The ways take turns; printed are
tokens/s of both (median and range) and the median of the ratios within each turn. Encoding is not in it.

memory: real vocabularies (151,936 words, 65,536 visual words) over a small body. Each way runs in a process of its
own: peak memory beyond what the process held before the first step, that is beyond weights, and tokens/s.

gpu: random weights of the released shapes in bfloat16, on one CUDA device: tokens/s, peak memory, and the share of the
card's peak arithmetic (6 operations a weight and token that trains, 4 where only adapters do, attention on top).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from ovisnb.chat import collate, encode
from ovisnb.data import read_records, shapes
from ovisnb.model import Ovis2_5Config, Ovis2_5ForConditionalGeneration, load
from ovisnb.paths import resolve

Step = Callable[[], None]
# Dense bfloat16 operations a second, from the makers' data sheets.
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
SHAPES = {
    "2b": {"hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 6144},
    "9b": {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 12288},
}


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference of any gradient, as a share of that gradient's norm."""
    assert ours.keys() == theirs.keys(), "the two ways gave gradients to different parameters"
    norms = {name: max(float(grad.norm()), 1e-12) for name, grad in theirs.items()}
    return max(float((ours[name] - grad).norm()) / norms[name] for name, grad in theirs.items())


def one_by_one(model, samples: list, **options) -> None:
    """The gradients of a step as the earlier scripts take them: a forward a sample, logits of every token."""
    supervised = sum(int((sample.labels[1:] != -100).sum()) for sample in samples)
    for sample in samples:
        model(**collate([sample]), num_items_in_batch=supervised, skip_logits=False, **options).loss.backward()


def packed(model, samples: list, **options) -> None:
    """The same gradients from one forward over all samples in a row."""
    model(**collate(samples, packed=True), **options).loss.backward()


def speed(options: argparse.Namespace) -> None:
    """Print tokens/s of both ways on the tiny checkpoint."""
    model, processor = load(resolve("data/tiny-ovis"), dtype="float32")
    model.train()
    scenes = [encode(record, processor) for record in shapes.records("train", seed=0, count=options.samples)]
    photos = [
        encode(record, processor, image_folder=resolve("data/photos"), max_pixels=128 * 128)
        for record in list(read_records(resolve("data/photos/photos.json")))[: options.samples]
    ]
    for name, samples in (("scenes", scenes), ("photographs", photos)):
        tokens = sum(len(sample) for sample in samples)
        found = {}
        for way in (one_by_one, packed):
            model.zero_grad()
            way(model, samples)
            found[way] = gradients(model)
        times: dict[Callable, list[float]] = {one_by_one: [], packed: []}
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)  # a whole step, without leaving these weights
        for _ in range(options.repeats):
            for way, seconds in times.items():
                began = time.perf_counter()
                way(model, samples)
                optimizer.step()
                optimizer.zero_grad()
                seconds.append(time.perf_counter() - began)
        print(f"{name}: {len(samples)} samples, {tokens} tokens; gradients differ by {difference(*found.values()):.1e}")
        for way, seconds in times.items():
            rates = sorted(tokens / second for second in seconds)
            middle = statistics.median(rates)
            print(f"  {way.__name__:11} {middle:8,.0f} tokens/s ({rates[0]:,.0f} to {rates[-1]:,.0f})")
        ratios = [old / new for old, new in zip(*times.values(), strict=True)]
        print(f"  ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def made_sample(config, tokens: int, supervised: float, seed: int, side: int = 28):
    """A sample of random tokens behind one picture of side x side patches, with a share of supervised tokens."""
    from ovisnb.chat.encode import Encoded

    chance = torch.Generator().manual_seed(seed)
    atoms = [config.image_token_id] * (side // config.vision_config.hidden_stride) ** 2
    text = torch.randint(0, 1000, (tokens - len(atoms) - 2,), generator=chance)
    picture = torch.tensor([config.image_start_token_id, *atoms, config.image_end_token_id])
    ids = torch.cat([picture, text])
    labels = ids.clone()
    labels[: tokens - round(supervised * tokens)] = -100
    labels[: len(picture)] = -100
    depth = config.vision_config.num_channels * config.vision_config.patch_size**2
    pixels = torch.randn(side * side, depth, generator=chance)
    grid = torch.tensor([[1, side, side]])
    return Encoded(str(seed), ids, labels, [], pixels, grid, None, None, 0)


def shaped_config(text: dict, vision: dict) -> Ovis2_5Config:
    """A config with the released vocabularies."""
    text = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "model_type": "qwen3"} | text
    return Ovis2_5Config(text_config=text, vision_config=vision, visual_vocab_size=65536)


def memory_of(way: Callable, options: argparse.Namespace) -> None:
    """Run one way in this process, and print as JSON its peak and its speed."""
    torch.manual_seed(0)
    text = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"head_dim": 64, "intermediate_size": 768, "tie_word_embeddings": True}
    vision = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Ovis2_5ForConditionalGeneration(shaped_config(text, vision)).train()
    if options.checkpointing and way is packed:
        model.gradient_checkpointing_enable()
    samples = [
        made_sample(model.config, options.tokens, options.supervised, seed) for seed in range(options.memory_samples)
    ]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # they are there in every step but the first
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    if way is packed:  # one forward a sample: the same tokens at a time
        supervised = sum(int((sample.labels[1:] != -100).sum()) for sample in samples)
        for sample in samples:
            packed(model, [sample], num_items_in_batch=supervised)
    else:
        way(model, samples)
    seconds = time.perf_counter() - began
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    norms = {name: float(grad.norm()) for name, grad in gradients(model).items()}
    report = {"peak": peak, "weights": weights, "tokens_per_second": options.tokens * len(samples) / seconds}
    print(json.dumps(report | {"norms": norms}))


def memory(options: argparse.Namespace) -> None:
    """Print the peak memory of both ways at the real vocabularies, each in a process of its own."""
    reports = {}
    for way in (one_by_one, packed):
        words = [*sys.argv[1:], "--part", "memory", "--way", way.__name__]
        child = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
        reports[way] = json.loads(child.stdout.splitlines()[-1])
    old, new = reports.values()
    worst = max(abs(new["norms"][name] / norm - 1) for name, norm in old["norms"].items() if norm > 1e-12)
    share = f"{options.supervised:.0%} of them supervised"
    print(f"real vocabularies, {options.memory_samples} samples of {options.tokens:,} tokens, {share}")
    print(f"  weights and as much of gradients: {old['weights'] / 2**30:.2f} GiB each, in both ways")
    for way, report in reports.items():
        peak, rate = report["peak"] / 2**30, report["tokens_per_second"]
        print(f"  {way.__name__:11} peak {peak:6.2f} GiB beyond those  {rate:8,.0f} tokens/s")
    whole = [report["peak"] + 2 * report["weights"] for report in (old, new)]
    print(f"  ratio {old['peak'] / new['peak']:.2f}, with weights and gradients {whole[0] / whole[1]:.2f}")
    print(f"  norms of gradients differ by at most {worst:.1e}")


def gpu(options: argparse.Namespace) -> None:
    """Print tokens/s, memory and the share of the card's peak, for a released shape with random weights."""
    if not torch.cuda.is_available():
        sys.exit("--part gpu needs a CUDA device")
    card = torch.cuda.get_device_name()
    torch.manual_seed(0)
    text = {**SHAPES[options.shape], "tie_word_embeddings": options.shape == "2b", "max_position_embeddings": 40960}
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = Ovis2_5ForConditionalGeneration(shaped_config(text, {})).train()
        torch.set_default_dtype(torch.float32)
    if options.lora:
        from peft import LoraConfig, get_peft_model

        targets = r"model\.language_model\..*\.(q|k|v|o|gate|up|down)_proj"
        model = get_peft_model(model, LoraConfig(r=32, lora_alpha=64, target_modules=targets))
    if options.checkpointing:
        model.gradient_checkpointing_enable()
        if options.lora:
            model.enable_input_require_grads()
    config = model.config
    samples = [made_sample(config, options.tokens, options.supervised, seed, side=64) for seed in range(2)]
    batch = {
        key: value.cuda() if torch.is_tensor(value) else value for key, value in collate(samples, packed=True).items()
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(options.repeats):
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    second, tokens = statistics.median(seconds), options.tokens * len(samples)
    done = operations(model, config, samples, full=not options.lora) / second
    peak = next((value for name, value in PEAK.items() if name in card), None)
    share = f"{done / peak:.0%} of its peak" if peak else "peak of this card not known"
    print(
        f"{card}: {options.shape} shape, {'LoRA' if options.lora else 'all trained'}, {len(samples)} x {options.tokens} "
        f"tokens a step: {tokens / second:,.0f} tokens/s, {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, "
        f"{done / 1e12:.0f} Tflop/s, {share}"
    )


def operations(model, config, samples: list, full: bool) -> float:
    """Operations of a step that have to be done: recomputed ones do not count (PaLM, appendix B)."""
    text, vision = config.text_config, config.vision_config
    tokens = sum(len(sample) for sample in samples)
    patches = sum(len(sample.pixel_values) for sample in samples)
    size = {part: 0 for part in ("language_model", "vision_tower.transformer", "vision_tower.head", "lora_", "other")}
    for name, parameter in model.named_parameters():
        part = next((part for part in reversed(size) if part in name), "other")
        size[part] += 0 if "embed" in name and "lora_" not in name else parameter.numel()
    head = text.vocab_size * text.hidden_size * sum(int((sample.labels != -100).sum()) for sample in samples)
    per = 3 if full else 2  # forward, gradients of activations, gradients of weights
    attention = (
        sum(2 * len(s) ** 2 for s in samples) * text.num_hidden_layers * text.num_attention_heads * text.head_dim
    )
    language = 2 * tokens * (per * size["language_model"] + 3 * size["lora_"]) + 2 * per * head + 3 * attention
    seen = 2 * patches * size["vision_tower.transformer"] + 2 * patches // 4 * size["vision_tower.head"]
    seen += 2 * patches // 4 * config.visual_vocab_size * config.hidden_size
    seen += sum(4 * len(s.pixel_values) ** 2 for s in samples) * vision.num_hidden_layers * vision.hidden_size
    return language + (3 if full else 1) * seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("speed", "memory", "gpu"))
    parser.add_argument("--samples", type=int, default=8, help="samples of a step (speed)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=4096, help="of a sample (memory, gpu)")
    parser.add_argument("--supervised", type=float, default=1.0, help="share of the tokens with loss (memory, gpu)")
    parser.add_argument("--memory_samples", type=int, default=1, help="samples of a step (memory)")
    parser.add_argument("--checkpointing", action="store_true", help="our way with gradient checkpointing")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="2b")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--way", choices=("one_by_one", "packed"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        memory_of({"one_by_one": one_by_one, "packed": packed}[options.way], options)
    else:
        for part in (
            (speed, memory) if options.part is None else ({"speed": speed, "memory": memory, "gpu": gpu}[options.part],)
        ):
            part(options)


if __name__ == "__main__":
    main()
