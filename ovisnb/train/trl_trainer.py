"""TRL's SFTTrainer as the trainer of a run, for those who want its metrics: `ovisnb train ... --trainer trl`.

TRL would make tokens and labels itself, and its labels of pictures and users are trained on. So it gets the numbers of
the samples for a data set, and a collator that encodes them with the one encoder; the batches are those of `SftTrainer`.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl import SFTTrainer

from ovisnb.train.settings import SettingsError
from ovisnb.train.trainer import Counting


class TrlSftTrainer(Counting, SFTTrainer):
    """TRL's trainer over our samples; the loss is that of `SftTrainer`, through TRL's own output layer.

    `train_dataset` and `eval_dataset` are indexable data sets of Encoded, `data_collator` takes a list of those, and
    `args` is a trl.SFTConfig.
    """

    def __init__(self, *, train_dataset: Any, eval_dataset: Any = None, data_collator: Any, **kwargs: Any):
        self.samples = {"train": train_dataset, "eval": eval_dataset}
        self.collate = data_collator
        super().__init__(
            train_dataset=_numbers("train", train_dataset),
            eval_dataset=None if eval_dataset is None else _numbers("eval", eval_dataset),
            data_collator=self._batch,
            processing_class=kwargs["processor"],
            **kwargs,
        )

    def _batch(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return self.collate([self.samples[kind][number] for row in rows for kind, number in row.items()])

    def model_options(self, training: bool) -> dict[str, Any]:
        return {}  # TRL calls the backbone, and leaves out the logits by itself


def _numbers(kind: str, samples: Any) -> Dataset:
    """A data set of sample numbers, under the name of the data they belong to; SettingsError for a stream."""
    if not hasattr(samples, "__len__"):
        raise SettingsError('trainer "trl" takes its samples by number, and a stream has none: use "transformers".')
    return Dataset.from_dict({kind: range(len(samples))})
