"""Train classifiers of clean drawings: the judge of samples, and the CLIP's teacher.

The judge (`python -m training.train_judge`) is trained on a split that the cascade never sees. The teacher
(`--teacher`) is trained on the cascade's own drawings; the CLIP learns from its answers. Neither sees the other's
drawings or answers.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor

from mtl_anagram.files.atomic import write_atomically
from mtl_anagram.models import Judge, load_judge
from training import drawings, loop, styles

GIVEN = ("pictures", "batch", "cooldown", "seed", "typical")  # settings of the command
TEACHER_SEED = 5  # another start than the judge's, besides other drawings


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides the weights, besides the data."""

    seed: int = 0
    batch: int = 64
    pictures: int = 300_000
    cooldown: int = 150_000
    lr: float = 2e-3
    weight_decay: float = 0.02
    smoothing: float = 0.05
    noise: float = 0.15
    typical: float = 1.0

    def rate(self, seen: int) -> float:
        """The learning rate after `seen` pictures: up over 4,000, level, then down to nearly nothing."""
        return self.lr * min(1.0, (seen + 1) / 4_000) * loop.fall(self, seen)


class Trainer(loop.Trainer):
    """A classifier, learning on one split."""

    MEASURES = ("loss", "right")
    BETAS, LARGEST = (0.9, 0.999), math.inf
    model: Judge

    def __init__(
        self, plan: Plan, data: dict[str, Tensor], concepts: tuple[str, ...], split: str = "judge"
    ) -> None:
        super().__init__(plan, data, concepts, lambda: Judge(list(concepts)))
        self.split = split
        self.rows = drawings.by_concept(data[f"{split}_labels"], len(concepts))

    def train_step(self) -> tuple[float, float]:
        """One update; returns the loss and the share of pictures that it named."""
        g, plan, device = self.generator, self.plan, self.device
        rows, targets = drawings.draw_rows(self.rows, plan.batch, g)
        fields = drawings.augment(self.data, self.split, rows, g)
        which = torch.randint(len(styles.PAINTS), (plan.batch,), generator=g, device=device)
        pictures = styles.paint(fields, which, g)
        level = plan.noise * torch.rand(plan.batch, 1, 1, 1, generator=g, device=device)
        pictures = pictures + level * torch.randn(pictures.shape, generator=g, device=device)
        with loop.autocast(device):
            logits = self.model(pictures.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=plan.smoothing)
        self.update(loss, plan.batch)
        return loss.item(), (logits.argmax(1) == targets).float().mean().item()

    def read(self, folder: Path) -> None:
        """Start from an exported judge of the same names."""
        if load_judge(folder, subfolder=None).names != list(self.concepts):
            raise SystemExit(f"{folder} tells other names apart")
        self.model.load_state_dict(load_file(folder / "judge.safetensors"))


@torch.no_grad()
def answers(
    judge: Judge, data: dict[str, Tensor], split: str, rows: Tensor, style: int, seed: int = 0
) -> Tensor:
    """Log probabilities (N, K) of some of a split's drawings as they are, in one style."""
    generator = torch.Generator(rows.device).manual_seed(seed)
    out = []
    for part in rows.split(256):
        which = torch.full((len(part),), style, device=rows.device)
        pictures = styles.paint(drawings.as_they_are(data, split, part), which, generator)
        out.append(judge(pictures).log_softmax(1))
    return torch.cat(out)


def held_out(trainer: Trainer) -> dict[str, Any]:
    """How many held-out drawings the averaged judge names, each name counted alike: by style, and by name.

    A few of each name as long as the plan is not done, then all.
    """
    data, judge = trainer.data, trainer.averaged()
    each_name = drawings.by_concept(data["test_labels"], len(trainer.concepts))
    rows = torch.cat([own[: None if trainer.seen >= trainer.plan.pictures else 20] for own in each_name])
    labels = data["test_labels"][rows]
    by_style, by_name = {}, torch.zeros(len(trainer.concepts))
    for place in range(len(styles.PAINTS)):
        right = answers(judge, data, "test", rows, place).argmax(1) == labels
        each = torch.stack([right[labels == k].float().mean() for k in range(len(trainer.concepts))]).cpu()
        by_style[styles.PAINTS[place].__name__] = round(each.mean().item(), 4)
        by_name += each / len(styles.PAINTS)
    named = {name: round(value, 4) for name, value in zip(trainer.concepts, by_name.tolist(), strict=True)}
    return {"held_out_drawings": len(labels), "accuracy_by_style": by_style, "accuracy_by_name": named}


def main() -> None:
    parser = loop.options(__doc__.splitlines()[0], Plan(), GIVEN, "runs/judge")
    parser.add_argument(
        "--teacher", action="store_true", help="train on the cascade's split, not the judge's"
    )
    args = parser.parse_args()
    split = "train" if args.teacher else "judge"

    def make(
        plan: Plan, data: dict[str, Tensor], concepts: tuple[str, ...], typical: Tensor | None
    ) -> Trainer:
        return Trainer(plan, data, concepts, split)

    def show(run: Path) -> dict[str, Any]:
        facts = held_out(trainer)
        weights = {name: value.half().contiguous() for name, value in trainer.averaged().state_dict().items()}
        write_atomically(run / "judge.safetensors", save(weights))
        plan = dataclasses.asdict(trainer.plan)
        about = {"names": list(trainer.concepts), "plan": plan, "split": split, "seen": trainer.seen, **facts}
        write_atomically(run / "judge.json", (json.dumps(about, indent=2) + "\n").encode())
        return {"held_out": facts["accuracy_by_style"]}

    plan = Plan(seed=TEACHER_SEED) if args.teacher else Plan()
    trainer = loop.begin(args, plan, GIVEN, make, drawings.CONCEPTS)
    loop.go(trainer, args, show)


if __name__ == "__main__":
    main()
