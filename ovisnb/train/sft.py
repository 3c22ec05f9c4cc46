"""Supervised fine-tuning through transformers' Trainer, one run folder a run.

    run_sft(Settings.from_json("sft.json"))

The run folder (output_dir) then holds
    settings.json    the settings, ready for Settings.from_json
    metrics.jsonl    one line a log: step, epoch, loss, learning_rate, grad_norm, samples_seen, tokens_seen,
                     supervised_tokens, seconds (all four since the run began), with on_bad_record "skip" also
                     skipped (records left out so far), or step, epoch, eval_loss, and best where none was lower
    tensorboard/     the same for tensorboard
    checkpoint-N/    model, processor and optimizer: ovisnb.load opens it, and a stopped run continues from it, if
                     its complete.json is there: it is written last and names all files
    final/           the trained model in the native layout, of stages 1 and 2 as pytorch_model.bin; it appears whole
                     or not at all
    final.json       the step whose weights final/ holds; not there while a run trains on past it
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PrinterCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ovisnb.data.files import write_json
from ovisnb.data.stream import RecordStream
from ovisnb.model import load, save
from ovisnb.model.checkpoint import no_bars
from ovisnb.train.arguments import training_arguments
from ovisnb.train.callbacks import MetricsFile, ProgressLines
from ovisnb.train.checkpoints import bytes_of, last_checkpoint, step_of, told_when_full
from ovisnb.train.checks import parse_modules
from ovisnb.train.dataset import Encoder, collate_samples, encoded_dataset, notes_of, open_records
from ovisnb.train.distributed import CleanStop, check_free, held, whole_weights, words_of_its_own
from ovisnb.train.launch import LAUNCHED
from ovisnb.train.lora import LORA_SHAPE, adapted, load_weights, trained_shares
from ovisnb.train.memory import plan_run
from ovisnb.train.modules import freeze
from ovisnb.train.settings import Settings, SettingsError
from ovisnb.train.start import starting_model
from ovisnb.train.stopping import best_in, best_of, stopped_early, stopping
from ovisnb.train.stream import PLACES, EpochOfStream, Places, StreamSamples
from ovisnb.train.trainer import COUNT, SftTrainer, count_of

FINAL = "final.json"
# they shape the optimizer's state
OPTIMIZER_SETTINGS = {"train_modules", "freeze_llm", "freeze_vision_tower", "optim", *LORA_SHAPE}


@words_of_its_own()
def run_sft(
    settings: Settings,
    *,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    model: nn.Module | None = None,
    processor: Any = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Train as the settings say and return the run folder.

    train_dataset and eval_dataset are collections of Records (or dicts in the data format) in place of data_path
    and eval_data_path: a list, anything with __len__ and __getitem__, a RecordStream (each process trains on its
    part of it) or any iterable (then max_steps is needed). model and processor come together, in place of model_path.

    A stopped run continues from its latest complete checkpoint; on the CPU, with indexable data or a RecordStream,
    it ends in the same weights, bit for bit, as one that was never stopped.

    Raises SettingsError for settings that cannot work, RecordEncodingError for a record that cannot be encoded (or
    BadDataError when on_bad_record leaves out most of them), FloatingPointError when a loss or gradient is no number,
    before it changes the weights, and WriteError for a full disk: the last complete checkpoint is kept.
    """
    folder = Path(settings.output_dir)
    if not settings.resume and folder.exists() and any(path.name not in LAUNCHED for path in folder.iterdir()):
        raise SettingsError(f"{folder} is not empty and resume is false: choose another output_dir, or resume.")
    if settings.image_folder is not None and not Path(settings.image_folder).is_dir():
        raise SettingsError(f"image_folder {settings.image_folder} is not a folder: give the folder of the pictures.")
    records, eval_records = _records(settings, train_dataset, eval_dataset)
    if not hasattr(records, "__len__") and settings.max_steps < 1:
        raise SettingsError("The training data is a stream without a length: give max_steps.")
    streams = isinstance(records, RecordStream)
    if (model is None) != (processor is None):
        raise SettingsError("model and processor come together: pass both or neither.")
    named = settings.model_path or settings.llm_name_or_path
    if (model is None) == (named is None):
        raise SettingsError("Give the model to start from, either as model_path or as model and processor.")
    if settings.dataloader_num_workers:
        # workers are forked, and tokenizers' threads do not survive that
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = training_arguments(settings, evaluates=eval_records is not None)
    if not arguments.deepspeed:
        unset_hf_deepspeed_config()  # of an earlier run of this process: the model would be loaded in ZeRO-3's parts
    checkpoint = last_checkpoint(folder, tell=print if arguments.process_index == 0 else None)
    if model is None:
        with no_bars():
            model, processor = starting_model(settings, checkpoint, arguments)
    if isinstance(model, PeftModel):
        raise SettingsError(
            "The model to start from is an adapter over its base: merge it with ovisnb merge, or start from the base."
        )
    if settings.use_lora:
        model = adapted(model, settings)
        trained = {part: count for part, (count, _) in trained_shares(model).items()}
    else:
        trained = freeze(model, settings)

    changes = _changes(folder / "settings.json", settings) if checkpoint else {}
    for name in OPTIMIZER_SETTINGS & changes.keys():  # read by every process before the first one writes
        if name == "train_modules" and len({tuple(_moving(words)) for words in changes[name]}) == 1:
            continue  # the same parts at other rates
        raise SettingsError(
            f"{name} was {changes[name][0]!r} in the run in {folder} and is {changes[name][1]!r} now, which its "
            "optimizer's state does not fit: choose another output_dir, or the earlier value."
        )
    places = Places(settings.dataloader_num_workers) if streams else None
    if checkpoint and streams:
        places.load(checkpoint, arguments)
    elif checkpoint and (checkpoint / PLACES).exists():
        raise SettingsError(f"{checkpoint} was trained on a stream: choose another output_dir, or streaming.")
    if arguments.process_index == 0:
        folder.mkdir(parents=True, exist_ok=True)
        check_free(folder)
        if changes:
            told = ", ".join(f"{name} {before} -> {now}" for name, (before, now) in changes.items())
            print(f"settings changed since then: {told}")
        if checkpoint and (now := count_of(records)) != (then := _count_then(checkpoint, now)):
            print(
                f"the training data held {then:,} records then and holds {now:,} now: its order is another, and some "
                "may come again before this epoch ends"
            )
        write_json(settings.to_dict(), folder / "settings.json")
        for note in notes_of(records):
            print(note)
        print("training " + ", ".join(f"{part} {count / 1e6:.2f}M" for part, count in trained.items() if count))
        print(f"run folder {folder}" + (f", continuing from {checkpoint.name}" if checkpoint else ""), flush=True)

    encoder = Encoder(processor, settings)
    if streams:
        arguments.ignore_data_skip = True  # the streams continue by themselves
        part = records.shard(arguments.process_index, arguments.world_size)
        samples = StreamSamples(part, encoder, places)
    else:
        samples = encoded_dataset(records, encoder)
    world = arguments.world_size
    at_once = world * arguments.per_device_eval_batch_size if world > 1 else 1
    trainer = _trainer_class(settings)(
        model=model,
        args=arguments,
        processor=processor,
        settings=settings,
        data_collator=partial(collate_samples, packed=settings.packing),
        train_dataset=samples,
        eval_dataset=None if eval_records is None else encoded_dataset(eval_records, encoder, at_once),
        callbacks=[
            MetricsFile(folder / "metrics.jsonl"),
            ProgressLines(),
            *stopping(settings),
            *([EpochOfStream(places)] if streams else []),
            *_tensorboard(settings, checkpoint),
            *callbacks,
        ],
    )
    trainer.remove_callback(PrinterCallback)
    if checkpoint and (step_of(checkpoint) >= trainer.planned_steps() or stopped_early(checkpoint, settings)):
        # Trainer would take one step more
        print(f"{checkpoint.name} is the end of this run: nothing is left to train", flush=True)
        best = best_of(checkpoint) if settings.load_best_model_at_end else None
        finished = best.checkpoint if best else checkpoint
        step = step_of(finished)
        if (folder / "final").exists() and _final_step(folder) == step:
            return folder
        unset_hf_deepspeed_config()  # the weights whole, not in ZeRO-3's parts
        if settings.use_lora:
            load_weights(trainer.model, finished)
        else:
            trainer.model, _ = load(finished)
    else:
        stop = CleanStop(trainer, settings)
        trainer.add_callback(stop)
        plan_run(trainer, records, encoder)
        with no_bars(), held(folder), stop.watching(), told_when_full(folder, folder):
            if arguments.process_index == 0:
                (folder / FINAL).unlink(missing_ok=True)  # from now on final/ is of an earlier end
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        stop.raise_if_stopped()
        best = best_in(trainer.state) if settings.load_best_model_at_end else None
        step = step_of(best.checkpoint) if best else trainer.state.global_step
    with whole_weights(trainer) as trained_model:
        if trainer.is_world_process_zero():
            final = folder / "final"
            for part in folder.glob(f".{final.name}-*"):  # of a run that was killed while it wrote it
                shutil.rmtree(part, ignore_errors=True)
            with no_bars(), told_when_full(final, folder, takes=bytes_of(trained_model)):
                save(trained_model, processor, final, safe=settings.stage not in (1, 2))
                write_json({"step": step}, folder / FINAL)
            print(f"saved {final}" + (f": {best}" if best else ""), flush=True)
    return folder


