"""The embedded cascade's files, read by the reference libraries: the same layout, the same numbers."""

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from transformers import T5EncoderModel

from mtl_anagram.cascade import embedded_folder
from mtl_anagram.files.hub import read_json
from mtl_anagram.models import load_t5, load_tokenizer, load_unet
from mtl_anagram.sampling import Schedule
from tests.helpers import noise, relative

STAGE_1, STAGE_2 = embedded_folder() / "stage_1", embedded_folder() / "stage_2"


def unets(stage):
    """A stage's UNet: ours, theirs."""
    options = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
    theirs = UNet2DConditionModel.from_pretrained(stage / "unet", **options)
    return load_unet(stage, dtype=torch.float32), theirs


@pytest.fixture(scope="module")
def text():
    """States of three prompts and of the empty one, by both libraries."""
    ids, mask = load_tokenizer(STAGE_1)(["a poster of a duck", "A Rabbit ", "an elephant", ""])
    theirs = T5EncoderModel.from_pretrained(STAGE_1 / "text_encoder", dtype=torch.float32)
    with torch.no_grad():
        ours = load_t5(STAGE_1, dtype=torch.float32)(ids, mask)
        return ours, theirs(ids, attention_mask=mask).last_hidden_state


def test_the_text_encoder(text):
    assert relative(*text) < 1e-5


def test_the_unet(text):
    ours, theirs = unets(STAGE_1)
    x, t = noise(4, 3, 64, 64), torch.tensor([957, 500, 33, 0])
    with torch.no_grad():
        expected = theirs(x, t, text[1]).sample
        assert relative(ours(x, t, text[0]), expected) < 1e-5
    assert relative(expected[:1, :3], x[:1]) < 0.5  # a trained one: at t = 957 nearly all of x is noise


def test_stage_2(text):
    """Of 64 px, which its convolutions take as well, at a noise level of its low-resolution picture."""
    ours, theirs = unets(STAGE_2)
    x, t, levels = noise(2, 6, 64, 64), torch.tensor([957, 33]), torch.tensor([50, 250])
    with torch.no_grad():
        expected = theirs(x, t, text[1][:2], class_labels=levels).sample
        assert relative(ours(x, t, text[0][:2], class_labels=levels), expected) < 1e-5
        other = ours(x, t, text[0][2:], class_labels=levels)
    assert relative(other, expected) < 1e-5  # it does not ask what the picture shows
    assert relative(expected[:1, :3], x[:1, :3]) < 0.5


def test_the_schedule():
    config = STAGE_1 / "scheduler" / "scheduler_config.json"
    ours = Schedule.from_config(read_json(config), 30)
    assert ours == Schedule.stage_2(30)  # pictures are clamped to [-1, 1]; training/export.py says why
    theirs = DDPMScheduler.from_pretrained(STAGE_1 / "scheduler")
    theirs.set_timesteps(30)
    assert tuple(theirs.timesteps.tolist()) == ours.timesteps
    assert torch.equal(theirs.alphas_cumprod, ours.alphas_cumprod)
