"""Train the text encoder and the stage I UNet of the embedded cascade together, in stretches."""

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mtl_anagram.models.configs import UNetConfig
from mtl_anagram.models.t5 import T5Config, T5Encoder
from mtl_anagram.models.unet import UNet
from mtl_anagram.models.unet_blocks import JointAttention, Resnet, TextContext
from training import captions, drawings, fewer_keys, loop, styles
from training.diffusion import VLB_WEIGHT, Diffusion, sample, timestep_weights

TEXT_DROPOUT = 0.1  # share of pictures trained on the empty prompt, for guidance
GIVEN = (
    "pictures",
    "text_until",
    "cooldown",
    "batch",
    "seed",
    "lr",
    "typical",
)  # settings of the command


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides the weights, besides the data. pictures: length of the whole training.

    The learning rate rises over `warmup` pictures, stays, and falls linearly to 2% over the last `cooldown` pictures.
    Until then attention looks at no more than `keys` of the pixels, drawn at random; afterwards at all. The
    text encoder learns for the first `text_until` pictures; then it stays, so that stage II can be trained on
    its states while stage I goes on.
    """

    seed: int = 0
    lr: float = 7e-4
    weight_decay: float = 0.01
    warmup: int = 4_000
    cooldown: int = 100_000
    pictures: int = 1_000_000
    batch: int = 32
    keys: int = 256
    text_until: int = 100_000
    widths: tuple[int, ...] = (32, 32, 64, 128)
    layers: tuple[int, ...] = (1, 1, 2, 1)
    head: int = 32
    groups: int = 8
    text_width: int = 128
    text_layers: int = 2
    text_vocabulary: int = 288
    typical: float = 0.3  # of each concept's drawings, the share that is trained on, the most typical ones

    def rate(self, seen: int, step: int) -> float:
        """The learning rate after `seen` pictures and `step` updates of this optimizer."""
        return self.lr * min(1.0, (step * self.batch + 1) / self.warmup) * loop.fall(self, seen)

    def keys_at(self, seen: int) -> int | None:
        """How many pixels an attention layer looks at after `seen` pictures; None = all."""
        return self.keys if seen < self.pictures - self.cooldown else None


@torch.no_grad()
def start_near_identity(unet: UNet) -> None:
    """Residual branches begin at zero or near it, and so does the output."""
    unet.conv_out.weight.zero_()
    for module in unet.modules():
        if isinstance(module, Resnet):
            module.conv2.weight.zero_()
        elif isinstance(module, JointAttention):
            module.to_out[0].weight.mul_(0.1)


class Model(nn.Module):
    """Text encoder and UNet as one thing to optimise."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.t5 = T5Encoder(
            T5Config(
                vocab_size=plan.text_vocabulary, d_model=plan.text_width, d_kv=32, d_ff=2 * plan.text_width,
                num_layers=plan.text_layers, num_heads=plan.text_width // 32,
            )
        )  # fmt: skip
        attend = len(plan.widths) - 1
        self.unet = UNet(
            UNetConfig(
                block_out_channels=plan.widths, layers_per_block=plan.layers,
                cross_attention_dim=plan.text_width, encoder_hid_dim=plan.text_width,
                down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * attend),
                up_block_types=(*["SimpleCrossAttnUpBlock2D"] * attend, "ResnetUpsampleBlock2D"),
                in_channels=3, attention_head_dim=plan.head,
                addition_embed_type_num_heads=plan.text_width // 32, norm_num_groups=plan.groups,
                sample_size=drawings.SIZE,
            )
        )  # fmt: skip
        self._start(plan)

    @torch.no_grad()
    def _start(self, plan: Plan) -> None:
        """Residual branches begin at zero, T5's logits small: both start as nearly the identity."""
        start_near_identity(self.unet)
        for name, parameter in self.t5.named_parameters():
            if name.endswith("SelfAttention.q.weight"):
                parameter.normal_(std=(plan.text_width * 32) ** -0.5)
            elif name.endswith("relative_attention_bias.weight"):
                parameter.mul_(0.1)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        ids: Tensor,
        mask: Tensor,
        rows: Tensor,
        *,
        keys: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Pictures (B, 3, H, W), timesteps (B,), distinct captions (K, 77), each picture's caption (B,).

        keys and generator are `fewer_keys.forward`'s. Returns the UNet's (B, 6, H, W).
        """
        context = chosen(self.unet.prepare(self.t5(ids, mask)), rows)
        return fewer_keys.forward(self.unet, x_t, t, context, keys=keys, generator=generator)


def chosen(context: TextContext, rows: Tensor) -> TextContext:
    """A context's rows, (R,) long, in any order and number."""
    return TextContext(
        context.pooled[rows],
        {name: k[rows] for name, k in context.keys.items()},
        {name: v[rows] for name, v in context.values.items()},
    )


