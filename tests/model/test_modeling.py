"""Parity of every golden number, and any batch in one forward."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers.utils import find_labels

from ovisnb.model import Ovis2_5Config, Ovis2_5ForConditionalGeneration, load
from ovisnb.model.released import PREFIXES
from ovisnb.model.vision import window_segments

CASES = [
    "single", "multi_turn_system", "thinking", "mixed_thinking", "multi_image", "image_mid_text", "video",
    "text_only", "tool_call", "ignored_gpt",
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(golden, golden_cases, golden_numbers, golden_processor):
    """case name -> model inputs with the golden ids (in native placeholder ids) and labels"""
    visual = dict(zip((-300, -301, -302, -303, -304), golden_processor.visual_ids.all, strict=True))
    limits = golden_cases["case_pixel_limits"]

    def make(name, key=None):
        arrays, _ = golden_numbers
        case = golden_cases["conversations"][name]
        ids = arrays[f"{key or 'encode/' + name}/input_ids"]
        batch = {"input_ids": torch.tensor([[visual.get(i, i) for i in ids.tolist()]])}
        if key is None:
            batch["labels"] = torch.tensor(arrays[f"encode/{name}/labels"])[None]

        def open_all(names):
            return [Image.open(golden / "images" / f"{n}.png") for n in names]

        if case["images"]:
            batch |= golden_processor.image_processor(open_all(case["images"]), **limits, return_tensors="pt")
        if case["video"]:
            batch |= golden_processor.video_processor([open_all(case["video"])], **limits, return_tensors="pt")
        return batch

    return make


def stack(samples, pad, side="right"):
    """One padded batch of several samples' inputs."""
    longest = max(s["input_ids"].shape[1] for s in samples)

    def padded(row, value):
        fill = torch.full((1, longest - row.shape[1]), value)
        return torch.cat([row, fill] if side == "right" else [fill, row], dim=1)

    batch = {
        "input_ids": torch.cat([padded(s["input_ids"], pad) for s in samples]),
        "attention_mask": torch.cat([padded(torch.ones_like(s["input_ids"]), 0) for s in samples]),
        "labels": torch.cat([padded(s["labels"], -100) for s in samples]),
    }
    for key in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        parts = [s[key] for s in samples if key in s]
        if parts:
            batch[key] = torch.cat(parts)
    return batch


