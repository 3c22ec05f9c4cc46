"""The shipped configs, users' own DeepSpeed files, and what contradicts the settings."""

from __future__ import annotations

import json

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

from ovisnb.train import Settings, SettingsError
from ovisnb.train.configs import (
    CONFIGS,
    SHIPPED,
    deepspeed_config,
    fsdp_config,
    tell_build_locks,
    unused_parts,
    wanted_deepspeed,
)

# Of the earlier scripts.
ZERO2_CP = {
    "compile": {"enabled": True, "backend": "inductor"},
    "fp16": {"enabled": False},
    "bf16": {"enabled": "auto"},
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 2, "allgather_partitions": True, "overlap_comm": True, "contiguous_gradients": True},
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)


def settings(**values) -> Settings:
    return Settings.from_dict({"model_path": "m", "data_path": "d.json"} | values)


def of(tmp_path, config, **values) -> Settings:
    (tmp_path / "zero.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return settings(deepspeed=str(tmp_path / "zero.json"), **values)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_deepspeed_configs_leave_everything_to_the_settings(name):
    written = json.loads((CONFIGS / f"{name}.json").read_text())
    config = deepspeed_config(settings(deepspeed=name, bf16=True, max_grad_norm=0.5), world_size=4)
    assert config == written
    zero = config["zero_optimization"]
    assert zero["stage"] == int(name[4]) and "optimizer" not in config and "scheduler" not in config
    assert config["gradient_clipping"] == config["bf16"]["enabled"] == "auto"
    assert ("offload_optimizer" in zero) == name.endswith("_offload")
    assert zero.get("stage3_gather_16bit_weights_on_model_save", False) == name.startswith("zero3")


def test_every_shipped_config_has_its_name():
    assert {path.stem for path in CONFIGS.glob("zero*.json")} == set(SHIPPED)
    assert deepspeed_config(settings(), world_size=2) is None


def test_a_file_of_the_earlier_scripts_works(tmp_path):
    given = of(tmp_path, ZERO2_CP)
    config = deepspeed_config(given, world_size=4)
    assert config["zero_optimization"] == ZERO2_CP["zero_optimization"] and config["compile"] == {}
    assert config["bf16"] == {"enabled": "auto"} and config["fp16"] == {"enabled": False}
    assert [sentence.partition(".json: ")[2] for sentence in unused_parts(given)] == [
        "compile.enabled is of earlier versions of DeepSpeed; torch_compile compiles"
    ]


def test_what_a_file_leaves_out_is_left_to_the_settings(tmp_path):
    adam = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}}
    given = of(tmp_path, {"zero_optimization": {"stage": 3}, "optimizer": adam, "scheduler": {"type": "WarmupLR"}})
    config = deepspeed_config(given, world_size=1)
    assert config["gradient_clipping"] == config["train_batch_size"] == "auto"
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert "optimizer" not in config and "scheduler" not in config
    assert ["optim is used" in told or "lr_scheduler_type is used" in told for told in unused_parts(given)] == [
        True
    ] * 2
    assert deepspeed_config(of(tmp_path, {}), world_size=1)["zero_optimization"] == {"stage": 0}


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"gradient_clipping": 0.3}, "says gradient_clipping 0.3, and the settings say max_grad_norm 1.0"),
        ({"train_micro_batch_size_per_gpu": 8}, "says train_micro_batch_size_per_gpu 8, and the settings say"),
        ({"train_batch_size": 7}, "says train_batch_size 7, and the settings say a batch in 2 processes of 8"),
        ({"gradient_accumulation_steps": 3}, "says gradient_accumulation_steps 3"),
        ({"bf16": {"enabled": True}}, "says bf16.enabled True, and the settings say bf16 False"),
        ({"optimizer": {"params": {"lr": 1e-3}}}, "says optimizer.params.lr 0.001, and the settings say learning_rate"),
        ({"scheduler": {"params": {"warmup_max_lr": 1}}}, "says scheduler.params.warmup_max_lr 1"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4, and ZeRO has 0, 1, 2 and 3"),
        ({"zero_optimization": True}, "zero_optimization.stage is None"),
        (
            {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}},
            "would leave no model to open: set it to true",
        ),
        ({"bf16": True}, 'bf16 is True, and it is an object such as {"enabled": "auto"}'),
        ([], "holds a list, and a config is one JSON object"),
        ("{", "is no JSON file"),
    ],
)
def test_a_contradiction_is_one_sentence(tmp_path, config, sentence):
    given = of(tmp_path, config, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    with pytest.raises(SettingsError, match=sentence) as caught:
        deepspeed_config(given, world_size=2)
    assert "\n" not in str(caught.value) and "zero.json" in str(caught.value)


def test_what_agrees_is_no_contradiction(tmp_path):
    same = {"gradient_clipping": 1.0, "train_batch_size": 8, "train_micro_batch_size_per_gpu": 2}
    given = of(tmp_path, same, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert deepspeed_config(given, world_size=2) | same == deepspeed_config(given, world_size=2)


def test_a_name_that_is_none(tmp_path):
    with pytest.raises(SettingsError, match="deepspeed zero5 is no file and none of the shipped configs zero0, "):
        deepspeed_config(settings(deepspeed="zero5"), world_size=1)


def test_accelerate_says_which_stage(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert wanted_deepspeed(settings()) == "zero2"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    assert wanted_deepspeed(settings()) == "zero3_offload"
    assert wanted_deepspeed(settings(deepspeed="zero1")) == "zero1"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "mine.json")
    assert wanted_deepspeed(settings()) == "mine.json"


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_accelerate_reads_its_configs(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig) and config.num_processes == 2


def test_fsdp_cuts_at_the_layers_of_the_model(golden_model):
    layers = {type(module).__name__ for module in golden_model.modules()}
    told = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())["fsdp_config"]
    config = fsdp_config(settings(gradient_checkpointing=True))
    assert set(config["transformer_layer_cls_to_wrap"]) <= layers
    assert told["fsdp_transformer_layer_cls_to_wrap"].split(",") == config["transformer_layer_cls_to_wrap"]
    assert config["activation_checkpointing"] and told["fsdp_version"] == config["version"] == 2


def test_a_lock_that_a_killed_build_left_is_told_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    tell_build_locks()
    assert capsys.readouterr().out == ""
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        tell_build_locks()
    assert capsys.readouterr().out.count(f"DeepSpeed waits until {lock} is gone") == 1
