"""One of two processes that train on a stream together: torchrun stream_worker.py SETTINGS.json FOLDER.

Trains once to the end and once with a stop at step 2, and writes FOLDER/rank.json: the ids of the records that
this process trained on in either, and what it ran under.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed
from transformers import TrainerCallback

from ovisnb.train import Settings, run_sft, stream


@dataclass
class StopAt(TrainerCallback):
    step: int

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def main(settings: Settings, folder: Path) -> None:
    seen, collate = [], stream.collate_samples
    stream.collate_samples = lambda samples, **how: (
        seen.extend(sample.id for sample in samples) or collate(samples, **how)
    )
    runs = {}
    for name, stops in (("whole", []), ("stopped", [StopAt(2)]), ("stopped", [])):
        run_sft(settings.model_copy(update={"output_dir": str(folder / name)}), callbacks=stops)
        distributed.barrier()
        runs[name] = runs.get(name, []) + seen
        seen.clear()
    rank = distributed.get_rank()
    (folder / f"{rank}.json").write_text(json.dumps({**runs, "world": distributed.get_world_size()}))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(Settings.from_json(sys.argv[1]), Path(sys.argv[2]))
