"""The training code: its loss against slow formulas, captions and tokenizers, and a resumed run."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mtl_anagram.models.tokenizers import CLIPTokenizer, T5Tokenizer
from tests.helpers import relative
from training import captions, drawings
from training.diffusion import Diffusion
from training.growing import attend, pooled_noise
from training.train_stage1 import Plan, Trainer, chosen, save

TINY = Plan(
    batches=(4, 4, 4), grow=(8, 8), pictures=40, warmup=8, cooldown=16, bf16=False, widths=(16, 16, 16, 32),
    layers=(1, 1, 1, 1), head=16, groups=4, text_width=32, text_layers=1,
)  # fmt: skip
CONCEPTS = ("duck", "elephant")


@pytest.fixture(scope="module")
def spiece() -> bytes:
    return captions.train_sentencepiece(captions.corpus())


@pytest.fixture
def trainer(spiece: bytes) -> Trainer:
    generator = torch.Generator().manual_seed(3)
    data = {
        "train": torch.randint(0, 256, (10, 64, 64), generator=generator, dtype=torch.uint8),
        "train_labels": torch.arange(10) % 2,
    }
    ids, mask = captions.encode(spiece, captions.caption_table(CONCEPTS)[0])
    return Trainer(TINY, data, CONCEPTS, ids, mask)


def test_schedule_is_the_published_one() -> None:
    schedule = Diffusion.cosine()
    for t, expected in ((0, 0.9999587), (250, 0.8458880), (500, 0.4922850), (957, 0.004278234)):
        assert schedule.alpha_bar[t].item() == pytest.approx(expected, rel=2e-5)
    assert schedule.log_beta[999].exp().item() == pytest.approx(0.999, rel=1e-5)


@pytest.mark.parametrize("t", [1, 17, 500, 957, 999])
def test_vlb_is_the_divergence_of_two_normals(t: int) -> None:
    """Number by number in double precision, from the definitions."""
    generator = torch.Generator().manual_seed(t)
    x0 = torch.rand(2, 3, 4, 4, generator=generator) * 2 - 1
    noise = torch.randn(x0.shape, generator=generator)
    prediction = torch.cat([noise + 0.1 * torch.randn(x0.shape, generator=generator),
                            torch.rand(x0.shape, generator=generator) * 2 - 1], dim=1)  # fmt: skip
    schedule = Diffusion.cosine()
    steps = torch.full((2,), t)
    x_t = schedule.noised(x0, steps, noise)
    simple, bound = schedule.losses(prediction, x0, x_t, steps, noise)

    def remaining(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - remaining((i + 1) / 1000) / remaining(i / 1000), 0.999) for i in range(t + 1)]
    before = math.prod(1 - b for b in betas[:-1])
    beta, now = betas[-1], before * (1 - betas[-1])
    true_variance = beta * (1 - before) / (1 - now)
    terms, errors = [], []
    for i in np.ndindex(*x0.shape):
        row, channel, *place = i
        eps = prediction[(row, channel, *place)].item()
        v = prediction[(row, channel + 3, *place)].item()
        guess = min(1.0, max(-1.0, (x_t[i].item() - math.sqrt(1 - now) * eps) / math.sqrt(now)))
        scale_0, scale_t = (
            math.sqrt(before) * beta / (1 - now),
            math.sqrt(1 - beta) * (1 - before) / (1 - now),
        )
        mean, true_mean = (scale_0 * p + scale_t * x_t[i].item() for p in (guess, x0[i].item()))
        variance = math.exp((v + 1) / 2 * math.log(beta) + (1 - v) / 2 * math.log(true_variance))
        kl = 0.5 * (
            math.log(variance / true_variance) - 1 + (true_variance + (true_mean - mean) ** 2) / variance
        )
        terms.append(kl / math.log(2))
        errors.append((eps - noise[i].item()) ** 2)
    assert relative(simple, torch.tensor(errors).view(2, -1).mean(1)) < 1e-5
    assert relative(bound, torch.tensor(terms).view(2, -1).mean(1)) < 2e-3


def test_vlb_at_zero_is_the_likelihood_of_the_level() -> None:
    schedule = Diffusion.cosine()
    levels = torch.linspace(-1, 1, 256)
    x0 = levels.view(1, 1, 16, 16).expand(1, 3, 16, 16)
    t, noise = torch.zeros(1, dtype=torch.long), torch.zeros(1, 3, 16, 16)
    x_t = schedule.noised(x0, t, noise)
    prediction = torch.cat([noise, torch.zeros_like(noise)], dim=1)
    _, bound = schedule.losses(prediction, x0, x_t, t, noise)
    deviation = math.exp(0.25 * (schedule.log_beta[0] + schedule.posterior_log_variance[0]).item())
    normal = torch.distributions.Normal(0.0, deviation)
    cell = torch.tensor(1 / 255)
    inside = -(normal.cdf(cell) - normal.cdf(-cell)).log2()
    edge = -normal.cdf(cell).log2()
    assert bound.item() == pytest.approx((254 * inside + 2 * edge).item() / 256, rel=2e-3)


def test_the_bound_trains_the_variance_alone() -> None:
    schedule = Diffusion.cosine()
    prediction = torch.randn(1, 6, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x0, noise, t = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4), torch.tensor([500])
    _, bound = schedule.losses(prediction, x0, schedule.noised(x0, t, noise), t, noise)
    bound.sum().backward()
    assert prediction.grad is not None
    assert not prediction.grad[:, :3].any()
    assert prediction.grad[:, 3:].all()


def test_the_training_forward_is_the_unet(trainer: Trainer) -> None:
    """Also with every pixel named as one that attention may look at; with fewer it is near."""
    generator = torch.Generator().manual_seed(5)
    for parameter in trainer.model.parameters():
        parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    unet, ids, mask, rows = trainer.model.unet, trainer.ids[:2], trainer.mask[:2], torch.tensor([1, 0, 1])
    x = torch.randn(3, 3, 64, 64, generator=generator)
    t = torch.tensor([900, 500, 20])
    with torch.no_grad():
        expected = unet(x, t, trainer.model.t5(ids, mask)[rows])
        assert relative(trainer.model(x, t, ids, mask, rows), expected) < 1e-5
        layer, h = unet.down_blocks[1].attentions[0], torch.randn(3, 16, 32, 32, generator=generator)
        context = chosen(unet.prepare(trainer.model.t5(ids, mask)), rows)
        whole = attend(layer, h, context, None)
        assert relative(attend(layer, h, context, torch.randperm(1024, generator=generator)), whole) < 1e-5
        part = attend(layer, h, context, torch.randperm(1024, generator=generator)[:256])
        assert 0 < relative(part - h, whole - h) < 0.5


def test_averaged_noise_stays_white() -> None:
    noise = torch.randn(64, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for depth in (1, 2):
        small = pooled_noise(noise, depth)
        assert small.shape[-1] == 64 >> depth
        assert small.std().item() == pytest.approx(1, abs=0.01)


def test_captions_name_the_concept_last() -> None:
    texts, places, weights = captions.caption_table(CONCEPTS)
    assert texts[0] == ""
    assert "a sketch of an elephant" in texts
    assert "duck" in texts
    for concept, row, weight in zip(CONCEPTS, places, weights, strict=True):
        assert all(texts[i].endswith(concept) for i in row)
        assert weight.sum().item() == pytest.approx(1)
    assert captions.with_article("headphones") == "headphones"


def test_tokenizers_know_every_word(spiece: bytes, tmp_path) -> None:
    file = tmp_path / "spiece.model"
    file.write_bytes(spiece)
    tokenizer = T5Tokenizer(file)
    texts = [
        f"{style} {captions.with_article(name)}".strip()
        for name in captions.NAMES
        for style in captions.STYLES
    ]
    for text in texts:
        assert len(tokenizer.encode(text)) == len(text.split()) + 1, text
    ids, mask = captions.encode(file, texts[:40])
    expected_ids, expected_mask = tokenizer(texts[:40])
    assert torch.equal(ids, expected_ids)
    assert torch.equal(mask, expected_mask)
    assert tokenizer.vocab_size <= Plan().text_vocabulary

    merges = captions.train_merges(captions.corpus())
    clip = CLIPTokenizer(merges)
    assert clip.vocab_size == 512 + len(merges) + 2
    for name in captions.NAMES:  # one token a word, between start and end
        assert clip.encode(name)[1] == len(name.split()) + 2, name


def test_split_is_a_property_of_the_drawing() -> None:
    images = np.random.default_rng(0).integers(0, 256, (400, 28, 28), dtype=np.uint8)
    out = drawings.held_out(images)
    assert 20 < out.sum() < 60
    assert (out == drawings.held_out(images[:, :, ::-1])).all()
    assert (out[::-1] == drawings.held_out(images[::-1])).all()


def test_augmented_drawings_are_pictures() -> None:
    images = torch.zeros(8, 64, 64, dtype=torch.uint8)
    images[:, 20:40, 20:24] = 255
    x = drawings.augment(images, torch.Generator().manual_seed(0))
    assert x.shape == (8, 3, 64, 64)
    assert -1 <= x.min() < -0.99
    assert x.max() == 1
    ink = (1 - x[:, 0]).flatten(1).sum(1) / 2
    assert ((ink > 50) & (ink < 90)).all()  # 80 pixels, shrunk by at most 0.85 a side


def test_a_resumed_training_is_the_uninterrupted_one(trainer: Trainer, tmp_path) -> None:
    for _ in range(3):
        trainer.train_step()
    save(trainer.state(), tmp_path / "checkpoint.pt")
    later = [trainer.train_step() for _ in range(4)]  # from 16 px over 32 px to 64 px

    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    again = Trainer(TINY, trainer.data, CONCEPTS, trainer.ids, trainer.mask)
    again.load(state)
    assert [again.train_step() for _ in range(4)] == later
    assert again.seen == trainer.seen == 28
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    for name, value in trainer.ema.items():
        assert torch.equal(value, again.ema[name]), name


def test_every_stretch_moves_what_it_uses(trainer: Trainer) -> None:
    def snapshot() -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    start = snapshot()
    trainer.train_step()
    inner = snapshot()
    assert torch.equal(start["unet.conv_out.weight"], inner["unet.conv_out.weight"])
    conv = "unet.mid_block.resnets.0.conv2.weight"
    assert not torch.equal(start[conv], inner[conv])
    trainer.seen = 16
    trainer.train_step()
    assert not torch.equal(inner["unet.conv_out.weight"], snapshot()["unet.conv_out.weight"])
