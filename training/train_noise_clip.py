"""Train the embedded cascade's noise-aware CLIP: which caption belongs to a drawing under noise."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from mtl_anagram.models import Judge, load_judge
from mtl_anagram.models.attention import sinusoids
from mtl_anagram.models.noise_clip import ImageEncoder, TextEncoder
from mtl_anagram.models.tokenizers import CLIPTokenizer
from training import captions, drawings, loop, styles
from training.diffusion import STEPS, Diffusion

# Settings of the command.
GIVEN = ("pictures", "batch", "cooldown", "seed", "lr", "typical", "clear", "worn", "taught", "overlaid")
CLEAR = 150  # timesteps with hardly any noise
PROBES = (0, 300, 600, 750, 850, 920, 957)  # timesteps at which held-out drawings are scored


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides the weights, besides the data.

    `scale` divides the softmax's temperature and is fixed. A share `one_style` of the batches has pictures and
    captions in one style alone, so that the style gives nothing away. `floor`: cosines below it are pushed up,
    because balancing raises them to negative powers (the published CLIP's are positive for pictures of any
    kind). `half_range`: the share of pictures handed over as x/2 + 0.5, the range in which the released code
    scores pictures.
    `clear`: the share of pictures with hardly any noise, t < 150: the CLIP chooses among finished pictures, too.
    `worn`: the share that looks as if it had been sampled (`worn`).
    `taught`: how much of the answer that is wanted comes from a classifier of clean pictures, the teacher; 0 =
    there is none. `overlaid`: the share of pictures with a second drawing over them, as an anagram has; what
    they show the teacher says alone. Both in batches of one style.
    `easy`: pictures over which the highest timestep rises from 200 to the last.
    """

    seed: int = 0
    batch: int = 96
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 8_000
    cooldown: int = 60_000
    pictures: int = 200_000
    scale: float = 20.0
    floor: float = 0.1
    floor_weight: float = 200.0
    half_range: float = 0.125
    clear: float = 0.25
    worn: float = 0.5
    taught: float = 0.0
    overlaid: float = 0.5
    easy: int = 24_000
    one_style: float = 0.75
    typical: float = 0.6
    patch: int = 8
    width: int = 128
    image_layers: int = 4
    text_layers: int = 2
    embedding: int = 128

    def rate(self, seen: int) -> float:
        """The learning rate after `seen` pictures."""
        return self.lr * min(1.0, (seen + 1) / self.warmup) * loop.fall(self, seen)


class Towers(nn.Module):
    """Both encoders as one thing to optimise."""

    def __init__(self, plan: Plan, vocabulary: int) -> None:
        super().__init__()
        self.image = ImageEncoder(
            image_size=drawings.SIZE, patch_size=plan.patch, width=plan.width, layers=plan.image_layers,
            embedding=plan.embedding, n_timesteps=STEPS,
        )  # fmt: skip
        self.text = TextEncoder(
            vocab=vocabulary, width=plan.width, layers=plan.text_layers, embedding=plan.embedding
        )
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        """Positions, words and times large enough to be told apart from the first step on.

        At the published scale (0.02) they are lost beside the patches, and a short training never sees where
        a patch is. Neighbouring timesteps begin alike.
        """
        picture, text = self.image.blocks["input"], self.text.blocks["input"]
        picture.w_pos.normal_(std=0.5)
        picture.w_t.copy_(sinusoids(torch.arange(STEPS), picture.w_t.shape[1]))
        text.w_voc.normal_(std=0.5)
        text.w_pos.normal_(std=0.1)


