"""How a drawing's strokes and shape become a picture: one function of both fields per style.

A style is a way to lay paper, tone and colour; each is drawn at 64 px and at 256 px by the same rule, with
lengths in 64ths of the picture's side. Colours and grain are random, from the caller's generator.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from training.drawings import SIZE, convolved, gaussian

Paint = Callable[[Tensor, Tensor, torch.Generator], Tensor]


def sketch(ink: Tensor, shape: Tensor, generator: torch.Generator) -> Tensor:
    """Black strokes on white paper."""
    return over(flat(ink, 1.0), ink, -1.0)


def brush(ink: Tensor, shape: Tensor, generator: torch.Generator) -> Tensor:
    """Strokes two to three times as wide, black on white."""
    return over(flat(ink, 1.0), widened(ink), -1.0)


def stencil(ink: Tensor, shape: Tensor, generator: torch.Generator) -> Tensor:
    """The shape in black; strokes well inside it are cut out."""
    within = convolved(shape, gaussian(3.0 * scale_of(ink)))
    inner = (ink * ((within - 0.88) / 0.08).clamp(0, 1)).clamp(0, 1)
    return over(over(flat(ink, 1.0), shape, -1.0), inner, 1.0)


def charcoal(ink: Tensor, shape: Tensor, generator: torch.Generator) -> Tensor:
    """Soft dark strokes over a grey shape that darkens to one side, with the grain of rough paper."""
    count, s = len(ink), scale_of(ink)
    side = F.interpolate(
        torch.rand(count, 1, 2, 2, generator=generator), size=ink.shape[-2:], mode="bilinear"
    )  # (B, 1, H, W)
    tone = convolved(shape, gaussian(0.8 * s)) * (0.35 + 0.45 * side)
    tone = tone * (1 + 0.12 * grain(ink, generator)).clamp(0, 2)
    soft = (1.35 * convolved(ink, gaussian(0.6 * s))).clamp(0, 1)
    return over(over(flat(ink, 0.92), tone.clamp(0, 1), -0.75), soft, -0.95)


def chalk(ink: Tensor, shape: Tensor, generator: torch.Generator) -> Tensor:
    """Grainy white strokes, the shape lightly rubbed in, on a dark green or slate board."""
    board = pick(len(ink), ((-0.75, -0.55, -0.62), (-0.72, -0.72, -0.68), (-0.85, -0.75, -0.55)), generator)
    rubbed = shape * 0.22 * (1 + 0.25 * grain(ink, generator)).clamp(0, 2)
    strokes = widened(ink, 0.33) * (0.93 + 0.08 * grain(ink, generator))
    picture = board.expand(-1, -1, *ink.shape[-2:])
    return over(over(picture, rubbed.clamp(0, 1), 0.9), strokes.clamp(0, 1), 0.95)


def neon(ink: Tensor, shape: Tensor, generator: torch.Generator) -> Tensor:
    """Bright tubes of one colour with their glow, on a black wall."""
    colour = hues(len(ink), generator)
    s = scale_of(ink)
    glow = (1.1 * convolved(ink, gaussian(2.2 * s))).clamp(0, 1)
    core = (convolved(ink, gaussian(0.5 * s)) * 1.2).clamp(0, 1)
    picture = over(flat(ink, -0.92), glow * 0.8, colour)
    return over(over(picture, core, colour), core**3 * 0.6, 1.0)


def painting(ink: Tensor, shape: Tensor, generator: torch.Generator) -> Tensor:
    """The shape in one colour on a pale ground of another, outlined in a dark tone of its own."""
    colour, ground = hues(len(ink), generator), hues(len(ink), generator)
    picture = (0.75 + 0.2 * ground).expand(-1, -1, *ink.shape[-2:])
    picture = over(picture, shape, 0.1 + 0.75 * colour)
    return over(
        picture, (1.1 * convolved(ink, gaussian(0.4 * scale_of(ink)))).clamp(0, 1), 0.35 * colour - 0.6
    )


# The words before a drawing's name, and how it is then drawn. The first line's words are training's default.
STYLES: dict[str, Paint] = {
    **dict.fromkeys(
        (
            "", "a sketch of", "a drawing of", "a doodle of", "a line drawing of", "an ink drawing of",
            "a pencil sketch of", "a simple drawing of", "a picture of",
        ),
        sketch,
    ),
    "a thick brush drawing of": brush,
    "a stencil of": stencil,
    "a charcoal drawing of": charcoal,
    "a chalk drawing of": chalk,
    "a neon sign of": neon,
    "a painting of": painting,
}  # fmt: skip
PAINTS: tuple[Paint, ...] = tuple(dict.fromkeys(STYLES.values()))


def paint(fields: Tensor, which: Tensor, generator: torch.Generator) -> Tensor:
    """Fields (B, 2, H, W) of strokes and shapes, PAINTS' places (B,) -> pictures (B, 3, H, W) in [-1, 1]."""
    out = fields.new_empty(len(fields), 3, *fields.shape[-2:])
    for place in which.unique().tolist():
        rows = which == place
        out[rows] = PAINTS[place](fields[rows, :1], fields[rows, 1:], generator)
    return out.clamp_(-1, 1)


def over(picture: Tensor, mask: Tensor, colour: Tensor | float) -> Tensor:
    """`colour` laid over a picture (B, 3, H, W) where the mask (B, 1, H, W) in [0, 1] says."""
    return picture + mask * (colour - picture)


def flat(ink: Tensor, value: float) -> Tensor:
    """A picture (B, 3, H, W) of one grey, as large as `ink`."""
    return ink.new_full((len(ink), 3, *ink.shape[-2:]), value)


def widened(ink: Tensor, threshold: Tensor | float = 0.25) -> Tensor:
    """Strokes (B, 1, H, W) as wide as their blur stays above the threshold."""
    s = scale_of(ink)
    wide = torch.sigmoid((convolved(ink, gaussian(1.0 * s)) - threshold) * 16)
    return ((wide - 0.03) / 0.94).clamp(0, 1)


def grain(ink: Tensor, generator: torch.Generator) -> Tensor:
    """Noise (B, 1, H, W) of unit variance whose specks are as large as a pixel of 64."""
    count = len(ink)
    specks = torch.randn(count, 1, SIZE, SIZE, generator=generator)
    return specks if scale_of(ink) == 1 else F.interpolate(specks, size=ink.shape[-2:], mode="bicubic")


def hues(count: int, generator: torch.Generator) -> Tensor:
    """Saturated colours (B, 3, 1, 1) in [-1, 1], every hue equally likely."""
    angle = torch.rand(count, 1, generator=generator) + torch.tensor([0.0, 1 / 3, 2 / 3])
    return (1.2 * torch.cos(2 * torch.pi * angle) + 0.2).clamp(-1, 1)[:, :, None, None]


def pick(count: int, colours: tuple[tuple[float, float, float], ...], generator: torch.Generator) -> Tensor:
    """One of the colours for each of `count` pictures, (B, 3, 1, 1)."""
    return torch.tensor(colours)[torch.randint(len(colours), (count,), generator=generator)][:, :, None, None]


def scale_of(ink: Tensor) -> float:
    """Pixels of this picture per pixel of 64."""
    return ink.shape[-1] / SIZE
