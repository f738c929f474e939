"""Stage II's training: the network is the released kind, resumed as if never stopped, and it learns to sharpen."""

import dataclasses

import pytest
import torch

from mtl_anagram.models.configs import UNetConfig
from tests.unit.tiny import save_module
from training import checkpoints
from training.diffusion import Diffusion
from training.train_stage2 import SIZE, Plan, Trainer, coarse_errors, network

TINY = Plan(
    batch=4, crop=64, pictures=10_000, whole=0, warmup=8, cooldown=100, typical=1.0,
    widths=(12, 12, 12, 24), head=12, groups=6, width=32,
)  # fmt: skip
CONCEPTS = ("duck", "elephant")


@pytest.fixture
def trainer() -> Trainer:
    ink = torch.zeros(4, 64, 64, dtype=torch.uint8)
    ink[:, 12:52, 30:34] = ink[:, 30:34, 12:52] = 255
    data = {"": ink, "_shapes": ink, "_regions": ink // 255, "_labels": torch.arange(4) % 2}
    data = {f"{split}{kind}": value for split in ("train", "test") for kind, value in data.items()}
    return Trainer(TINY, data, CONCEPTS)


def test_the_network_is_a_stage_2_of_the_family() -> None:
    config = network(TINY).config
    again = UNetConfig.from_dict(config.to_dict())
    assert again == config
    assert (config.in_channels, config.class_embed_type, config.sample_size) == (6, "timestep", SIZE)
    assert config.resnet_skip_time_act


def test_it_begins_as_x_t(trainer: Trainer) -> None:
    """Whatever the twin, the timestep and the text: the noise's first guess is x_t at unit variance."""
    g = torch.Generator().manual_seed(1)
    x, low = 0.7 * torch.randn(2, 3, 64, 64, generator=g), torch.randn(2, 3, 64, 64, generator=g)
    with torch.no_grad():
        out = trainer.model(
            torch.cat([x, low], 1),
            torch.tensor([3, 950]),
            trainer.text(2),
            class_labels=torch.tensor([0, 99]),
        )
    unit = x / x.square().mean((2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(out[:, :3], unit, atol=1e-3, rtol=0)
    assert out[:, 3:].abs().max() == 0


def test_no_prompt_changes_it(trainer: Trainer, tmp_path) -> None:
    """After training, and from an export whose text did: guidance then finds no difference to enlarge."""

    def difference(unet) -> float:
        x, steps = (
            torch.randn(2, 6, 64, 64, generator=torch.Generator().manual_seed(2)),
            torch.tensor([3, 950]),
        )
        with torch.no_grad():
            texts = torch.randn(2, 2, 7, 32, generator=torch.Generator().manual_seed(0))
            one, two = (unet(x, steps, text, class_labels=steps) for text in texts)
        return (one - two).abs().max().item()

    for _ in range(3):
        trainer.train_step()
    assert difference(trainer.model) == 0
    torch.nn.init.normal_(trainer.model.encoder_hid_proj.weight)
    torch.nn.init.normal_(trainer.model.add_embedding.norm2.weight)
    assert difference(trainer.model) > 1e-4
    save_module(trainer.model, tmp_path / "unet/diffusion_pytorch_model.safetensors", torch.float32)
    trainer.begin_from(tmp_path)
    assert difference(trainer.model) == 0


def test_noise_goes_astray_in_the_coarse_alone() -> None:
    """Sampling's first x_t lacks all of sqrt(a) x_0: this covers that, and leaves the clean end alone."""
    schedule, g = Diffusion.cosine(), torch.Generator().manual_seed(3)
    x0 = torch.ones(400, 3, 64, 64)
    t = torch.full((400,), 957)
    extra = schedule.astray(x0, t, g)
    a = schedule.alpha_bar[957]
    missing = -extra.mean((1, 2, 3)) / a.sqrt()  # of the picture's tone, 1
    assert missing.mean().item() == pytest.approx(0.5, abs=0.05)
    assert missing.min() < 0.1
    assert missing.max() > 0.9
    fine = extra - torch.nn.functional.interpolate(
        torch.nn.functional.avg_pool2d(extra, 8), (64, 64), mode="bilinear"
    )
    assert fine.std() < 0.2 * extra.std()
    assert schedule.astray(x0, torch.zeros(400, dtype=torch.long), g).std() < 0.01


def test_a_batch_is_a_square_of_picture_and_twin(trainer: Trainer) -> None:
    x0, large = trainer.batch(64, 4)
    assert x0.shape == large.shape == (4, 3, 64, 64)
    x0, large = trainer.batch(SIZE, 2)
    near = torch.nn.functional.avg_pool2d(x0, 8) - torch.nn.functional.avg_pool2d(large, 8)
    assert near.abs().mean() < 0.04


def test_a_resumed_training_is_the_uninterrupted_one(trainer: Trainer, tmp_path) -> None:
    trainer.train_step()
    checkpoints.save(trainer.state(), tmp_path)
    later = [trainer.train_step() for _ in range(2)]
    state = checkpoints.load(tmp_path)
    assert state is not None
    again = Trainer(TINY, trainer.data, CONCEPTS)
    again.load(state)
    assert [again.train_step() for _ in range(2)] == later


def test_it_learns(trainer: Trainer) -> None:
    trainer.plan = dataclasses.replace(TINY, lr=3e-3)
    losses = [trainer.train_step()[0] for _ in range(40)]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_an_error_of_large_areas_counts_as_such() -> None:
    g = torch.Generator().manual_seed(0)
    white = torch.randn(2, 3, 64, 64, generator=g)
    white[1] = 1.0
    found = coarse_errors(white)
    torch.testing.assert_close(found[0], torch.tensor(1.0), atol=0.1, rtol=0)
    torch.testing.assert_close(found[1], torch.tensor((4 + 16 + 64 + 256) / 4))


def test_noise_errors_weigh_more_where_they_are_smaller() -> None:
    weight = Diffusion.cosine().weight_of_error(torch.tensor([0, 300, 500, 900, 999]))
    assert weight[0] == 0.25 < weight[1] < 2 < weight[2] < weight[3] < weight[4] < 14


def test_the_sheet_sets_samples_between_twin_and_drawing(trainer: Trainer) -> None:
    made = trainer.samples(count=2, steps=2)
    assert made.shape == (6, 3, SIZE, SIZE)
    assert made.abs().max() <= 1 + 1e-5
    twin, sample, drawing = made.split(2)
    assert (twin - drawing).abs().mean() < 0.1
    assert (sample - twin).abs().mean() > 0.1  # untrained: noise
    assert torch.equal(trainer.samples(count=2, steps=2), made)