@pytest.mark.parametrize("name", ["photo", "tall", "huge"])
def test_vision_parity(golden, golden_cases, golden_numbers, golden_pair, name):
    model, processor = golden_pair
    arrays, _ = golden_numbers
    picture = Image.open(golden / "images" / f"{name}.png")
    made = processor.image_processor([picture], **golden_cases["pixel_limits"][name], return_tensors="pt")
    grids, tower = made["image_grid_thw"].tolist(), model.model.vision_tower
    with torch.no_grad():
        found = {
            "embeddings": tower.transformer.embeddings(made["pixel_values"], grids),
            "last_hidden": tower.transformer(made["pixel_values"], grids),
            "visual_tokens": tower(made["pixel_values"], made["image_grid_thw"]).pooler_output,
            "visual_embeds": model.model.get_visual_features(made["pixel_values"], made["image_grid_thw"]),
        }
    for key, value in found.items():
        wanted = arrays[f"vision/{name}/{key}"]
        if key == "visual_tokens":  # the original pads the four indicators with zeros
            assert not wanted[:, -4:].any()
            wanted = wanted[:, :-4]
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CASES)
def test_forward_parity(golden, golden_numbers, golden_model, inputs, name, attention):
    arrays, told = golden_numbers
    golden_model.set_attn_implementation(attention)
    try:
        with torch.no_grad():
            out = golden_model(**inputs(name))
    finally:
        golden_model.set_attn_implementation("sdpa")
    assert abs(out.loss.item() - told[name]["loss"]) < 1e-5
    np.testing.assert_allclose(out.logits[0, -8:], arrays[f"forward/{name}/logits_last8"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(out.logits[0].mean(-1), arrays[f"forward/{name}/logits_mean"], rtol=0, atol=1e-4)


def test_batch_loss_and_every_gradient_norm(golden_numbers, golden_pair, inputs):
    _, told = golden_numbers
    model, processor = golden_pair
    batch = stack([inputs(name) for name in told["batch"]["samples"]], processor.tokenizer.pad_token_id)
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    assert abs(loss.item() - told["batch"]["loss"]) < 1e-5
    found = {}
    for name, parameter in model.named_parameters():
        prefix = next(p for p in PREFIXES if name.startswith(p))
        if parameter.grad is not None:
            found[PREFIXES[prefix] + name.removeprefix(prefix)] = parameter.grad.norm().item()
    model.zero_grad()
    wanted = {name: norm for name, norm in told["batch"]["grad_norm"].items() if norm}
    assert wanted.keys() <= found.keys()
    for name, norm in wanted.items():
        # absolute part: a key bias has no true gradient, so its norm is rounding noise
        assert found[name] == pytest.approx(norm, rel=1e-3, abs=1e-6), name


def test_mixed_batch_equals_singles_on_either_side(golden_pair, inputs):
    model, processor = golden_pair
    names = ["text_only", "video", "multi_image", "single"]
    samples = [inputs(name) for name in names]
    with torch.no_grad():
        for side in ("right", "left"):
            batch = stack(samples, processor.tokenizer.pad_token_id, side)
            logits = model(**batch).logits
            for row, sample in enumerate(samples):
                alone = model(**sample).logits[0]
                real = batch["attention_mask"][row].bool()
                torch.testing.assert_close(logits[row][real], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["generate_no_think", "generate_think", "generate_text", "generate_video"])
def test_greedy_generation_parity(golden_cases, golden_numbers, golden_model, inputs, case):
    arrays, _ = golden_numbers
    batch = inputs(golden_cases["prefaces"][case]["case"], key=f"generate/{case}")
    for use_cache in (True, False):
        ids = golden_model.generate(**batch, max_new_tokens=24, do_sample=False, use_cache=use_cache)
        assert ids[0, batch["input_ids"].shape[1] :].tolist() == arrays[f"generate/{case}/new_ids"].tolist()


def test_beams_and_return_sequences_keep_each_rows_pictures(golden_pair, inputs):
    model, processor = golden_pair
    names = ["multi_image", "text_only", "video"]
    samples = [inputs(name) for name in names]
    batch = stack(samples, processor.tokenizer.pad_token_id, "left")
    labels = batch.pop("labels")
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    together = model.generate(**batch, **options)[:, labels.shape[1] :]
    for row, sample in enumerate(samples):
        sample = {key: value for key, value in sample.items() if key != "labels"}
        alone = model.generate(**sample, **options)[:, sample["input_ids"].shape[1] :]
        assert together[2 * row : 2 * row + 2].tolist() == alone.tolist()


def test_visual_ids_are_never_sampled(golden_pair, inputs):
    model, processor = golden_pair
    head = model.lm_head.weight
    ids, batch = list(processor.visual_ids.all), inputs("text_only")
    batch.pop("labels")
    rows = head.detach()[ids].clone()
    with torch.no_grad():
        hidden = model.model(**batch).last_hidden_state[0, -1]
        head[ids] = hidden * 100  # by far the likeliest next tokens
        try:
            drawn = model.generate(**batch, do_sample=True, max_new_tokens=20, num_return_sequences=4)
        finally:
            head[ids] = rows
    assert not torch.isin(drawn, torch.tensor(ids)).any()


@pytest.mark.parametrize("frozen", ["nothing", "vision", "language", "lora"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(golden, inputs, frozen, reentrant):
    grads = []
    for checkpointing in (False, True):
        model, _ = load(golden / "checkpoint", dtype=torch.float32)
        if frozen == "lora":
            torch.manual_seed(0)
            targets = ["q_proj", "v_proj"]
            model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights="gaussian"))
        elif frozen == "vision":
            model.model.vision_tower.requires_grad_(False)
        elif frozen == "language":
            model.model.language_model.requires_grad_(False)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**inputs("multi_image"), use_cache=False).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    moved = [name for name, grad in grads[0].items() if grad is not None and grad.abs().sum() > 0]
    assert moved
    for name in moved:
        torch.testing.assert_close(grads[1][name], grads[0][name], rtol=1e-4, atol=1e-7)


def test_a_batch_without_pictures_touches_the_vision_parameters_and_changes_nothing(golden, inputs):
    model, _ = load(golden / "checkpoint", dtype=torch.float32)
    batch = inputs("text_only")
    with torch.no_grad():
        quiet = model(**batch).logits
    model.train()
    out = model(**batch, skip_logits=False)
    torch.testing.assert_close(out.logits, quiet, rtol=0, atol=0)
    out.loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert not model.model.vision_tower.head_linear.weight.grad.any()


def test_windowed_layers_attend_within_their_window_only(golden):
    model, _ = load(golden / "checkpoint", dtype=torch.float32)
    tower = model.model.vision_tower
    tower.config.fullatt_block_indexes = "9"  # every layer of this tower is windowed
    grids = torch.tensor([[2, 10, 6], [1, 4, 8]])
    torch.manual_seed(0)
    patches = torch.randn(int(grids.prod(1).sum()), 768)
    segments = window_segments(grids.tolist(), tower.config, "cpu")
    with torch.no_grad():
        whole = tower.transformer(patches, grids.tolist())
        for window in segments.order.split(segments.lengths):
            changed = patches.clone()
            changed[window] += 1.0
            moved = (tower.transformer(changed, grids.tolist()) - whole).abs().amax(1) > 0
            assert moved.nonzero().flatten().tolist() == sorted(window.tolist())
    assert sorted(segments.order.tolist()) == list(range(len(patches)))
    # window 64 px = 2x2 merged cells = 16 patches; the first frame's 5x3 cells make 3x2 windows
    assert segments.lengths == [16, 8, 16, 8, 8, 4] * 2 + [16, 16]


def test_windows_and_full_layers_mix(golden):
    model, _ = load(golden / "checkpoint", dtype=torch.float32)
    config = model.model.vision_tower.config
    for written in ("0|2", [0, 2]):
        config.fullatt_block_indexes = written
        assert [config.windowed(layer) for layer in range(3)] == [False, True, False]
    config.fullatt_block_indexes = 1
    assert [config.windowed(layer) for layer in range(3)] == [True, False, True]


@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda b: b["input_ids"].__setitem__((0, 12), 5), "Sample 0: image 0 .* likely it was cut"),
        (lambda b: b.update(pixel_values=None, image_grid_thw=None), "4 image placeholders but 0 image grids"),
        (lambda b: b["input_ids"].__setitem__((1, 1), 543), "Sample 1 .*outside any image"),
        (lambda b: b["input_ids"].__setitem__((2, slice(12, None)), 5), "sample 2 has an unclosed image"),
        (lambda b: b.update(image_grid_thw=b["image_grid_thw"][:-1]), r"counts are \[1, 0, 3\]"),
        (lambda b: b.update(image_grid_thw=b["image_grid_thw"].flip(0)), "placeholder tokens but its grid .* likely"),
        (lambda b: b.pop("image_grid_thw"), "pixels or grids of images without the other"),
        (lambda b: b["input_ids"].__setitem__((1, 1), 546), "sample 1 has an unclosed video"),
    ],
)
def test_placeholders_without_their_features_are_told_by_sample(golden_pair, inputs, spoil, told):
    model, processor = golden_pair
    batch = stack([inputs(n) for n in ("single", "text_only", "multi_image")], processor.tokenizer.pad_token_id)
    spoil(batch)
    with pytest.raises(ValueError, match=told), torch.no_grad():
        model(**batch)


