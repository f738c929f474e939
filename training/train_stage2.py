"""Train the stage II UNet of the embedded cascade, 64 to 256 px, in stretches; the text encoder is stage I's."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from mtl_anagram.models import load_t5
from mtl_anagram.models.configs import UNetConfig
from mtl_anagram.models.unet import UNet
from training import captions, checkpoints, drawings, styles
from training.diffusion import STEPS, VLB_WEIGHT, Diffusion, sample
from training.train_stage1 import TEXT_DROPOUT, average, start_near_identity

SIZE = 256
OUT_SCALE = 1.4142271248762552  # the released stage II's, 1/0.7071
GIVEN = ("pictures", "cooldown", "whole", "crop", "batch", "seed", "lr")  # settings of the command


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides the weights, besides the data and stage I's text encoder.

    Training sees random squares of `crop` px of the 256 px pictures, but the last `whole` pictures entire. The
    low-resolution input is a 64 px picture, softened by up to `soft` px of its own, enlarged, and noised at a
    level drawn evenly from 0 to `noise_level`.
    """

    seed: int = 0
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: int = 2_000
    cooldown: int = 8_000
    pictures: int = 40_000
    whole: int = 4_000
    crop: int = 128
    batch: int = 16
    soft: float = 0.7
    noise_level: int = 300
    bf16: bool = True
    typical: float = 0.6
    widths: tuple[int, ...] = (16, 32, 64, 96)
    layers: tuple[int, ...] = (1, 1, 1, 1)
    head: int = 32
    groups: int = 8
    width: int = 128

    def rate(self, seen: int) -> float:
        """The learning rate after `seen` pictures."""
        fall = 1 - 0.98 * min(1.0, max(0.0, 1 - (self.pictures - seen) / self.cooldown))
        return self.lr * min(1.0, (seen + 1) / self.warmup) * fall

    def stretch(self, seen: int) -> tuple[int, int]:
        """The side of the squares after `seen` pictures, and the batch's size: the same number of pixels."""
        if seen < self.pictures - self.whole:
            return self.crop, self.batch
        return SIZE, max(1, self.batch * self.crop**2 // SIZE**2)


def network(plan: Plan) -> UNet:
    """Stage II's UNet, attention at the innermost level alone; residual branches begin at zero."""
    plain = len(plan.widths) - 1
    unet = UNet(
        UNetConfig(
            block_out_channels=plan.widths, layers_per_block=plan.layers, cross_attention_dim=plan.width,
            encoder_hid_dim=plan.width, in_channels=6, attention_head_dim=plan.head,
            down_block_types=(*["ResnetDownsampleBlock2D"] * plain, "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", *["ResnetUpsampleBlock2D"] * plain),
            addition_embed_type_num_heads=plan.width // 32, norm_num_groups=plan.groups, sample_size=SIZE,
            class_embed_type="timestep", time_embedding_dim=plan.width, time_embedding_act_fn="gelu",
            resnet_skip_time_act=True, resnet_out_scale_factor=OUT_SCALE, mid_block_scale_factor=OUT_SCALE,
        )
    )  # fmt: skip
    start_near_identity(unet)
    return unet


class Trainer:
    """The state of a training, one step at a time; all randomness comes from one generator.

    states (K, 77, D): the text encoder's of every caption of `captions.caption_table(concepts)`.
    """

    def __init__(
        self,
        plan: Plan,
        data: dict[str, Tensor],
        concepts: tuple[str, ...],
        states: Tensor,
        typical: Tensor | None = None,
    ) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self.data, self.states = plan, data, states
        _, self.places, self.weights = captions.caption_table(concepts)
        self.unet = network(plan)
        self.ema = {name: p.detach().clone() for name, p in self.unet.named_parameters()}
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(), lr=plan.lr, betas=(0.9, 0.99), weight_decay=plan.weight_decay, fused=True
        )
        self.generator = torch.Generator().manual_seed(plan.seed + 1)
        self.rows = drawings.by_concept(data["train_labels"], len(concepts), typical, plan.typical)
        self.diffusion = Diffusion.cosine()
        self.step, self.seen, self.seconds = 0, 0, 0.0

    def batch(self, side: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures (B, 3, side, side), their enlarged low-resolution twins, captions (B,) long."""
        g = self.generator
        rows, concepts = drawings.draw_rows(self.rows, size, g)
        fields = drawings.augment(self.data["train"][rows], self.data["train_shapes"][rows], g, SIZE)
        choice = torch.multinomial(self.weights[concepts], 1, generator=g)[:, 0]
        x0 = styles.paint(fields, captions.paint_of(choice), g)
        small = F.avg_pool2d(x0, SIZE // drawings.SIZE)
        softness = torch.rand((), generator=g).item() * self.plan.soft
        if softness > 0.2:
            small = drawings.convolved(small, drawings.gaussian(softness))
        large = F.interpolate(small, (SIZE, SIZE), mode="bilinear", align_corners=True)
        texts = self.places[concepts, choice]
        texts = torch.where(torch.rand(size, generator=g) < TEXT_DROPOUT, 0, texts)
        if side < SIZE:  # whole pixels of the UNet's innermost level, so that a square sees the grid it will
            top, left = (8 * torch.randint((SIZE - side) // 8 + 1, (2,), generator=g)).tolist()
            x0, large = (x[..., top : top + side, left : left + side] for x in (x0, large))
        return x0.contiguous(), large, texts

    def train_step(self) -> tuple[float, float, float]:
        """One update; returns the noise's error, the bound and the gradient's norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate(self.seen)
        g = self.generator
        side, size = self.plan.stretch(self.seen)
        x0, large, texts = self.batch(side, size)
        noise = torch.randn(x0.shape, generator=g)
        t = torch.randint(STEPS, (size,), generator=g)
        x_t = self.diffusion.noised(x0, t, noise)
        level = torch.randint(self.plan.noise_level + 1, (size,), generator=g)
        low = self.diffusion.noised(large, level, torch.randn(large.shape, generator=g))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.plan.bf16):
            prediction = self.unet(torch.cat([x_t, low], 1), t, self.states[texts], class_labels=level)
        simple, bound = self.diffusion.losses(prediction, x0, x_t, t, noise)
        (simple.mean() + VLB_WEIGHT * bound.mean()).backward()
        norm = nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        if torch.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step, self.seen = self.step + 1, self.seen + size
        average(self.ema, self.unet, self.step)
        return simple.mean().item(), bound.mean().item(), norm.item()

    def begin_from(self, folder: Path) -> None:
        """Start from an exported stage II of the same sizes."""
        self.unet.load_state_dict(load_file(folder / "unet/diffusion_pytorch_model.safetensors"))
        self.ema = {name: p.detach().clone() for name, p in self.unet.named_parameters()}

    def state(self) -> dict[str, Any]:
        """All that a later stretch needs to go on as if there had been no break."""
        return {
            "plan": dataclasses.asdict(self.plan), "step": self.step, "seen": self.seen, "seconds": self.seconds,
            "model": self.unet.state_dict(), "ema": self.ema, "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        self.unet.load_state_dict(state["model"])
        self.ema = {name: value.clone() for name, value in state["ema"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step, self.seen, self.seconds = state["step"], state["seen"], state["seconds"]

    @torch.no_grad()
    def samples(self, count: int = 7, steps: int = 20, level: int = 50) -> Tensor:
        """Held-out drawings enlarged by the averaged weights, above the drawings themselves."""
        unet = network(self.plan)
        unet.load_state_dict(self.ema)
        unet.eval()
        g = torch.Generator().manual_seed(11)
        rows = torch.randperm(len(self.data["test_labels"]), generator=g)[:count]
        fields = drawings.augment(self.data["test"][rows], self.data["test_shapes"][rows], g, SIZE)
        which = torch.arange(count) % len(styles.PAINTS)
        x0 = styles.paint(fields, which, g)
        small = F.avg_pool2d(x0, SIZE // drawings.SIZE)
        large = F.interpolate(small, (SIZE, SIZE), mode="bilinear", align_corners=True)
        levels = torch.full((count,), level)
        low = self.diffusion.noised(large, levels, torch.randn(large.shape, generator=g))
        words = [next(i for i, s in enumerate(styles.STYLES.values()) if s is p) for p in styles.PAINTS]
        columns = torch.tensor(words)[which]
        texts = self.states[self.places[self.data["test_labels"][rows], columns]]

        def predict(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                out = unet(torch.cat([x, low], 1), t, texts, class_labels=levels).float()
            return out, out

        made = sample(predict, x0.shape, g, steps=steps, guidance=1.0, limit=1.0)
        return torch.cat([large, made, x0])


@torch.no_grad()
def caption_states(weights: Path, concepts: tuple[str, ...]) -> Tensor:
    """The exported text encoder's states of every caption, (K, 77, D) float32."""
    texts, _, _ = captions.caption_table(concepts)
    ids, mask = captions.encode(weights / "stage_1/tokenizer/spiece.model", texts)
    encoder = load_t5(weights / "stage_1", dtype=torch.float32)
    return torch.cat([encoder(i, m) for i, m in zip(ids.split(128), mask.split(128), strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder of the drawings (see training/README.md)")
    parser.add_argument("--cache", default="runs/data", help="folder of the packed drawings")
    parser.add_argument("--weights", default="weights", help="the cascade, with its text encoder exported")
    parser.add_argument(
        "--run", default="runs/stage_2", help="folder of the checkpoint, log and sample sheets"
    )
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="stop after this long; the same command goes on"
    )
    parser.add_argument(
        "--pictures", type=int, default=None, help="length of the whole training, in pictures"
    )
    parser.add_argument(
        "--cooldown", type=int, default=None, help="pictures over which the learning rate falls"
    )
    parser.add_argument("--whole", type=int, default=None, help="pictures that are seen entire, at last")
    parser.add_argument("--crop", type=int, default=None, help="side of the squares, a multiple of 64")
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--lr", type=float, default=None)
    parser.add_argument(
        "--init", default=None, help="an exported stage_2 folder to start from, the first time"
    )
    parser.add_argument("--checkpoint-minutes", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = Path(args.run)
    run.mkdir(parents=True, exist_ok=True)
    state = checkpoints.load(run)
    settings = {} if state is None else dict(state["plan"])
    settings.update({name: getattr(args, name) for name in GIVEN if getattr(args, name) is not None})
    plan = Plan(**{name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()})
    concepts = drawings.CONCEPTS
    data = drawings.load(args.data, concepts, args.cache)
    typical = drawings.load_typical(args.cache) if plan.typical < 1 else None
    trainer = Trainer(plan, data, concepts, caption_states(Path(args.weights), concepts), typical)
    if state is not None:
        trainer.load(state)
    elif args.init is not None:
        trainer.begin_from(Path(args.init))
    log = (run / "log.jsonl").open("a", buffering=1)
    count = sum(p.numel() for p in trainer.unet.parameters())
    print(
        json.dumps({"parameters": count, "resumed_at": trainer.step, **dataclasses.asdict(plan)}), flush=True
    )
    begin = last_save = last_log = time.monotonic()
    carried, sums, steps, seen_before = trainer.seconds, torch.zeros(3), 0, trainer.seen
    while trainer.seen < plan.pictures and time.monotonic() - begin < 60 * args.minutes:
        sums, steps = sums + torch.tensor(trainer.train_step()), steps + 1
        now = time.monotonic()
        trainer.seconds = carried + now - begin
        if steps == 50:
            simple, bound, norm = (sums / steps).tolist()
            line = {
                "step": trainer.step, "pictures": trainer.seen, "minutes": round(trainer.seconds / 60, 2),
                "loss": round(simple, 5), "vlb": round(bound, 5), "norm": round(norm, 3),
                "per_second": round((trainer.seen - seen_before) / (now - last_log), 1),
            }  # fmt: skip
            log.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
            sums, steps, last_log, seen_before = torch.zeros(3), 0, now, trainer.seen
        if now - last_save > 60 * args.checkpoint_minutes:
            checkpoints.save(trainer.state(), run)
            last_save = time.monotonic()
    checkpoints.save(trainer.state(), run)
    drawings.sheet(trainer.samples(), 7).save(run / f"sheet-{trainer.seen:07d}.png")


if __name__ == "__main__":
    main()
