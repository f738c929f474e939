"""The noise-aware CLIP's training: resumed as if never stopped, started from exported towers, and it learns."""

import dataclasses
import math

import pytest
import torch

from mtl_anagram.models.tokenizers import CLIPTokenizer
from tests.unit.tiny import save_module
from training import captions, checkpoints, drawings, styles
from training.curate import typical
from training.train_noise_clip import Plan, Trainer, overlaid, worn

CONCEPTS = drawings.CONCEPTS[:12]
TINY = Plan(
    batch=16, pictures=10_000, warmup=16, cooldown=100, lr=3e-3, easy=1, patch=16, width=64,
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
    parts = {"": images, "_shapes": images, "_regions": images // 255, "_labels": labels}
    return {f"{split}{kind}": value for split in ("train", "test") for kind, value in parts.items()}


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer(captions.train_merges(captions.corpus()))


def test_a_resumed_training_is_the_uninterrupted_one(data, tokenizer, tmp_path) -> None:
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
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_towers_are_taken_from_an_export(data, tokenizer, tmp_path) -> None:
    first = Trainer(TINY, data, tokenizer, CONCEPTS)
    first.train_step()
    save_module(first.model.image, tmp_path / "clip_image_enc.safetensors", torch.float16)
    save_module(first.model.text, tmp_path / "clip_text_enc.safetensors", torch.float16)
    second = Trainer(TINY, data, tokenizer, CONCEPTS)
    second.begin_from(tmp_path)
    for name, value in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value.half().float()), name


def test_it_learns(data, tokenizer) -> None:
    plan = dataclasses.replace(TINY, easy=10**9, floor_weight=0.0, lr=1e-3, worn=0.0)  # little noise
    images = torch.zeros(4, 64, 64, dtype=torch.uint8)
    for i in range(4):
        images[i, 16 * i : 16 * i + 12] = 255
    parts = {"": images, "_shapes": images, "_regions": images // 255, "_labels": torch.arange(4)}
    easy = {f"{split}{kind}": value for split in ("train", "test") for kind, value in parts.items()}
    trainer = Trainer(plan, easy, tokenizer, CONCEPTS[:4])
    columns = torch.arange(trainer.weights.shape[1])
    trainer.weights[:, captions.paint_of(columns) != styles.PAINTS.index(styles.sketch)] = 0  # no colours
    losses = [trainer.train_step()[0] for _ in range(150)]
    assert sum(losses[-30:]) / 30 < 0.9 * math.log(4)  # better than knowing no picture
    after = trainer.probe()
    assert set(after) == {str(t) for t in (0, 300, 600, 750, 850, 920, 957)}


def test_worn_pictures_are_still_the_drawing(data) -> None:
    """Slant, softness and tint leave a picture nearer to its own than to any other."""
    g = torch.Generator().manual_seed(0)
    ink = data["train"][:, None].float() / 255
    x0 = (1 - 2 * ink).expand(-1, 3, -1, -1).repeat(8, 1, 1, 1)
    seen = worn(x0, g)
    assert seen.shape == x0.shape
    assert seen.abs().max() <= 1
    assert (seen - x0).abs().mean((1, 2, 3)).min() > 0.01
    profile = [x[..., 16:48].mean((1, 3)) for x in (seen, x0[: len(ink)])]  # rows, where the slant is small
    near = torch.cdist(*(p - p.mean(1, keepdim=True) for p in profile)).argmin(1)
    places = torch.arange(len(x0)) % len(ink)
    assert ((near - places).abs() <= 1).float().mean() > 0.85


class Reader(torch.nn.Module):
    """A teacher that is sure that everything is the second name it knows."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return 20.0 * torch.nn.functional.one_hot(
            torch.ones(len(pictures), dtype=torch.long), len(self.names)
        )

    def index(self, names: list[str]) -> torch.Tensor:
        return torch.tensor([self.names.index(name) for name in names])


def test_a_teacher_says_what_overlaid_pictures_show(data, tokenizer) -> None:
    plan = dataclasses.replace(TINY, taught=0.5, overlaid=0.4)
    teacher = Reader([*reversed(CONCEPTS)])
    trainer = Trainer(plan, data, tokenizer, CONCEPTS, teacher=teacher)
    said = CONCEPTS.index(teacher.names[1])
    x0 = torch.ones(200, 3, 16, 16)
    x0[:, :, 4:12, 4:12] = torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    wanted = torch.nn.functional.one_hot(torch.zeros(200, dtype=torch.long), len(CONCEPTS)).float()
    seen, answer = trainer.taught(x0, wanted)
    alone = (seen == x0).all(3).all(2).all(1)
    assert 0.5 < alone.float().mean() < 0.7
    assert torch.allclose(answer[alone][:, [0, said]], torch.tensor(0.5), atol=1e-4)
    assert torch.allclose(answer[~alone][:, said], torch.tensor(1.0), atol=1e-4)
    assert torch.allclose(answer.sum(1), torch.ones(200))
    for _ in range(2):
        trainer.train_step()
    again = Trainer(plan, data, tokenizer, CONCEPTS, teacher=teacher)
    again.load(trainer.state())
    assert again.train_step() == trainer.train_step()
    with pytest.raises(SystemExit, match="taught=0.5.*--teacher"):
        Trainer(plan, data, tokenizer, CONCEPTS)
    with pytest.raises(SystemExit, match="taught=0.0.*--taught"):
        Trainer(TINY, data, tokenizer, CONCEPTS, teacher=teacher)


def test_the_typical_drawing_is_the_one_that_the_clip_names() -> None:
    class Sure:
        """Embeds a picture by its mean, of which the first name wants much, the second little."""

        def embed_text(self, texts: list[str]) -> torch.Tensor:
            return torch.tensor([[1.0], [-1.0]])

        def embed_image(self, pictures: torch.Tensor, t: int) -> torch.Tensor:
            return pictures.mean((1, 2, 3))[:, None]

    ink = torch.zeros(2, 64, 64, dtype=torch.uint8)
    ink[1] = 255
    for labels, expected in (((0, 1), 1.0), ((1, 0), 0.0)):
        found = typical(Sure(), ink, torch.tensor(labels), ("duck", "elephant"))
        assert found.tolist() == pytest.approx([expected, expected], abs=1e-6)


def test_an_overlaid_picture_holds_both_drawings() -> None:
    g = torch.Generator().manual_seed(0)
    x0 = torch.ones(64, 3, 16, 16)
    x0[:, :, 8, 4:12] = -1.0  # a bar, which turns show upright in every second batch
    seen = overlaid(x0, g)
    assert seen.shape == x0.shape
    assert torch.equal(seen[:, :, 0], x0[:, :, 0])  # paper stays paper
    assert ((seen[:, :, 8, 4:12] < 0.7).all(dim=(1, 2))).all()  # each one's own lines are left, if faint
    crossed = torch.cat([overlaid(x0, g) for _ in range(8)])
    assert (crossed[:, :, 4:6, 5:11] < 0.7).any(dim=(1, 2, 3)).float().mean() > 0.2  # others' lines are there
