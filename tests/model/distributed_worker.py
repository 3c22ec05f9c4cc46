"""One of two processes that train the golden checkpoint together: torchrun distributed_worker.py ddp|zero3|fsdp FOLDER.

Writes FOLDER/rank.json (what it ran under) and FOLDER/rank.safetensors (the gradient of every step's parameters,
"step/name", and what a batch evaluates to after them).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ovisnb.chat import collate, encode
from ovisnb.model import load, loss

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "ovis2_5"
# What each rank sees. A rank with pictures and a video must not run the vision tower once more than the other.
STEPS = (("pictures", "text"), ("text", "pictures"), ("text", "text"), ("both", "text"))
LEARNING_RATE = 0.01
ZERO3 = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},  # every parameter is cut up
    "zero_allow_untested_optimizer": True,  # plain SGD
    "gradient_clipping": 0.0,  # DeepSpeed clips to 1 unless told otherwise
}


def samples(processor) -> list[list]:
    """The encoded samples of every step: [step][rank] -> two samples, no two of one length."""
    red, blue = (Image.new("RGB", size, colour) for size, colour in (((96, 64), "red"), ((64, 128), "blue")))

    def encoded(kind: str, number: int) -> list:
        answer = " and".join([" well"] * (number + 1))
        turns = [
            [{"from": "human", "value": "<image>Which colour?"}, {"from": "gpt", "value": f"red{answer}"}],
            [
                {"from": "human", "value": "<image>\n<image>\nAnd these?"},
                {"from": "gpt", "value": f"red, blue{answer}"},
            ],
        ]
        images = [[red], [blue, red]]
        video = [red, red] if kind == "both" else None
        if video:
            turns[0][0] = {"from": "human", "value": "<video>What changes?"}
            images[0] = []
        records = []
        for conversation, pictures in zip(turns, images, strict=True):
            if kind == "text":
                conversation = [{**turn, "value": turn["value"].replace("<image>", "")} for turn in conversation]
                pictures = []
            record = {"id": f"{kind}{number}", "image": pictures, "conversations": conversation}
            if video and not pictures:
                record["video"] = video
            records.append(record)
        return [encode(record, processor, min_pixels=32 * 32, max_pixels=128 * 128) for record in records]

    return [[encoded(kind, 2 * step + rank) for rank, kind in enumerate(kinds)] for step, kinds in enumerate(STEPS)]


def supervised(encoded: list) -> int:
    """Number of tokens that carry loss."""
    return sum(int((sample.labels[1:] != -100).sum()) for sample in encoded)


def whole(grad: torch.Tensor | None) -> torch.Tensor | None:
    """A gradient of which FSDP gave each rank a part."""
    return grad.full_tensor() if isinstance(grad, distributed.tensor.DTensor) else grad


def main(kind: str, folder: Path) -> None:
    loss.CHUNK_BYTES = 8 * 2**10  # several chunks of unlike numbers on the two ranks
    if kind == "zero3":
        import deepspeed
        from deepspeed.utils import safe_get_full_grad
        from transformers.integrations import HfDeepSpeedConfig

        deepspeed.init_distributed(dist_backend="gloo")
        cut = HfDeepSpeedConfig(ZERO3)  # while it lives, load makes and fills the model in pieces
    else:
        distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()

    model, processor = load(GOLDEN / "checkpoint", dtype=torch.float32)
    model.train()
    if kind == "zero3":
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        wrapped, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=cut.config)
        stage = wrapped.zero_optimization_stage()
    elif kind == "fsdp":
        mesh = distributed.device_mesh.init_device_mesh("cpu", (world,))
        vision = model.model.vision_tower
        units = [*vision.transformer.encoder.layers, *model.model.language_model.layers]
        # the head and the table too: the number of their calls must not follow the number of a rank's visual tokens
        for unit in (*units, vision.head_linear, model.model.visual_embeddings_table, model):
            wrapped = fully_shard(unit, mesh=mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        stage = None
    else:
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        stage = None

    written = {}
    batches = samples(processor)
    for step, per_rank in enumerate(batches):
        batch = collate(per_rank[rank])
        # the mean over both ranks' tokens, as Trainer makes it: both wrappers average the ranks' gradients
        tokens = sum(supervised(encoded) for encoded in per_rank)
        mean = wrapped(**batch, num_items_in_batch=tokens, use_cache=False).loss * world
        if kind == "zero3":
            wrapped.backward(mean)
            grads = {name: safe_get_full_grad(p) for name, p in model.named_parameters()}
            wrapped.step()
        else:
            mean.backward()
            grads = {name: whole(p.grad) for name, p in model.named_parameters()}
            optimizer.step()
            optimizer.zero_grad()
        written |= {f"{step}/{name}": grad.detach().clone() for name, grad in grads.items() if grad is not None}

    wrapped.eval()
    with torch.no_grad():
        written["evaluated"] = wrapped(**collate(batches[0][rank]), use_cache=False).loss
    save_file(written, folder / f"{rank}.safetensors")
    seen = {"world_size": world, "wrapper": type(wrapped).__name__, "stage": stage}
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(sys.argv[1], Path(sys.argv[2]))