def test_a_cached_continuation_needs_no_pictures(golden_pair, inputs):
    """The cache holds the pictures; only new tokens come in, one or several."""
    model, _ = golden_pair
    batch = inputs("single")
    batch.pop("labels")
    with torch.no_grad():
        whole = model(**batch).logits[0]
        for new in (1, 3):
            head = batch | {"input_ids": batch["input_ids"][:, :-new]}
            cache = model(**head, use_cache=True).past_key_values
            rest = model(input_ids=batch["input_ids"][:, -new:], past_key_values=cache).logits[0]
            torch.testing.assert_close(rest, whole[-new:], rtol=0, atol=1e-4)


def features_of(model, batch):
    """visual_features of a batch, and the batch without its pixels."""
    kinds = [("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")]
    parts = [model.model.get_visual_features(batch[pixels], batch[grid]) for pixels, grid in kinds if pixels in batch]
    return torch.cat(parts), {key: value for key, value in batch.items() if not key.startswith("pixel_values")}


def test_given_features_take_the_place_of_pixels(golden_pair, inputs):
    model, processor = golden_pair
    samples = [inputs(name) for name in ("video", "text_only", "multi_image", "single")]
    batch = stack(samples, processor.tokenizer.pad_token_id)
    with torch.no_grad():
        features, rest = features_of(model, batch)
        found, wanted = model(**rest, visual_features=features), model(**batch)
        torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=1e-5)
        with pytest.raises(ValueError, match="either visual_features or pixels"):
            model(**batch, visual_features=features)
        with pytest.raises(ValueError, match=f"ask for {len(features)} visual tokens but .* has {len(features) - 1}"):
            model(**rest, visual_features=features[1:])
        with pytest.raises(ValueError, match="4 image placeholders but 0 image grids"):
            model(**{key: value for key, value in rest.items() if "image" not in key}, visual_features=features)
        with pytest.raises(ValueError, match="pass input_ids, not inputs_embeds"):
            model(inputs_embeds=torch.zeros(1, 4, 96), visual_features=features)
    prompt = inputs("single", key="generate/generate_no_think")
    features, rest = features_of(model, prompt)
    options = {"max_new_tokens": 5, "do_sample": False}
    found = model.generate(**rest, visual_features=features.detach(), **options)
    assert found.tolist() == model.generate(**prompt, **options).tolist()


