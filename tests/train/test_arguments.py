"""Settings in the words of transformers' Trainer: what it would only refuse after the model is loaded."""

from __future__ import annotations

import pytest

from ovisnb.train import Settings, SettingsError
from ovisnb.train.arguments import training_arguments


def made(folder, **values):
    return training_arguments(Settings.from_dict({"output_dir": str(folder), **values}), evaluates=False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr_scheduler_kwargs": {"bad": 1}}, "lr_scheduler_kwargs .* 'bad'"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr or min_lr_rate"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}}, "lr_end"),
        ({"optim_args": "momentum"}, 'optim_args "momentum"'),
        ({"optim_args": "a=1,b=2=3"}, 'optim_args "b=2=3"'),
        ({"optim": "sgd", "optim_args": "momentum=much"}, 'optim "sgd" cannot be made: .*much'),
        ({"optim": "adamw_torch_xla"}, 'optim "adamw_torch_xla" cannot be made: .*torch_xla'),
        ({"optim": "galore_adamw", "optim_args": "rank=2"}, 'optim "galore_adamw" cannot be made'),
        ({"lr_scheduler_type": "cosin"}, "cosin is not a valid SchedulerType"),
    ],
)
def test_what_the_trainer_would_stumble_over_is_said_before(tmp_path, values, message):
    with pytest.raises(SettingsError, match=message) as caught:
        made(tmp_path, **values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 3}},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}},
        {"lr_scheduler_type": "inverse_sqrt", "warmup_ratio": 0.1},
        {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=true"},
        {"optim": "adafactor"},
    ],
)
def test_what_the_trainer_takes(tmp_path, values):
    made(tmp_path, **values)