class Trainer(loop.Trainer):
    """Text encoder and UNet, learning from captions and pictures."""

    MEASURES = ("loss", "vlb", "norm")
    model: Model

    def __init__(
        self,
        plan: Plan,
        data: dict[str, Tensor],
        concepts: tuple[str, ...],
        ids: Tensor,
        mask: Tensor,
        typical: Tensor | None = None,
    ) -> None:
        super().__init__(plan, data, concepts, lambda: Model(plan))
        self.texts, *table = captions.caption_table(concepts)
        # ids and mask are of self.texts
        self.places, self.weights, self.ids, self.mask = (x.to(self.device) for x in (*table, ids, mask))
        self.rows = drawings.by_concept(data["train_labels"], len(concepts), typical, plan.typical)
        self.diffusion = Diffusion.cosine().to(self.device)
        self.timesteps = timestep_weights().to(self.device)

    def rate(self) -> float:
        return self.plan.rate(self.seen, self.step)

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pictures (B, 3, 64, 64), their noise, timesteps (B,) and captions (B,), long into self.texts."""
        g = self.generator
        rows, concepts = drawings.draw_rows(self.rows, size, g)
        fields = drawings.augment(self.data, "train", rows, g)
        choice = torch.multinomial(self.weights[concepts], 1, generator=g)[:, 0]
        x0 = styles.paint(fields, captions.paint_of(choice), g)
        texts = self.places[concepts, choice]
        texts = torch.where(torch.rand(size, generator=g, device=g.device) < TEXT_DROPOUT, 0, texts)
        t = torch.multinomial(self.timesteps, size, replacement=True, generator=g)
        x0 = x0.contiguous(memory_format=torch.channels_last)
        return x0, torch.randn(x0.shape, generator=g, device=g.device), t, texts

    def train_step(self) -> tuple[float, float, float]:
        """One update; returns the noise's error, the bound and the gradient's norm."""
        if self.seen >= self.plan.text_until:
            self.freeze_text()
        x0, noise, t, texts = self.batch(self.plan.batch)
        x_t = self.diffusion.noised(x0, t, noise)
        distinct, rows = texts.unique(return_inverse=True)
        with loop.autocast(self.device):
            prediction = self.model(
                x_t, t, self.ids[distinct], self.mask[distinct], rows,
                keys=self.plan.keys_at(self.seen), generator=self.generator,
            )  # fmt: skip
        simple, bound = self.diffusion.losses(prediction, x0, x_t, t, noise)
        norm = self.update(simple.mean() + VLB_WEIGHT * bound.mean(), len(x0))
        return simple.mean().item(), bound.mean().item(), norm

    def freeze_text(self) -> None:
        """From now on the text encoder is its average, and stays."""
        if not next(self.model.t5.parameters()).requires_grad:
            return
        with torch.no_grad():
            for name, parameter in self.model.t5.named_parameters():
                parameter.copy_(self.ema[f"t5.{name}"]).requires_grad_(False)

    def read(self, folder: Path) -> None:
        """Start from an exported stage I of the same sizes."""
        self.model.unet.load_state_dict(load_file(folder / "unet/diffusion_pytorch_model.safetensors"))
        self.model.t5.load_state_dict(load_file(folder / "text_encoder/model.safetensors"))

    def samples(self, count: int, steps: int, guidance: float, seed: int) -> Tensor:
        """`count` pictures of every concept from the averaged weights, (C * count, 3, 64, 64)."""
        return sample_concepts(self.averaged(), self, count, steps, guidance, seed)


@torch.no_grad()
def sample_concepts(
    model: nn.Module, trainer: Trainer, count: int, steps: int, guidance: float, seed: int
) -> Tensor:
    """Guided samples of every concept, the styles in turn; the text is encoded as the library does."""
    words = list({style: words for words, style in styles.STYLES.items()}.values())
    wanted = [f"{words[i % len(words)]} {captions.with_article(c)}" for i, c in enumerate(trainer.concepts)]
    rows = torch.tensor([0, *[trainer.texts.index(text) for text in wanted]], device=trainer.device)
    context = model.unet.prepare(model.t5(trainer.ids[rows], trainer.mask[rows]))
    total = len(wanted) * count
    order = [0] * total + [1 + i for i in range(len(wanted)) for _ in range(count)]
    full = chosen(context, torch.tensor(order, device=trainer.device))

    def predict(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        null, text = model.unet(torch.cat([x, x]), t, full).chunk(2)
        return null, text

    generator = torch.Generator(trainer.device).manual_seed(seed)
    return sample(
        predict, (total, 3, drawings.SIZE, drawings.SIZE), generator, steps=steps, guidance=guidance
    )


def main() -> None:
    args = loop.options(__doc__, Plan(), GIVEN, "runs/stage_1", sheet_minutes=30.0)
    args.add_argument("--tokenizer", default="weights/stage_1/tokenizer/spiece.model")
    arguments = args.parse_args()

    def make(
        plan: Plan, data: dict[str, Tensor], concepts: tuple[str, ...], typical: Tensor | None
    ) -> Trainer:
        ids, mask = captions.encode(arguments.tokenizer, captions.caption_table(concepts)[0])
        return Trainer(plan, data, concepts, ids, mask, typical)

    trainer = loop.begin(arguments, Plan(), GIVEN, make)

    def show(run: Path) -> None:
        pictures = trainer.samples(1, 12, 4.0, 0)
        drawings.sheet(pictures.cpu(), 6).save(run / f"sheet-{trainer.seen:07d}.png")

    loop.go(trainer, arguments, show)


if __name__ == "__main__":
    main()