def _trainer_class(settings: Settings) -> type[SftTrainer]:
    if settings.trainer == "transformers":
        return SftTrainer
    from ovisnb.train.trl_trainer import TrlSftTrainer  # TRL's trainer takes seconds to import

    return TrlSftTrainer


def _changes(file: Path, settings: Settings) -> dict[str, tuple[Any, Any]]:
    """(before, now) of the settings that differ from those of the run that is continued."""
    if not _is_json(file):
        return {}
    before = json.loads(file.read_text(encoding="utf-8"))
    pairs = {name: (before[name], now) for name, now in settings.to_dict().items() if name in before}
    return {name: (then, now) for name, (then, now) in pairs.items() if then != now}


def _moving(modules: str | None) -> list[str]:
    """The names in train_modules whose rate is not 0."""
    return [name for name, rate in parse_modules(modules or "all").items() if rate != 0]


def _count_then(checkpoint: Path, now: int | None) -> int | None:
    """The number that was written into a checkpoint; `now` where none was."""
    then = json.loads((checkpoint / COUNT).read_text(encoding="utf-8")) if _is_json(checkpoint / COUNT) else None
    return now if now is None or then is None else then


def _final_step(folder: Path) -> int | None:
    """The step whose weights final/ holds; None where that was not written to its end since the run last trained."""
    return json.loads((folder / FINAL).read_text(encoding="utf-8"))["step"] if _is_json(folder / FINAL) else None