class Trainer(loop.Trainer):
    """Both encoders, learning which caption belongs to a noisy picture."""

    MEASURES = ("loss", "top1")
    BETAS, AVERAGED = (0.9, 0.98), False
    model: Towers

    def __init__(
        self,
        plan: Plan,
        data: dict[str, Tensor],
        tokenizer: CLIPTokenizer,
        concepts: tuple[str, ...] = drawings.CONCEPTS,
        typical: Tensor | None = None,
        teacher: Judge | None = None,
    ) -> None:
        if plan.taught and teacher is None:
            raise SystemExit(
                f"taught={plan.taught}, but there is no teacher: give --teacher, a folder of train_judge --teacher"
            )
        if teacher is not None and not plan.taught:
            raise SystemExit(
                f"taught={plan.taught}, so that the teacher would not be asked: give --taught, such as 0.7, or no "
                "--teacher"
            )
        super().__init__(plan, data, concepts, lambda: Towers(plan, tokenizer.vocab_size))
        self.teacher = None if teacher is None else teacher.to(self.device)
        self.known = None if teacher is None else teacher.index(list(concepts)).to(self.device)
        self.rows = drawings.by_concept(data["train_labels"], len(concepts), typical, plan.typical)
        self.diffusion = Diffusion.cosine().to(self.device)
        texts, *table = captions.caption_table(concepts)
        self.places, self.weights = (x.to(self.device) for x in table)
        encoded = [tokenizer.encode(text) for text in texts]
        self.lengths = torch.tensor([length for _, length in encoded], device=self.device)
        self.ids = torch.tensor([ids for ids, _ in encoded], device=self.device)[:, : int(self.lengths.max())]

    def texts(self, choice: Tensor) -> Tensor:
        """Embeddings of one caption for every name; choice (C,) says which of its captions."""
        picked = self.places[torch.arange(len(self.places), device=self.device), choice]
        return self.model.text(self.ids[picked], self.lengths[picked])  # (C, D)

    def train_step(self) -> tuple[float, float]:
        """One update; returns the loss and the share of pictures whose own caption came first."""
        g, size = self.generator, self.plan.batch
        choice = torch.multinomial(self.weights, 1, generator=g)[:, 0]
        one_style = bool(torch.rand((), generator=g, device=g.device) < self.plan.one_style)
        if one_style:
            choice[:] = choice[0]
        rows, labels = drawings.draw_rows(self.rows, size, g)
        fields = drawings.augment(self.data, "train", rows, g)
        like_samples = torch.rand(size, 1, 1, 1, generator=g, device=g.device) < self.plan.worn
        x0 = styles.paint(fields, captions.paint_of(choice[labels]), g)
        x0 = torch.where(like_samples, worn(x0, g), x0)
        wanted = F.one_hot(labels, len(choice)).float()  # (B, C)
        if self.teacher is not None and one_style:
            x0, wanted = self.taught(x0, wanted)
        highest = min(STEPS, 200 + int(0.8 * STEPS * self.seen / self.plan.easy))
        t = torch.randint(highest, (size,), generator=g, device=g.device)
        clear = torch.rand(size, generator=g, device=g.device) < self.plan.clear
        t = torch.where(clear, t % CLEAR, t)
        x_t = self.diffusion.noised(x0, t, torch.randn(x0.shape, generator=g, device=g.device))
        half = torch.rand(size, generator=g, device=g.device) < self.plan.half_range
        x_t = torch.where(half[:, None, None, None], x_t / 2 + 0.5, x_t)
        with loop.autocast(self.device):
            texts, pictures = self.texts(choice), self.model.image(x_t, t)
        cosines = pictures @ texts.T  # (B, C)
        loss = F.cross_entropy(self.plan.scale * cosines, wanted)
        loss = loss + self.plan.floor_weight * F.relu(self.plan.floor - cosines).square().mean()
        self.update(loss, size)
        return loss.item(), (cosines.argmax(1) == labels).float().mean().item()

    @torch.no_grad()
    def taught(self, x0: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Some of the pictures (B, 3, H, W) overlaid, and (B, C) how likely each name is, with the teacher's help."""
        g = self.generator
        two = torch.rand(len(x0), 1, 1, 1, generator=g, device=g.device) < self.plan.overlaid
        x0 = torch.where(two, overlaid(x0, g), x0)
        with loop.autocast(self.device):
            found = self.teacher(x0)  # type: ignore[misc]
        found = found.float()[:, self.known].softmax(1)
        return x0, torch.lerp(wanted, found, torch.where(two[..., 0, 0], 1.0, self.plan.taught))

    @torch.no_grad()
    def probe(self, count: int = 600) -> dict[str, Any]:
        """Held-out drawings, the styles in turn: how often their own caption comes first of all concepts', by t."""
        g = torch.Generator(self.device).manual_seed(7)
        test = drawings.held_out(self.data["test_labels"], count, g)
        labels = self.data["test_labels"][test]
        fields = drawings.as_they_are(self.data, "test", test)
        which = torch.arange(len(test), device=self.device) % len(styles.PAINTS)
        x0 = styles.paint(fields, which, g)
        noise = torch.randn(x0.shape, generator=g, device=g.device)
        words = captions.columns_of_paints().tolist()
        texts = torch.stack(
            [self.texts(torch.full((len(self.places),), word, device=self.device)) for word in words]
        )
        result: dict[str, Any] = {}
        for t in PROBES:
            steps = torch.full((len(test),), t, device=self.device)
            pictures = self.model.image(self.diffusion.noised(x0, steps, noise), steps)
            cosines = (texts[which] @ pictures[:, :, None])[..., 0]  # (N, C), captions in the picture's style
            mine = cosines[torch.arange(len(test), device=self.device), labels]
            result[str(t)] = {
                "top1": round((cosines.argmax(1) == labels).float().mean().item(), 3),
                "cosine": round(mine.mean().item(), 3),
                "lowest": round(cosines.min().item(), 3),
            }
        return result

    def read(self, folder: Path) -> None:
        """Take the weights of an exported CLIP of the same sizes; the optimizer starts anew."""
        for tower, name in ((self.model.image, "clip_image_enc"), (self.model.text, "clip_text_enc")):
            tower.load_state_dict(load_file(folder / f"{name}.safetensors"))


def worn(x0: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] as a sampler might draw them: slanted, soft, tinted, of less contrast.

    The CLIP chooses among samples, and two readings bend each other's lines; seen on flawless drawings alone, it
    takes such flaws for another thing.
    """
    count, device = len(x0), x0.device
    slant = 0.15 * torch.randn(count, 2, 2, generator=generator, device=device).clamp(-2, 2)
    theta = F.pad(torch.eye(2, device=device) + slant, (0, 1))  # (B, 2, 3)
    grid = F.affine_grid(theta, list(x0.shape), align_corners=False)
    x0 = F.grid_sample(x0, grid, mode="bilinear", padding_mode="border", align_corners=False)
    softness = torch.rand(count, 1, 1, 1, generator=generator, device=device)
    x0 = torch.lerp(x0, drawings.convolved(x0, drawings.gaussian(0.8)), softness)
    tint = 0.07 * torch.randn(count, x0.shape[1], 1, 1, generator=generator, device=device)
    contrast = 1 - 0.2 * torch.rand(count, 1, 1, 1, generator=generator, device=device)
    return (contrast * x0 + tint).clamp(-1, 1)


def overlaid(x0: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture (B, 3, H, W) with another one of the batch over it, turned, and fainter or stronger.

    At every pixel stays what is further from its own paper (the mean of the picture's border), as in an anagram
    both readings' lines stay. A classifier knows clean drawings; a student that is asked about mixtures, too,
    learns the function and not the answers (Beyer et al. 2022, arXiv 2106.05237).
    """
    count = len(x0)
    turn = int(torch.randint(4, (), generator=generator, device=x0.device))
    other = x0.roll(1, 0).rot90(turn, (2, 3))
    papers = [
        torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]], 2).mean(2)[..., None, None]
        for x in (x0, other)
    ]
    strength = 0.2 + torch.rand(count, 2, 1, 1, generator=generator, device=x0.device).clamp(max=0.8)
    one, two = strength[:, :1] * (x0 - papers[0]), strength[:, 1:] * (other - papers[1])
    further = two.square().sum(1, keepdim=True) > one.square().sum(1, keepdim=True)
    return (papers[0] + torch.where(further, two, one)).clamp(-1, 1)


def main() -> None:
    parser = loop.options(__doc__, Plan(), GIVEN, "runs/noise_clip")
    parser.add_argument("--merges", default="weights/noise_clip/merges.txt")
    parser.add_argument("--teacher", help="folder that train_judge --teacher wrote; with --taught")
    args = parser.parse_args()
    teacher = None if args.teacher is None else load_judge(args.teacher, subfolder=None)

    def make(
        plan: Plan, data: dict[str, Tensor], concepts: tuple[str, ...], typical: Tensor | None
    ) -> Trainer:
        return Trainer(plan, data, CLIPTokenizer(args.merges), concepts, typical, teacher)

    trainer = loop.begin(args, Plan(), GIVEN, make, drawings.CONCEPTS)
    loop.go(trainer, args, lambda run: {"held_out": trainer.probe()})


if __name__ == "__main__":
    main()
