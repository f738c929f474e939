"""The training code: its loss against slow formulas, captions and tokenizers, and a resumed run."""

import math
import re

import numpy as np
import pytest
import torch

from mtl_anagram.models.tokenizers import CLIPTokenizer, T5Tokenizer
from tests.helpers import relative
from tests.unit.tiny import save_module
from training import captions, checkpoints, drawings, packing, styles
from training.diffusion import Diffusion
from training.fewer_keys import attend
from training.train_stage1 import Plan, Trainer, chosen

TINY = Plan(
    batch=4, pictures=40, warmup=8, cooldown=16, widths=(16, 16, 16, 32), layers=(1, 1, 1, 1), head=16, groups=4,
    text_width=32, text_layers=1, text_until=24,
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
        "train_shapes": torch.randint(0, 256, (10, 64, 64), generator=generator, dtype=torch.uint8),
        "train_regions": torch.randint(0, 16, (10, 64, 64), generator=generator, dtype=torch.uint8),
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


def test_captions_name_the_concept_last() -> None:
    texts, places, weights = captions.caption_table(CONCEPTS)
    assert texts[0] == ""
    assert "a sketch of an elephant" in texts
    assert "duck" in texts
    for concept, row, weight in zip(CONCEPTS, places, weights, strict=True):
        assert all(texts[i].endswith(concept) for i in row)
        assert weight.sum().item() == pytest.approx(1)
    assert captions.with_article("headphones") == "headphones"
    paints = captions.paint_of(torch.arange(weights.shape[1]))
    for place in range(len(styles.PAINTS)):
        assert weights[0][paints == place].sum().item() == pytest.approx(1 / len(styles.PAINTS))
    for words in ("a watercolour of", "a watercolor of"):
        column = texts.index(f"{words} a duck") - places[0][0]
        assert styles.PAINTS[captions.paint_of(column)] is styles.watercolour


def test_tokenizers_know_every_word(spiece: bytes, tmp_path) -> None:
    file = tmp_path / "spiece.model"
    file.write_bytes(spiece)
    tokenizer = T5Tokenizer(file)
    texts = [
        f"{style} {captions.with_article(name)}".strip() for name in captions.NAMES for style in styles.STYLES
    ]
    for text in texts:
        assert len(tokenizer.encode(text)) == len(re.findall(r"\w+|\S", text)) + 1, text
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


def test_a_tokenizer_learns_words_and_keeps_its_numbers(spiece: bytes, tmp_path) -> None:
    (tmp_path / "old.model").write_bytes(spiece)
    (tmp_path / "new.model").write_bytes(captions.with_words(spiece, ["a zither of a quokka", "a duck"]))
    old, new = T5Tokenizer(tmp_path / "old.model"), T5Tokenizer(tmp_path / "new.model")
    assert new.vocab_size == old.vocab_size + 2
    assert len(new.encode("a zither of a quokka")) == 6
    for text in ("a painting of a duck", "a house plant", ""):
        assert new.encode(text) == old.encode(text)


def test_split_is_a_property_of_the_drawing() -> None:
    images = np.random.default_rng(0).integers(0, 256, (400, 28, 28), dtype=np.uint8)
    out = drawings.places_of(images)
    assert all(20 < (out == place).sum() < 60 for place in range(10))
    assert (out == drawings.places_of(images[:, :, ::-1])).all()
    assert (out[::-1] == drawings.places_of(images[::-1])).all()


def test_drawings_are_read_from_packs_and_bitmaps(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(packing, "MIN_COUNT", 3)
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (8, 28, 28), dtype=np.uint8)
    fine = rng.integers(0, 256, (4, 64, 64), dtype=np.uint8)
    np.savez(
        tmp_path / "drawings_28.npz", images=coarse, labels=np.arange(8) // 4, names=["duck", "Elephant"]
    )
    np.savez(tmp_path / "drawings_64.npz", images=fine, labels=np.zeros(4, np.int16), names=["elephant"])
    np.save(tmp_path / "cat.npy", coarse.reshape(8, 784))
    np.save(tmp_path / "full_numpy_bitmap_house plant.npy", coarse.reshape(8, 784)[::-1])
    found = packing.read(tmp_path, ("duck", "elephant", "cat", "house plant"))
    assert (found["duck"] == coarse[:4]).all()
    assert (found["elephant"] == fine).all()
    assert (found["cat"] == coarse).all()
    assert (found["house plant"] == coarse[::-1]).all()
    with pytest.raises(SystemExit, match="no drawings of dog, sun"):
        packing.read(tmp_path, ("duck", "dog", "sun"))

    packing.pack(found, tmp_path / "small", 3)
    small = packing.read(tmp_path / "small", tuple(found))
    assert {name: len(images) for name, images in small.items()} == dict.fromkeys(found, 3)
    assert all((small[name] == images[:3]).all() for name, images in found.items())


def test_the_most_typical_drawings_are_kept() -> None:
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    rows = drawings.by_concept(labels, 2, torch.tensor([0.1, 0.9, 0.8, 0.2, 0.5, 0.3]), 0.5)
    assert [sorted(r.tolist()) for r in rows] == [[2, 4], [1, 5]]
    assert [len(r) for r in drawings.by_concept(labels, 2)] == [3, 3]


def test_what_strokes_enclose_is_filled() -> None:
    ring = torch.zeros(3, 64, 64, dtype=torch.uint8)
    ring[:, 10:50, 10:50] = 255
    ring[:, 13:47, 13:47] = 0
    ring[1, 28:31, 10:13] = 0  # a gap of 3 pixels is closed
    ring[2, 24:36, 10:13] = 0  # one of 12 is not
    inside = drawings.enclosed(ring).float().div(255)[:, 20:40, 20:40].mean((1, 2))
    assert inside[:2].min() > 0.99
    assert inside[2] < 0.01
    assert (drawings.enclosed(ring) >= ring).all()


def test_regions_are_what_strokes_leave_free() -> None:
    ink = torch.zeros(3, 64, 64, dtype=torch.uint8)
    for top, bottom, left, right in ((8, 56, 8, 12), (8, 56, 52, 56), (8, 12, 8, 56), (52, 56, 8, 56)):
        ink[:2, top:bottom, left:right] = 255
    ink[0, 20:23, 8:56] = 255  # a bar divides the frame; the larger part is region 1
    ink[1, 30:34, 8:12] = 0  # an open frame holds nothing
    found = drawings.regions(ink)
    assert (found[0, 0, 0], found[0, 40, 30], found[0, 15, 30]) == (0, 1, 2)
    assert found[0].unique().tolist() == [0, 1, 2]
    assert (found[0, 21, 30], found[0, 20, 30]) in ((1, 2), (2, 2), (1, 1))  # strokes belong to a neighbour
    assert not found[1:].any()
    specks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    specks[:, ::3] = specks[:, :, ::3] = 255
    assert not drawings.regions(specks)[:, 1:-1, 1:-1].any()  # too small to be told apart


def frames() -> dict[str, torch.Tensor]:
    ink = torch.zeros(8, 64, 64, dtype=torch.uint8)
    ink[:, 16:48, 16:20] = ink[:, 16:48, 44:48] = ink[:, 16:20, 16:48] = ink[:, 44:48, 16:48] = 255
    return {"train": ink, "train_shapes": drawings.enclosed(ink), "train_regions": drawings.regions(ink)}


@pytest.mark.parametrize("size", [64, 256])
def test_augmented_drawings_keep_their_ink(size: int) -> None:
    data = frames()
    fields = drawings.augment(data, "train", torch.arange(8), torch.Generator().manual_seed(0), size)
    assert fields.shape == (8, 3, size, size)
    assert 0 <= fields[:, :2].min() < 0.01
    assert 0.95 < fields[:, :2].max() <= 1
    assert fields[:, 2].unique().tolist() == [0, 1]
    for place, full in ((0, data["train"]), (1, data["train_shapes"])):
        share = fields[:, place].mean((1, 2)) / full.float().div(255).mean((1, 2))
        assert ((share > 0.68) & (share < 1.1)).all()  # shrunk by at most 0.85 a side


@pytest.mark.parametrize("place", range(len(styles.PAINTS)))
def test_a_style_is_the_same_picture_at_both_sizes(place: int) -> None:
    """Up to its grain and its edges' sharpness: 256 px averaged down are near 64 px."""
    data, made = frames(), []
    for size in (64, 256):
        fields = drawings.augment(data, "train", torch.arange(8), torch.Generator().manual_seed(0), size)
        picture = styles.paint(fields, torch.full((8,), place), torch.Generator().manual_seed(1))
        assert picture.shape == (8, 3, size, size)
        assert -1 <= picture.min() < picture.max() <= 1
        made.append(torch.nn.functional.avg_pool2d(picture, size // 64))
    assert (made[0] - made[1]).abs().mean() < 0.06


def test_strokes_come_out_as_wide_whatever_they_were() -> None:
    ink = torch.zeros(2, 1, 64, 64)
    ink[0, :, :, 30:33] = ink[1, :, :, 29:34] = 1
    widths = styles.thinned(ink, 0.83)[:, 0, 32].sum(1)
    assert ((widths > 1) & (widths < 3)).all()
    assert widths[1] - widths[0] < 1.3  # of 2


def test_colours_say_nothing_of_the_concept() -> None:
    """Every palette comes with every picture, whatever is drawn: a style knows strokes and areas alone."""
    fields = torch.zeros(600, 3, 4, 4)
    d = styles.Drawing(*fields.split(1, 1))
    found = styles.palettes(d, torch.Generator().manual_seed(0))[:, 0, :, 0, 0]
    assert found.unique(dim=0).shape[0] == len(styles.PALETTES) == 12


def test_checkpoints_are_whole_or_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoints, "PIECE", 1000)
    assert checkpoints.load(tmp_path) is None
    for value in (1.0, 2.0):
        checkpoints.save({"numbers": torch.full((1000,), value), "step": 3}, tmp_path)
    pieces = sorted(tmp_path.glob("checkpoint-*"))
    assert all(p.name.startswith("checkpoint-1.") and p.stat().st_size <= 1000 for p in pieces)
    assert len(pieces) > 4
    state = checkpoints.load(tmp_path)
    assert state is not None
    assert state["step"] == 3
    assert (state["numbers"] == 2).all()
    pieces[1].write_bytes(pieces[1].read_bytes()[:-1])
    with pytest.raises(SystemExit, match="bring all of"):
        checkpoints.load(tmp_path)


def test_a_resumed_training_is_the_uninterrupted_one(trainer: Trainer, tmp_path) -> None:
    for _ in range(3):
        trainer.train_step()
    checkpoints.save(trainer.state(), tmp_path)
    later = [trainer.train_step() for _ in range(4)]  # the text encoder stays from the sixth on

    state = checkpoints.load(tmp_path)
    assert state is not None
    again = Trainer(TINY, trainer.data, CONCEPTS, trainer.ids, trainer.mask)
    again.load(state)
    assert [again.train_step() for _ in range(4)] == later
    assert again.seen == trainer.seen == 28
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    for name, value in trainer.ema.items():
        assert torch.equal(value, again.ema[name]), name


def test_the_text_encoder_stays_at_last(trainer: Trainer) -> None:
    trainer.train_step()
    trainer.seen = 24
    trainer.train_step()
    kept = {name: p.detach().clone() for name, p in trainer.model.t5.named_parameters()}
    for name, value in kept.items():
        assert torch.allclose(value, trainer.ema[f"t5.{name}"], atol=1e-7), name
    trainer.train_step()
    for name, parameter in trainer.model.t5.named_parameters():
        assert torch.equal(parameter, kept[name]), name


def test_an_export_is_taken_up(trainer: Trainer, tmp_path) -> None:
    trainer.train_step()
    save_module(trainer.model.unet, tmp_path / "unet/diffusion_pytorch_model.safetensors", torch.float16)
    save_module(trainer.model.t5, tmp_path / "text_encoder/model.safetensors", torch.float16)
    again = Trainer(TINY, trainer.data, CONCEPTS, trainer.ids, trainer.mask)
    again.begin_from(tmp_path)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value.half().float()), name
        assert torch.equal(again.ema[name], value.half().float()), name
