"""A new Ovis from a language model and a vision tower: Qwen3 and GPT-2, SigLIP and SigLIP2."""

import json

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    GraniteConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from ovisnb.chat import collate, encode
from ovisnb.model import assemble, load, save
from ovisnb.model.loss import LanguageHead

PIXELS = {"min_pixels": 32 * 32, "max_pixels": 96 * 96}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
RECORDS = [
    {
        "image": Image.effect_noise((80, 60), 90).convert("RGB"),
        "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}],
    },
    {"conversations": [{"from": "human", "value": "Name a colour, any colour."}, {"from": "gpt", "value": "Red."}]},
]


@pytest.fixture(scope="module")
def qwen(golden, tmp_path_factory):
    """Folder of a small Qwen3 with a Qwen tokenizer and spare embedding rows."""
    folder = tmp_path_factory.mktemp("qwen")
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=640, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True, **SMALL)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    Qwen2Tokenizer.from_pretrained(golden / "checkpoint").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Folder of a small GPT-2 whose tokenizer has one special token and no spare rows, as DialoGPT's."""
    folder = tmp_path_factory.mktemp("gpt2")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)} | {"<|endoftext|>": 256}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.model.save(str(folder))
    GPT2Tokenizer.from_pretrained(folder).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=257, n_positions=512, n_embd=32, n_layer=2, n_head=2, bos_token_id=256, eos_token_id=256
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(1)
    SiglipVisionModel(SiglipVisionConfig(image_size=64, patch_size=16, **SMALL)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def siglip2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip2")
    torch.manual_seed(2)
    Siglip2VisionModel(Siglip2VisionConfig(num_patches=16, patch_size=16, **SMALL)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("language", ["qwen", "gpt2"])
@pytest.mark.parametrize("vision", ["siglip", "siglip2"])
def test_it_learns_answers_and_round_trips(request, tmp_path, language, vision):
    parts = [request.getfixturevalue(name) for name in (language, vision)]
    model, processor = assemble(*parts, visual_vocab_size=64, **PIXELS)
    batch = collate([encode(record, processor) for record in RECORDS])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2

    save(model, processor, tmp_path / "made")
    again, its_processor = load(tmp_path / "made")
    assert its_processor.visual_ids == processor.visual_ids
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name

    prompts = [encode(record, its_processor, train=False) for record in RECORDS]
    together = {key: value for key, value in collate(prompts, "left").items() if key != "labels"}
    answers = again.generate(**together, max_new_tokens=6, do_sample=False)[:, together["input_ids"].shape[1] :]
    for row, prompt in enumerate(prompts):  # padding on the left moves nobody's positions
        alone = {key: value for key, value in collate([prompt]).items() if key != "labels"}
        alone = again.generate(**alone, max_new_tokens=6, do_sample=False)[0, len(prompt) :]
        assert answers[row].tolist()[: len(alone)] == alone.tolist()


def test_the_language_models_weights_are_kept(qwen, siglip):
    model, processor = assemble(qwen, siglip, visual_vocab_size=64)
    original = Qwen3ForCausalLM.from_pretrained(qwen)
    ids = torch.tensor([processor.tokenizer.encode("Where is the red circle?")])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, original(input_ids=ids).logits, rtol=0, atol=0)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert processor.visual_ids.all == (543, 544, 545, 546, 547)  # spare rows: nothing was resized
    assert model.config.vocab_size == 640
    assert isinstance(model.lm_head, LanguageHead)  # the loss without whole logits


@pytest.mark.parametrize("vision", ["siglip", "siglip2"])
def test_the_vision_weights_are_kept(request, qwen, vision):
    """Without rotary positions, at the native resolution, the tower is the SigLIP encoder before its last norm."""
    folder = request.getfixturevalue(vision)
    model, _ = assemble(qwen, folder, visual_vocab_size=64, use_rope=False)
    pixels = torch.randn(1, 3, 64, 64)
    patches = pixels.view(3, 2, 2, 16, 2, 2, 16).permute(1, 4, 2, 5, 0, 3, 6).reshape(16, -1)  # 2x2 block order
    tower = model.eval().model.vision_tower
    with torch.no_grad():
        found = tower.transformer(patches, [[1, 4, 4]])
        if vision == "siglip":
            whole = SiglipVisionModel.from_pretrained(folder)(pixels, output_hidden_states=True).hidden_states[-1][0]
        else:  # NaFlex takes patches in rows, each (row, column, channel)
            flat = pixels[0].view(3, 4, 16, 4, 16).permute(1, 3, 2, 4, 0).reshape(1, 16, -1)
            naflex = Siglip2VisionModel.from_pretrained(folder)
            mask, shapes = torch.ones(1, 16, dtype=torch.long), torch.tensor([[4, 4]])
            out = naflex(flat, pixel_attention_mask=mask, spatial_shapes=shapes, output_hidden_states=True)
            whole = out.hidden_states[-1][0]
    wanted = whole.view(2, 2, 2, 2, -1).transpose(1, 2).reshape(16, -1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_two_frames_a_patch_see_a_still_as_one_frame_did(qwen, siglip):
    one, one_processor = assemble(qwen, siglip, visual_vocab_size=64, **PIXELS)
    two, two_processor = assemble(qwen, siglip, visual_vocab_size=64, temporal_patch_size=2, **PIXELS)
    picture = RECORDS[0]["image"]
    with torch.no_grad():
        still, clip = (
            m.model.vision_tower.transformer.embeddings(made["pixel_values"], made["image_grid_thw"].tolist())
            for m, made in (
                (one, one_processor.image_processor([picture], return_tensors="pt")),
                (two, two_processor.image_processor([picture], return_tensors="pt")),
            )
        )
    torch.testing.assert_close(still, clip, rtol=0, atol=1e-5)


def test_the_seed_decides_the_new_weights(qwen, siglip):
    first, second, other = (assemble(qwen, siglip, visual_vocab_size=64, seed=seed)[0] for seed in (3, 3, 4))
    state = torch.random.get_rng_state()
    assemble(qwen, siglip, visual_vocab_size=64)
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's random numbers change
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    for name in ("model.visual_embeddings_table.weight", "model.vision_tower.head_linear.weight"):
        assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


@pytest.mark.parametrize("words", [64, 1024])
def test_visual_embeddings_start_as_large_as_text_and_differ(golden, words):
    torch.manual_seed(0)
    tokenizer = Qwen2Tokenizer.from_pretrained(golden / "checkpoint")
    language = Qwen3Config(vocab_size=640, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True, **SMALL)
    vision = SiglipVisionConfig(image_size=64, patch_size=16, **SMALL)
    model, processor = assemble(language, vision, visual_vocab_size=words, tokenizer=tokenizer, **PIXELS)
    pictures = [Image.new("RGB", (96, 96), colour) for colour in ("white", "red")] + [RECORDS[0]["image"]]
    made = processor.image_processor(pictures, return_tensors="pt")
    with torch.no_grad():
        features = model.model.get_visual_features(made["pixel_values"], made["image_grid_thw"])
    text = model.get_input_embeddings().weight
    assert 0.5 < features.std() / text.std() < 2
    assert features.std(0).mean() > features.std() / 3  # tokens differ, they are not one mean vector


def test_what_cannot_be_assembled_is_told(golden, qwen, siglip, tmp_path):
    tokenizer = Qwen2Tokenizer.from_pretrained(golden / "checkpoint")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(ValueError, match="pass tokenizer"):
        assemble(Qwen3Config(), siglip)
    with pytest.raises(ValueError, match="is not a Linear without bias"):
        assemble(PhiConfig(vocab_size=640, **small), siglip, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="is a bert; give a SigLIP"):
        assemble(qwen, BertConfig())
    AutoConfig.from_pretrained(siglip).save_pretrained(tmp_path / "other")
    torch.manual_seed(0)
    other = SiglipVisionModel(SiglipVisionConfig(image_size=64, patch_size=16, **SMALL))
    other.save_pretrained(tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text()) | {"num_hidden_layers": 3}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lacks 16 tensors .*layers\.2"):
        assemble(qwen, tmp_path / "other")


@pytest.mark.parametrize(
    "config", [Gemma2Config(head_dim=16), GraniteConfig(logits_scaling=8.0), CohereConfig(logit_scale=0.0625)]
)
def test_a_language_model_that_scales_or_caps_its_logits_is_refused(config, siglip, golden):
    """Ovis gives the logits of the output layer alone: they would be others than the language model's."""
    config.update(SMALL | {"vocab_size": 640, "num_key_value_heads": 2})
    tokenizer = Qwen2Tokenizer.from_pretrained(golden / "checkpoint")
    with pytest.raises(ValueError, match=f"{config.model_type} scales or caps its logits beside"):
        assemble(config, siglip, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "config",
    [
        GemmaConfig(**SMALL, vocab_size=640, num_key_value_heads=1, head_dim=24),
        OPTConfig(vocab_size=640, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2),
    ],
)
def test_a_language_model_keeps_its_logits(config, siglip, golden):
    tokenizer = Qwen2Tokenizer.from_pretrained(golden / "checkpoint")
    model, _ = assemble(config, siglip, tokenizer=tokenizer, seed=3)
    torch.manual_seed(3)
    alone = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(600, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, alone(input_ids=ids).logits)


def test_the_released_layout_is_for_qwen3_only(gpt2, siglip, tmp_path):
    with pytest.raises(ValueError, match="gpt2"):
        save(*assemble(gpt2, siglip, visual_vocab_size=64), tmp_path / "made", layout="released")
    assert not list(tmp_path.iterdir())
