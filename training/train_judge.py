"""Train classifiers of clean drawings: the judge of samples, and the CLIP's teacher.

The judge (`python -m training.train_judge`) is trained on a split that the cascade never sees. The teacher
(`--teacher`) is trained on the cascade's own drawings; the CLIP learns from its answers. Neither sees the other's
drawings or answers.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor

from mtl_anagram.files.atomic import write_atomically
from mtl_anagram.models import Judge, load_judge
from training import drawings, loop, styles
from training.train_stage1 import average

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
        fall = 1 - 0.98 * min(1.0, max(0.0, 1 - (self.pictures - seen) / self.cooldown))
        return self.lr * min(1.0, (seen + 1) / 4_000) * fall


class Trainer:
    """The state of a training on one split, one step at a time; all randomness comes from one generator."""

    MEASURES = ("loss", "right")

    def __init__(
        self, plan: Plan, data: dict[str, Tensor], concepts: tuple[str, ...], split: str = "judge"
    ) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self.data, self.concepts, self.split = plan, data, concepts, split
        self.device = data[split].device
        self.judge = Judge(list(concepts)).to(self.device, memory_format=torch.channels_last)
        self.ema = {name: p.detach().clone() for name, p in self.judge.named_parameters()}
        self.optimizer = torch.optim.AdamW(
            self.judge.parameters(), lr=plan.lr, weight_decay=plan.weight_decay, fused=True
        )
        self.generator = torch.Generator(self.device).manual_seed(plan.seed + 1)
        self.rows = drawings.by_concept(data[f"{split}_labels"], len(concepts))
        self.step, self.seen, self.seconds = 0, 0, 0.0

    def train_step(self) -> tuple[float, float]:
        """One update; returns the loss and the share of pictures that it named."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate(self.seen)
        g, plan, device = self.generator, self.plan, self.device
        rows, targets = drawings.draw_rows(self.rows, plan.batch, g)
        fields = drawings.augment(self.data, self.split, rows, g)
        which = torch.randint(len(styles.PAINTS), (plan.batch,), generator=g, device=device)
        pictures = styles.paint(fields, which, g)
        level = plan.noise * torch.rand(plan.batch, 1, 1, 1, generator=g, device=device)
        pictures = pictures + level * torch.randn(pictures.shape, generator=g, device=device)
        with loop.autocast(device):
            logits = self.judge(pictures.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=plan.smoothing)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step, self.seen = self.step + 1, self.seen + self.plan.batch
        average(self.ema, self.judge, self.step)
        return loss.item(), (logits.argmax(1) == targets).float().mean().item()

    def averaged(self) -> Judge:
        """The judge with its averaged weights."""
        judge = Judge(list(self.concepts)).to(self.device)
        judge.load_state_dict(self.ema)
        return judge.eval()

    def begin_from(self, folder: Path) -> None:
        """Start from an exported judge of the same names."""
        if load_judge(folder, subfolder=None).names != list(self.concepts):
            raise SystemExit(f"{folder} tells other names apart")
        self.judge.load_state_dict(load_file(folder / "judge.safetensors"))
        self.ema = {name: p.detach().clone() for name, p in self.judge.named_parameters()}

    def state(self) -> dict[str, Any]:
        """All that a later stretch needs to go on as if there had been no break."""
        return {
            "plan": dataclasses.asdict(self.plan), "concepts": self.concepts, "step": self.step,
            "seen": self.seen, "seconds": self.seconds, "model": self.judge.state_dict(), "ema": self.ema,
            "optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state(),
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        self.judge.load_state_dict(state["model"])
        self.ema = {name: value.to(self.device) for name, value in state["ema"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        loop.restore(self.generator, state["generator"], self.plan.seed + 1 + state["step"])
        self.step, self.seen, self.seconds = state["step"], state["seen"], state["seconds"]


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
