"""The memory plan against what is then measured: one row a setting, at the real vocabularies.

    python benchmarks/memory_plan.py                      # 512 wide, 4 layers each: minutes on the CPU, 6 GB
    python benchmarks/memory_plan.py --only text bf16
    python benchmarks/memory_plan.py --shape 2B           # on a GPU: torch.cuda.max_memory_allocated

Each row is a process of its own that trains two steps with the Trainer of `ovisnb train`. On the CPU two things are
measured: the bytes of all live tensors at their peak ("tensors": what a GPU's allocator would count, and what is
planned), and by how much the process's resident memory rose ("resident": with what torch and the system take besides,
and without what was freed and given back).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time

import torch
from transformers import Qwen3Config

from ovisnb.chat import Encoded
from ovisnb.model import Ovis2_5Config, Ovis2_5ForConditionalGeneration, Ovis2_5VisionConfig
from ovisnb.train import Settings
from ovisnb.train.arguments import training_arguments
from ovisnb.train.dataset import collate_samples
from ovisnb.train.ledger import Ledger
from ovisnb.train.memory import peak_resident, resident
from ovisnb.train.modules import freeze
from ovisnb.train.plan import memory_plan, size_of
from ovisnb.train.trainer import SftTrainer

SHAPES = {  # hidden, layers, heads, kv heads, ff, tied; vision hidden, layers, ff
    "small": ((512, 4, 4, 2, 1536, True), (256, 4, 1024)),
    "2B": ((2048, 28, 16, 8, 6144, True), (1152, 27, 4304)),
    "9B": ((4096, 36, 32, 8, 12288, False), (1152, 27, 4304)),
}
PICTURE = (28, 28)  # patches of a picture of 448 x 448 pixels
ROWS: dict[str, tuple[dict, list[tuple[int, int]]]] = {  # settings, and (tokens, pictures) of each sample
    "one picture": ({}, [(512, 1)] * 3),
    "text": ({}, [(3000, 0)] * 3),
    "pictures": ({}, [(3000, 12)] * 3),
    "batch of 4": ({"per_device_train_batch_size": 4}, [(700, 1), (500, 1), (300, 0), (900, 2)] * 3),
    "packed": ({"per_device_train_batch_size": 4, "packing": True}, [(700, 1), (500, 1), (300, 0), (900, 2)] * 3),
    "accumulation": ({"gradient_accumulation_steps": 2}, [(2048, 2)] * 6),
    "bf16": ({"bf16": True}, [(2048, 4)] * 3),
    "checkpointing": ({"gradient_checkpointing": True}, [(3000, 12)] * 3),
    "bf16, checkpointing": ({"gradient_checkpointing": True, "bf16": True}, [(3000, 12)] * 3),
    "frozen tower": ({"freeze_vision_tower": True}, [(3000, 12)] * 3),
    "last block, head, vte": (
        {"train_modules": "visual_tokenizer.vit.last_block|visual_tokenizer.head|vte"},
        [(2048, 4)] * 3,
    ),
    "only llm": ({"train_modules": "llm"}, [(3000, 12)] * 3),
    "sgd": ({"optim": "sgd"}, [(2048, 4)] * 3),
    "adafactor": ({"optim": "adafactor"}, [(2048, 4)] * 3),
    "8 bit": ({"optim": "adamw_bnb_8bit"}, [(2048, 4)] * 3),
    "fused": ({"optim": "adamw_torch_fused"}, [(2048, 4)] * 3),
    "lora": ({"use_lora": True}, [(3000, 12)] * 3),
    "lora, bf16": ({"use_lora": True, "bf16": True}, [(3000, 12)] * 3),
    "lora everywhere": ({"use_lora": True, "lora_preset": "all-linear"}, [(3000, 12)] * 3),
}


def shape(name: str) -> Ovis2_5Config:
    (hidden, layers, heads, kv, ff, tied), (side, depth, wide) = SHAPES[name]
    text = Qwen3Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=128,
        intermediate_size=ff,
        vocab_size=151936,
        tie_word_embeddings=tied,
    )
    vision = Ovis2_5VisionConfig(
        hidden_size=side, num_hidden_layers=depth, intermediate_size=wide, num_attention_heads=4 if side < 1000 else 16
    )
    return Ovis2_5Config(text_config=text, vision_config=vision)


def samples_of(sizes: list[tuple[int, int]], config: Ovis2_5Config, pixels: bool) -> list[Encoded]:
    """Random samples of so many tokens and pictures; a quarter of their text is supervised, at least 32 tokens."""
    atom, start, end = config.visual_token_ids[:3]
    rows, columns = PICTURE
    made = []
    for number, (tokens, pictures) in enumerate(sizes):
        picture = [start, *[atom] * (rows * columns // 4), end]
        text = torch.randint(0, 1000, (tokens - len(picture) * pictures,))
        ids = torch.cat([torch.tensor(picture * pictures, dtype=torch.int64), text])
        labels = ids.clone()
        labels[: -max(32, len(text) // 4)] = -100
        grid = torch.tensor([[1, rows, columns]] * pictures) if pictures else None
        values = torch.randn(rows * columns * pictures, 768) if pictures and pixels else None
        made.append(Encoded(str(number), ids, labels, [], values, grid, None, None, 0))
    return made


class Lazily(torch.utils.data.Dataset):
    """Samples with their pixels, made when they are asked for, as a run reads them."""

    def __init__(self, sizes: list[tuple[int, int]], config: Ovis2_5Config):
        self.sizes, self.config = sizes, config

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Encoded:
        return samples_of([self.sizes[index]], self.config, pixels=True)[0]


def measure(settings: Settings, config: Ovis2_5Config, samples: torch.utils.data.Dataset) -> dict[str, int]:
    """Train two steps, and say what they took, in bytes."""
    on_gpu = torch.cuda.is_available()
    before = resident()
    torch.manual_seed(0)
    with torch.device("cuda" if on_gpu else "cpu"):
        model = Ovis2_5ForConditionalGeneration(config)
    if settings.use_lora:
        from ovisnb.train.lora import adapted

        half = torch.bfloat16 if settings.bf16 else torch.float32
        model.config.name_or_path = "benchmark"
        model = adapted(model.to(half), settings)
    else:
        freeze(model, settings)
    trainer = SftTrainer(
        model=model,
        args=training_arguments(settings, evaluates=False),
        processor=None,
        settings=settings,
        data_collator=lambda some: collate_samples(some, packed=settings.packing),
        train_dataset=samples,
    )
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
        return {"measured": torch.cuda.max_memory_allocated()}
    with Ledger(model) as ledger:
        trainer.train()
    return {"measured": ledger.peak, "resident": peak_resident() - before, "parts": dict(ledger.at_peak)}


def one(name: str, which: str, folder: str) -> dict:
    changes, sizes = ROWS[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = Settings.from_dict(
        {
            "output_dir": folder,
            "max_steps": 2,
            "save_strategy": "no",
            "report_to": "none",
            "logging_steps": 10,
            **changes,
        }
    )
    config = shape(which)
    begun = time.perf_counter()
    plan = memory_plan(settings, config, samples_of(sizes, config, pixels=False), device=device)
    took = time.perf_counter() - begun
    found = measure(settings, config, Lazily(sizes, config))
    return {"planned": plan.total, "seconds": took, "plan": dict(plan.parts), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--parts", action="store_true", help="print the parts of both too")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.json:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(one(arguments.only[0], arguments.shape, folder)))
        return
    print(f"{'setting':<24} {'planned':>9} {'measured':>9} {'ratio':>6} {'resident':>9} {'plan took':>9}")
    for name in arguments.only:
        command = [sys.executable, __file__, "--shape", arguments.shape, "--json", "--only", name]
        ended = subprocess.run(command, check=False, capture_output=True, text=True)
        if ended.returncode:
            print(f"{name:<24} failed: {ended.stderr.strip().splitlines()[-1][:120]}")
            continue
        row = json.loads(ended.stdout.splitlines()[-1])
        print(
            f"{name:<24} {size_of(row['planned']):>9} {size_of(row['measured']):>9} "
            f"{row['planned'] / row['measured']:>6.2f} {size_of(row.get('resident', 0)):>9} {row['seconds']:>7.1f} s",
            flush=True,
        )
        if arguments.parts:
            for part in dict.fromkeys([*row["plan"], *row.get("parts", {})]):
                planned, measured = row["plan"].get(part, 0), row.get("parts", {}).get(part, 0)
                print(f"  {part:<22} {size_of(planned):>9} {size_of(measured):>9}")


if __name__ == "__main__":
    main()
