"""One of two processes that train together: torchrun distributed_worker.py FOLDER.

Runs every case of FOLDER/cases.json (name -> settings) one after another; a case whose name ends in "-stopped" stops
at step 2, and one ending in "-resumed" goes on in its folder. Writes FOLDER/rank.json: world size and wrapper of each.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch import distributed
from transformers import TrainerCallback

from ovisnb.train import Settings, run_sft
from ovisnb.train import distributed as ours
from ovisnb.train.distributed import member


class StopAt(TrainerCallback):
    """Stop as a killed run would: after the checkpoint of this step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def main(folder: Path) -> None:
    seen = {}
    check = ours.check_wrapper

    def noted(trainer, settings):
        told = check(trainer, settings)
        seen[name] = [distributed.get_world_size(), type(trainer.model_wrapped).__name__, told]
        return told

    ours.check_wrapper = noted
    for name, values in json.loads((folder / "cases.json").read_text()).items():
        run_sft(Settings.from_dict(values), callbacks=[StopAt(2)] if name.endswith("-stopped") else [])
        distributed.barrier()
        AcceleratorState._reset_state(reset_partial_state=True)  # another stage needs another state
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with member():
        main(Path(sys.argv[1]))