def _records(settings: Settings, train: Any, evaluation: Any) -> tuple[Any, Any]:
    """The training and evaluation records, from the arguments or from the files; evaluation may be None."""
    for given, name in ((train, "data_path"), (evaluation, "eval_data_path")):
        if given is not None and getattr(settings, name):
            raise SettingsError(f"{name} and a dataset are both given: choose one.")
    if train is None and not settings.data_path:
        raise SettingsError("There is nothing to train on: give data_path, or a train_dataset.")
    options = {"names": settings.data_name, "streaming": settings.streaming}
    records = open_records(settings.data_path, settings, **options) if train is None else train
    eval_records = open_records(settings.eval_data_path, settings) if settings.eval_data_path else evaluation
    for some, name in ((records, "training"), (eval_records, "evaluation")):
        if hasattr(some, "__len__") and len(some) == 0:
            raise SettingsError(f"The {name} data holds no record.")
    return records, eval_records


def _tensorboard(settings: Settings, checkpoint: Path | None) -> Iterable[TrainerCallback]:
    if "tensorboard" not in settings.report_to.split(","):
        return []
    from torch.utils.tensorboard import SummaryWriter

    # what a stopped run wrote after its checkpoint is hidden
    step = step_of(checkpoint) + 1 if checkpoint else None
    return [TensorBoardCallback(SummaryWriter(Path(settings.output_dir) / "tensorboard", purge_step=step))]


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
