"""The noise-aware CLIP's training: resumed as if never stopped, started from exported towers, and it learns."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from mtl_anagram.models.tokenizers import CLIPTokenizer
from tests.unit.tiny import save_module
from training import captions, checkpoints, drawings
from training.train_noise_clip import Plan, Trainer

CONCEPTS = drawings.CONCEPTS[:12]
TINY = Plan(
    batch=16, pictures=10_000, warmup=16, cooldown=100, lr=3e-3, easy=1, bf16=False, patch=16, width=64,
    image_layers=1, text_layers=1, embedding=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def data() -> dict[str, torch.Tensor]:
    """Every concept's drawing is a bar at a place of its own: the same one is held out."""
    count = len(CONCEPTS)
    images = torch.zeros(count, 64, 64, dtype=torch.uint8)
    for i in range(count):
        images[i, 5 * i : 5 * i + 4] = 255
    labels = torch.arange(count)
    parts = {"": images, "_shapes": images, "_labels": labels}
    return {f"{split}{kind}": value for split in ("train", "test") for kind, value in parts.items()}


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer(captions.train_merges(captions.corpus()))


def test_a_resumed_training_is_the_uninterrupted_one(data, tokenizer, one_thread, tmp_path) -> None:
    trainer = Trainer(TINY, data, tokenizer, CONCEPTS)
    for _ in range(2):
        trainer.train_step()
    checkpoints.save(trainer.state(), tmp_path)
    later = [trainer.train_step() for _ in range(3)]
    again = Trainer(TINY, data, tokenizer, CONCEPTS)
    state = checkpoints.load(tmp_path)
    assert state is not None
    again.load(state)
    assert [again.train_step() for _ in range(3)] == later
    for name, value in trainer.towers.state_dict().items():
        assert torch.equal(value, again.towers.state_dict()[name]), name


def test_towers_are_taken_from_an_export(data, tokenizer, tmp_path) -> None:
    first = Trainer(TINY, data, tokenizer, CONCEPTS)
    first.train_step()
    save_module(first.towers.image, tmp_path / "clip_image_enc.safetensors", torch.float16)
    save_module(first.towers.text, tmp_path / "clip_text_enc.safetensors", torch.float16)
    second = Trainer(TINY, data, tokenizer, CONCEPTS)
    second.begin_from(tmp_path)
    for name, value in first.towers.state_dict().items():
        assert torch.equal(second.towers.state_dict()[name], value.half().float()), name


def test_it_learns(data, tokenizer, one_thread) -> None:
    plan = dataclasses.replace(TINY, easy=10**9, floor_weight=0.0, lr=3e-4, image_layers=2)  # little noise
    trainer = Trainer(plan, data, tokenizer, CONCEPTS)
    losses = [trainer.train_step()[0] for _ in range(300)]
    assert (
        sum(losses[-30:]) / 30 < 0.9 * math.log(12) < sum(losses[:30]) / 30
    )  # better than knowing no picture
    after = trainer.probe()
    assert set(after) == {str(t) for t in (0, 300, 600, 750, 850, 920, 957)}
    assert after["0"]["top1"] >= 0.25  # of 12
