"""Train classifiers of clean drawings: the judge of samples, and the curator of training's drawings.

The judge (`python -m training.train_judge`) is trained on a split that the cascade never sees. The curator
(`--curate`) is two classifiers, each trained on one half of the cascade's own drawings and asked about the
other half: the probability that it gives a drawing's own name says how typical the drawing is. The teacher
(`--teacher`) is trained on all of the cascade's own drawings; the CLIP learns from its answers. The judge and the
others never see each other's drawings or answers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl_anagram.atomic import write_atomically
from mtl_anagram.models.judge import Judge
from training import drawings, styles


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides the weights, besides the data. styled: the share not drawn as a sketch."""

    seed: int = 0
    batch: int = 64
    pictures: int = 300_000
    lr: float = 2e-3
    weight_decay: float = 0.02
    smoothing: float = 0.05
    styled: float = 0.7
    noise: float = 0.15

    def rate(self, seen: int) -> float:
        """The learning rate after `seen` pictures: up over 4,000, then down to nothing."""
        return self.lr * min(1.0, (seen + 1) / 4_000) * max(0.02, 1 - seen / self.pictures)


def train(
    plan: Plan, ink: Tensor, shapes: Tensor, labels: Tensor, names: tuple[str, ...], minutes: float = 1e9
) -> Judge:
    """A judge of `names` from drawings (N, 64, 64), every name equally often."""
    torch.manual_seed(plan.seed)
    generator = torch.Generator().manual_seed(plan.seed + 1)
    judge = Judge(list(names))
    optimizer = torch.optim.AdamW(judge.parameters(), lr=plan.lr, weight_decay=plan.weight_decay, fused=True)
    rows = drawings.by_concept(labels, len(names))
    start, seen, right = time.monotonic(), 0, 0.0
    while seen < plan.pictures and time.monotonic() - start < 60 * minutes:
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(seen)
        chosen, targets = drawings.draw_rows(rows, plan.batch, generator)
        fields = drawings.augment(ink[chosen], shapes[chosen], generator)
        which = torch.randint(1, len(styles.PAINTS), (plan.batch,), generator=generator)
        which[torch.rand(plan.batch, generator=generator) >= plan.styled] = 0
        pictures = styles.paint(fields, which, generator)
        level = plan.noise * torch.rand(plan.batch, 1, 1, 1, generator=generator)
        pictures = pictures + level * torch.randn(pictures.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = judge(pictures)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=plan.smoothing)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += plan.batch
        right += 0.02 * ((logits.argmax(1) == targets).float().mean().item() - right)
        if seen // plan.batch % 200 == 0:
            print(f"{seen} pictures, {time.monotonic() - start:.0f} s, right {right:.3f}", flush=True)
    return judge.eval()


@torch.no_grad()
def answers(judge: Judge, ink: Tensor, shapes: Tensor, style: int = 0, seed: int = 0) -> Tensor:
    """Log probabilities (N, K) of drawings as they are, in one style."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for start in range(0, len(ink), 256):
        fields = torch.stack([ink[start : start + 256], shapes[start : start + 256]], 1).float().div(255)
        pictures = styles.paint(fields, torch.full((len(fields),), style), generator)
        out.append(judge(pictures).log_softmax(1))
    return torch.cat(out)


def curate(plan: Plan, data: dict[str, Tensor], names: tuple[str, ...]) -> Tensor:
    """For every drawing of the train split how typical it is, (N,) in [0, 1]."""
    labels = data["train_labels"]
    half = torch.randperm(len(labels), generator=torch.Generator().manual_seed(plan.seed)) % 2
    typical = torch.zeros(len(labels))
    for part in (0, 1):
        own, other = half == part, half != part
        judge = train(
            dataclasses.replace(plan, seed=plan.seed + 10 + part), data["train"][own],
            data["train_shapes"][own], labels[own], names,
        )  # fmt: skip
        found = answers(judge, data["train"][other], data["train_shapes"][other])
        typical[other] = found.gather(1, labels[other][:, None])[:, 0].exp()
    return typical


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of the drawings (see training/README.md)")
    parser.add_argument("--cache", default="runs/data", help="folder of the packed drawings")
    parser.add_argument("--out", help="its folder (default: weights/judge, the teacher's: runs/teacher)")
    parser.add_argument("--pictures", type=int, default=Plan.pictures)
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--teacher", action="store_true", help="train on the cascade's split, not the judge's")
    other.add_argument("--curate", action="store_true", help="write CACHE/typical.pt instead of a judge")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = drawings.CONCEPTS
    data = drawings.load(args.data, names, args.cache)
    if args.curate:
        plan = Plan(pictures=args.pictures, styled=0.0)
        typical = curate(plan, data, names)
        for label, name in enumerate(names):
            own = typical[data["train_labels"] == label]
            print(f"{name}: {len(own)} drawings, median {own.median():.2f}, above 0.8 {(own > 0.8).sum()}")
        torch.save(typical, Path(args.cache) / "typical.pt")
        return
    plan, split = Plan(pictures=args.pictures), "judge"
    if args.teacher:  # another start than the judge's, besides other drawings
        plan, split = dataclasses.replace(plan, seed=plan.seed + 5), "train"
    judge = train(plan, data[split], data[f"{split}_shapes"], data[f"{split}_labels"], names)
    labels, accuracy = data["test_labels"], {}
    for place, style in enumerate(styles.PAINTS):
        found = answers(judge, data["test"], data["test_shapes"], place).argmax(1) == labels
        each = torch.stack([found[labels == k].float().mean() for k in range(len(names))])
        accuracy[style.__name__] = round(each.mean().item(), 4)
        if place == 0:
            by_name = {name: round(value, 4) for name, value in zip(names, each.tolist(), strict=True)}
    facts = {"held_out_drawings": len(labels), "accuracy_by_style": accuracy, "accuracy_by_name": by_name}
    print(json.dumps(facts, indent=2))
    from safetensors.torch import save

    out = Path(args.out or ("runs/teacher" if args.teacher else "weights/judge"))
    state = {name: tensor.half().contiguous() for name, tensor in judge.state_dict().items()}
    write_atomically(out / "judge.safetensors", save(state))
    about = {"names": list(names), "plan": dataclasses.asdict(plan), "split": split, **facts}
    write_atomically(out / "judge.json", (json.dumps(about, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
