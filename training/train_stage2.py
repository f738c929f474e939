"""Train the stage II UNet of the embedded cascade, 64 to 256 px, in stretches."""

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from mtl_anagram.models.configs import UNetConfig
from mtl_anagram.models.unet import UNet
from training import drawings, loop, styles
from training.diffusion import STEPS, VLB_WEIGHT, Diffusion, sample
from training.train_stage1 import start_near_identity

SIZE = 256
OUT_SCALE = 1.4142271248762552  # the released stage II's, 1/0.7071
GIVEN = ("pictures", "cooldown", "whole", "crop", "batch", "seed", "lr", "typical")  # settings of the command
COARSE = 0.1  # how much the noise's error in the average of many pixels counts beside the plain one


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides the weights, besides the data.

    Training sees random squares of `crop` px of the 256 px pictures, but the last `whole` pictures entire. The
    low-resolution input is a 64 px picture, softened by up to `soft` px of its own, enlarged, and noised at a
    level drawn evenly from 0 to `noise_level`.
    """

    seed: int = 0
    lr: float = 7e-4
    weight_decay: float = 0.01
    warmup: int = 500
    cooldown: int = 8_000
    pictures: int = 40_000
    whole: int = 4_000
    crop: int = 128
    batch: int = 4
    soft: float = 0.7
    noise_level: int = 300
    typical: float = 0.6
    widths: tuple[int, ...] = (16, 32, 64, 96)
    layers: tuple[int, ...] = (1, 1, 1, 1)
    head: int = 32
    groups: int = 8
    width: int = 128

    def rate(self, seen: int) -> float:
        """The learning rate after `seen` pictures."""
        return self.lr * min(1.0, (seen + 1) / self.warmup) * loop.fall(self, seen)

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
    pass_through(unet)
    leave_out_text(unet)
    return unet


@torch.no_grad()
def leave_out_text(unet: UNet) -> None:
    """Fix the text's entries at zero: every prompt gives the same picture, and guidance of any scale none other.

    The 64 px picture says all that stage II has to know. Guidance multiplies the difference between two
    predictions by up to ten; in a network as small and as briefly trained as this one it would be error alone.
    """
    for weight in (unet.encoder_hid_proj.weight, unet.add_embedding.norm2.weight):
        weight.zero_()
        weight.requires_grad_(False)


@torch.no_grad()
def pass_through(unet: UNet) -> None:
    """Begin with the noise's best guess without a network: x_t itself, at unit variance.

    The picture and its low-resolution twin take the first twelve channels of the outermost level, each colour
    with its negative beside it: a norm over such a pair changes neither's mean, and gelu(x) - gelu(-x) = x. So
    they reach the last convolution as they are, and what is learnt is how they differ from the noise. Without
    this a short training never copies x_t well enough: at t = 950 a noise error of 7% is a picture error of 90%.
    """
    colours, width = unet.conv_in.in_channels, unet.conv_in.out_channels
    if width < 2 * colours or width // unet.conv_norm_out.num_groups != 2:
        raise ValueError(
            f"{width} channels outermost: there must be {2 * colours} or more, two to a norm's group"
        )
    last = unet.up_blocks[-1].resnets[-1]
    inner = last.conv_shortcut.in_channels - width  # channels that come from below; then those of conv_in
    for conv in (unet.conv_in, last.conv_shortcut):
        conv.weight[: 2 * colours] = 0
        conv.bias[: 2 * colours] = 0
    for bias in (last.conv2.bias, unet.conv_out.bias):
        bias.zero_()
    for channel in range(2 * colours):
        sign = 1 - 2 * (channel % 2)
        unet.conv_in.weight[channel, channel // 2, 1, 1] = sign
        last.conv_shortcut.weight[channel, inner + channel, 0, 0] = OUT_SCALE
        if channel < 6:
            unet.conv_out.weight[channel // 2, channel, 1, 1] = sign


class Trainer(loop.Trainer):
    """Stage II's UNet. Its text entries are zero (`leave_out_text`), so one text stands for all."""

    MEASURES = ("loss", "coarse", "vlb", "norm")
    model: UNet

    def __init__(
        self,
        plan: Plan,
        data: dict[str, Tensor],
        concepts: tuple[str, ...],
        typical: Tensor | None = None,
    ) -> None:
        super().__init__(plan, data, concepts, lambda: network(plan))
        self.rows = drawings.by_concept(data["train_labels"], len(concepts), typical, plan.typical)
        self.diffusion = Diffusion.cosine().to(self.device)

    def text(self, count: int) -> Tensor:
        """A text for as many pictures: what it says changes nothing."""
        return torch.zeros(count, 1, self.plan.width, device=self.device)

    def batch(self, side: int, size: int) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, side, side) and their enlarged low-resolution twins."""
        g = self.generator
        rows, _ = drawings.draw_rows(self.rows, size, g)
        fields = drawings.augment(self.data, "train", rows, g, SIZE)
        which = torch.randint(len(styles.PAINTS), (size,), generator=g, device=g.device)
        x0 = styles.paint(fields, which, g)
        small = F.avg_pool2d(x0, SIZE // drawings.SIZE)
        softness = torch.rand((), generator=g, device=g.device).item() * self.plan.soft
        if softness > 0.2:
            small = drawings.convolved(small, drawings.gaussian(softness))
        large = F.interpolate(small, (SIZE, SIZE), mode="bilinear", align_corners=True)
        if side < SIZE:  # whole pixels of the UNet's innermost level, so that a square sees the grid it will
            top, left = (
                8 * torch.randint((SIZE - side) // 8 + 1, (2,), generator=g, device=g.device)
            ).tolist()
            x0, large = (x[..., top : top + side, left : left + side] for x in (x0, large))
        return x0.contiguous(memory_format=torch.channels_last), large

    def train_step(self) -> tuple[float, float, float, float]:
        """One update; returns the noise's error, its coarse part, the bound and the gradient's norm."""
        g = self.generator
        side, size = self.plan.stretch(self.seen)
        x0, large = self.batch(side, size)
        t = torch.randint(STEPS, (size,), generator=g, device=g.device)
        noise = torch.randn(x0.shape, generator=g, device=g.device) + self.diffusion.astray(x0, t, g)
        x_t = self.diffusion.noised(x0, t, noise)
        level = torch.randint(self.plan.noise_level + 1, (size,), generator=g, device=g.device)
        low = self.diffusion.noised(large, level, torch.randn(large.shape, generator=g, device=g.device))
        with loop.autocast(self.device):
            prediction = self.model(torch.cat([x_t, low], 1), t, self.text(size), class_labels=level)
        simple, bound = self.diffusion.losses(prediction, x0, x_t, t, noise)
        coarse = coarse_errors(prediction[:, :3].float() - noise)
        weight = self.diffusion.weight_of_error(t)
        norm = self.update(((simple + COARSE * coarse) * weight).mean() + VLB_WEIGHT * bound.mean(), size)
        return simple.mean().item(), coarse.mean().item(), bound.mean().item(), norm

    def read(self, folder: Path) -> None:
        """Start from an exported stage II of the same sizes."""
        self.model.load_state_dict(load_file(folder / "unet/diffusion_pytorch_model.safetensors"))
        leave_out_text(self.model)

    @torch.no_grad()
    def samples(self, count: int = 6, steps: int = 12, level: int = 50) -> Tensor:
        """Held-out drawings enlarged by the averaged weights, above the drawings themselves."""
        unet, g = self.averaged(), torch.Generator(self.device).manual_seed(11)
        rows = drawings.held_out(self.data["test_labels"], count, g)
        fields = drawings.augment(self.data, "test", rows, g, SIZE)
        which = torch.arange(count, device=g.device) % len(styles.PAINTS)
        x0 = styles.paint(fields, which, g)
        small = F.avg_pool2d(x0, SIZE // drawings.SIZE)
        large = F.interpolate(small, (SIZE, SIZE), mode="bilinear", align_corners=True)
        levels = torch.full((count,), level, device=g.device)
        low = self.diffusion.noised(large, levels, torch.randn(large.shape, generator=g, device=g.device))

        def predict(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
            with loop.autocast(self.device):
                out = unet(torch.cat([x, low], 1), t, self.text(count), class_labels=levels).float()
            return out, out

        made = sample(predict, x0.shape, g, steps=steps, guidance=1.0)
        return torch.cat([large, made, x0])


def coarse_errors(error: Tensor) -> Tensor:
    """The error (B, 3, H, W) of the noise averaged over 2 x 2, 4 x 4, ... 16 x 16 pixels; (B,), their mean.

    Each average is scaled so that a white error counts as much as in the plain loss; one that is the same over
    many pixels counts up to 256 times as much. Without it a short training leaves large areas clouded: their
    tone is one number among 65,536 (the multiscale loss of Hoogeboom et al. 2023, simple diffusion, section 3.2).
    """
    sides = (2, 4, 8, 16)
    return sum(
        ((F.avg_pool2d(error, side) * side).square().flatten(1).mean(1) for side in sides),
        start=error.new_zeros(()),
    ) / len(sides)


def main() -> None:
    parser = loop.options(__doc__, Plan(), GIVEN, "runs/stage_2")
    args = parser.parse_args()

    def make(
        plan: Plan, data: dict[str, Tensor], concepts: tuple[str, ...], typical: Tensor | None
    ) -> Trainer:
        return Trainer(plan, data, concepts, typical)

    trainer = loop.begin(args, Plan(), GIVEN, make)

    def show(run: Path) -> None:
        drawings.sheet(trainer.samples().cpu(), 6).save(run / f"sheet-{trainer.seen:07d}.png")

    loop.go(trainer, args, show)


if __name__ == "__main__":
    main()