def test_given_features_leave_no_trained_parameter_without_a_gradient(golden, inputs):
    """Or DDP would wait for it."""
    model, _ = load(golden / "checkpoint", dtype=torch.float32)
    features, rest = features_of(model, inputs("single"))
    model.train()(**rest, visual_features=features.detach()).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_every_batch_runs_the_vision_tower_once(golden_pair, inputs):
    """Under ZeRO-3 a rank that ran it twice, for pictures and for videos, would wait for the others for ever."""
    model, processor = golden_pair
    runs = []
    handle = model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    try:
        with torch.no_grad():
            model(**stack([inputs(n) for n in ("video", "multi_image")], processor.tokenizer.pad_token_id))
            assert len(runs) == 1
            model.train()(**inputs("text_only"))
            assert len(runs) == 2
    finally:
        model.eval()
        handle.remove()


def test_patches_and_grids_must_agree(golden_model):
    with pytest.raises(ValueError, match="ask for 16 patches but pixel_values has 12"):
        golden_model.model.vision_tower(torch.zeros(12, 768), torch.tensor([[1, 4, 4]]))


def test_embeddings_can_be_read_and_replaced(golden):
    model, _ = load(golden / "checkpoint", dtype=torch.float32)
    table = model.get_input_embeddings()
    assert table is model.model.language_model.embed_tokens and model.lm_head.weight is table.weight
    other = torch.nn.Embedding(*table.weight.shape)
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is other
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()


def test_what_trl_reads_is_there(golden_model):
    config = golden_model.config
    assert config.image_token_id == 543
    assert config.get_text_config().max_position_embeddings == 4096
    assert golden_model.base_model is golden_model.model
    assert golden_model.supports_gradient_checkpointing and golden_model.can_generate()


def test_the_trainer_finds_the_labels():
    """Evaluation looks for every argument with "label" in its name in the batch, and gives no loss without."""
    assert find_labels(Ovis2_5ForConditionalGeneration) == ["labels"]


def test_config_round_trips_and_refuses_the_released_form(tmp_path):
    config = Ovis2_5Config(visual_vocab_size=260)
    config.save_pretrained(tmp_path)
    again = Ovis2_5Config.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.vision_config.vocab_size == 260
    with pytest.raises(ValueError, match="ovisnb.load"):
        Ovis2_5Config(llm_config={})
    assert Ovis2_5ForConditionalGeneration.config_class is Ovis2_5Config
