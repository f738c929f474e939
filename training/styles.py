"""How a drawing becomes a picture: one function of its strokes, shape and regions per style.

A style is a way to lay paper, tone and colour; each is drawn at 64 px and at 256 px by the same rule, with
lengths in 64ths of the picture's side. All colours come from a dozen palettes that every concept shares, so that
colour never says which of two readings a picture is. What is random comes from the caller's generator.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from training.drawings import MOST_REGIONS, SIZE, convolved, gaussian

# Of each palette: a dark for lines, two grounds that go together, five colours for what is drawn.
_HEXES = (
    "1d3557 f1faee a8dadc e63946 457b9d f4a261 2a9d8f e9c46a",
    "3d2b1f f6e7cb e4cf9a bb3e03 ee9b00 7f9039 9b2226 5b8a8a",
    "17301f eef3e2 c6dcb4 40916c a5c957 d9a441 b5562f f2e2a8",
    "2b2145 ffe5d9 e9c6c9 6d597a b56576 e56b6f f0a96b 4a6fa0",
    "03263f e8f6f8 a9dae4 0f6f9c 35a7c4 f5c542 f07167 7fcbb6",
    "3a3042 fff6e6 fbd5d8 f0716f 6f9c86 f6bd60 8f7cc0 f7a072",
    "0b132b 5668a8 6f80bd ffd166 ef6f6c 6fd3c7 c9b6e4 f7f3e3",
    "2d1a2e f9ece6 efc3cf 9b2f62 d94a58 edae49 5fa07c 5d6fb0",
    "4a2c2a fdf0d5 f0cda2 d07a45 b8473a 6f9686 e3b23c 8d5a7a",
    "22333b fffbe6 dcebb0 f77f00 fcbf49 6aa53a d6322e 2f8f9d",
    "14213d efe9f4 cfc8e6 6a3fa0 1f8a9c d1305a f2a900 3f8f63",
    "120f1d 3f8583 57a09b f4d58d e98a5d dd5f6d 9ed2c6 f3efe0",
)
PALETTES = torch.tensor([[list(bytes.fromhex(word)) for word in line.split()] for line in _HEXES]) / 127.5 - 1
LIGHT = tuple(i for i, p in enumerate(PALETTES) if p[1].mean() > 0)  # those whose grounds are pale


PANES = 6  # of a stained glass window's ground


class Drawing(NamedTuple):
    """A batch's fields: strokes and shape (B, 1, H, W) in [0, 1], regions (B, 1, H, W) long, 0 = outside."""

    ink: Tensor
    shape: Tensor
    regions: Tensor

    @property
    def body(self) -> Tensor:
        """The shape up to the middle of its outline, (B, 1, H, W): what colour fills."""
        soft = convolved(self.shape, gaussian(1.2 * self.scale))
        return ((soft - 0.86) * (3 * self.scale) + 0.5).clamp(0, 1)

    @property
    def scale(self) -> float:
        """Pixels of this picture per pixel of 64."""
        return self.ink.shape[-1] / SIZE


Paint = Callable[[Drawing, torch.Generator], Tensor]


def sketch(d: Drawing, g: torch.Generator) -> Tensor:
    """Thin dark strokes on white paper."""
    return over(flat(d, 0.97), thinned(d.ink, 0.86), -0.9)


def painting(d: Drawing, g: torch.Generator) -> Tensor:
    """Brushed areas of colour, lit from above, on a ground of two tones, with dark outlines."""
    colours = palettes(d, g)
    ground = torch.lerp(colours[:, 1], colours[:, 2], (0.5 + 0.9 * cloud(d, 3, g)).clamp(0, 1))
    brush = stroked(d, g)
    picture = ground + 0.05 * brush
    fill = (
        filled(d, colours, g)
        + 0.07 * brush
        + 0.12 * torch.linspace(1, -1, d.ink.shape[-2]).to(d.ink).view(1, 1, -1, 1) * light_side(d, g)
    )
    picture = over(picture, d.body, fill)
    return over(picture, thinned(d.ink, 0.83), colours[:, 0])


def stained_glass(d: Drawing, g: torch.Generator) -> Tensor:
    """Every region a bright pane of its own colour, a ground of pale panes, dark leads between."""
    colours = palettes(d, g)
    pane, far = panes(d, g)
    shade = torch.rand(len(pane), PANES, generator=g, device=g.device)
    tone = shade[torch.arange(len(pane), device=g.device)[:, None, None], pane][:, None]
    body = d.body
    picture = over(torch.lerp(colours[:, 1], colours[:, 2], tone), body, filled(d, colours, g))
    leads = torch.maximum(thinned(d.ink, 0.74), edge(body, d.scale))
    between = ((0.65 - far[:, None] * SIZE) * d.scale + 0.5).clamp(0, 1) * (1 - body)
    leads = torch.maximum(leads, 0.6 * between)
    glow = convolved(leads, gaussian(2.0 * d.scale))
    picture = (picture + 0.05 * cloud(d, 12, g)) * (1 - 0.25 * glow) + 0.12 - 0.5 * glow
    return over(picture, leads, -0.88)


def watercolour(d: Drawing, g: torch.Generator) -> Tensor:
    """Washes that run into each other and dry darker at their edges, on rough paper, under a fine line."""
    colours = palettes(d, g, LIGHT)
    s = d.scale
    paper = torch.tensor([0.95, 0.92, 0.84], device=g.device).view(1, 3, 1, 1) + 0.02 * grain(d, g)
    loose = convolved(d.shape, gaussian(5.0 * s)) * 1.4 + 0.5 * cloud(d, 5, g) - 0.25
    picture = over(paper, 0.75 * ((loose - 0.1) / 0.25).clamp(0, 1), colours[:, 2])
    wet = convolved(filled(d, colours, g), gaussian(1.3 * s))
    body = d.body
    soft = convolved(body, gaussian(0.8 * s))
    pigment = (0.62 + 0.28 * cloud(d, 7, g) + 0.3 * edge(body, s)).clamp(0.2, 0.95)
    picture = over(picture, ((soft - 0.25) * 2).clamp(0, 1) * pigment, wet) + 0.02 * grain(d, g)
    return over(picture, 0.8 * thinned(d.ink, 0.88), colours[:, 0])


def paper_cut(d: Drawing, g: torch.Generator) -> Tensor:
    """Three sheets, one above the other, each with its shadow: ground, shape, strokes."""
    colours = palettes(d, g)
    top, middle, other = (colours[:, 3 + i] for i in range(3))
    swap = torch.rand(len(top), 1, 1, 1, generator=g, device=g.device) < 0.5
    top = torch.where(swap, top, colours[:, 0])
    inlay = pick_by_region(d, torch.stack([middle, middle, other], 1), g)
    strips = thinned(d.ink, 0.7)
    picture = colours[:, 1].expand(-1, -1, *d.ink.shape[-2:])
    body = d.body
    picture = over(picture, 0.45 * shadow(torch.maximum(body, strips), 1.6 * d.scale), colours[:, 0])
    picture = over(picture, body, inlay)
    picture = over(picture, 0.4 * shadow(strips, 1.0 * d.scale), colours[:, 0])
    return over(picture, strips, top)


def poster(d: Drawing, g: torch.Generator) -> Tensor:
    """Flat colours before a large disc, with bold outlines."""
    colours = palettes(d, g)
    side = torch.linspace(-1, 1, d.ink.shape[-1], device=g.device)
    radius = (side[:, None] ** 2 + side**2).sqrt()
    size = 0.72 + 0.16 * torch.rand(len(d.ink), 1, 1, 1, generator=g, device=g.device)
    disc = ((size - radius) * 32 * d.scale).clamp(0, 1)
    swap = torch.rand(len(disc), 1, 1, 1, generator=g, device=g.device) < 0.5
    first, second = torch.where(swap, colours[:, 3], colours[:, 2]), colours[:, 1]
    picture = over(first.expand(-1, -1, *d.ink.shape[-2:]), disc, second)
    picture = over(picture, d.body, filled(d, colours, g, first=4))
    return over(picture, thinned(d.ink, 0.77), colours[:, 0])


# The words before a drawing's name, and how it is then drawn. A name alone is painted.
STYLES: dict[str, Paint] = {
    **dict.fromkeys(("", "a painting of", "an oil painting of", "a picture of"), painting),
    "a stained glass window of": stained_glass,
    **dict.fromkeys(("a watercolour of", "a watercolor of"), watercolour),
    "a paper cut of": paper_cut,
    "a poster of": poster,
    **dict.fromkeys(("a sketch of", "a drawing of", "a line drawing of", "a pencil sketch of"), sketch),
}
PAINTS: tuple[Paint, ...] = tuple(dict.fromkeys(STYLES.values()))


def paint(fields: Tensor, which: Tensor, generator: torch.Generator) -> Tensor:
    """`drawings.augment`'s fields (B, 3, H, W), PAINTS' places (B,) -> pictures (B, 3, H, W) in [-1, 1]."""
    out = fields.new_empty(len(fields), 3, *fields.shape[-2:])
    for place in which.unique().tolist():
        rows = which == place
        ink, shape, regions = fields[rows].split(1, dim=1)
        out[rows] = PAINTS[place](Drawing(ink, shape, regions.long()), generator)
    return out.clamp_(-1, 1)


def over(picture: Tensor, mask: Tensor, colour: Tensor | float) -> Tensor:
    """`colour` laid over a picture (B, 3, H, W) where the mask (B, 1, H, W) in [0, 1] says."""
    return picture + mask * (colour - picture)


def flat(d: Drawing, value: float) -> Tensor:
    """A picture (B, 3, H, W) of one grey."""
    return d.ink.new_full((len(d.ink), 3, *d.ink.shape[-2:]), value)


def palettes(d: Drawing, g: torch.Generator, among: tuple[int, ...] = tuple(range(len(PALETTES)))) -> Tensor:
    """A palette for each picture, (B, 8, 3, 1, 1): dark, two grounds, the five colours in random order."""
    count = len(d.ink)
    which = torch.tensor(among, device=g.device)[
        torch.randint(len(among), (count,), generator=g, device=g.device)
    ]
    order = 3 + torch.rand(count, 5, generator=g, device=g.device).argsort(1)
    order = torch.cat([torch.arange(3, device=g.device).expand(count, 3), order], 1)
    return PALETTES.to(g.device)[which].gather(1, order[..., None].expand(-1, -1, 3))[..., None, None]


def pick_by_region(d: Drawing, colours: Tensor, g: torch.Generator) -> Tensor:
    """Each region in one of the colours (B, K, 3, 1, 1), the outside in the first: (B, 3, H, W)."""
    count, kinds = colours.shape[:2]
    each = torch.randint(kinds, (count, MOST_REGIONS), generator=g, device=g.device)
    each = (each + torch.arange(MOST_REGIONS, device=g.device)) % kinds
    each[:, 0] = 0
    table = colours[..., 0, 0].gather(1, each[..., None].expand(-1, -1, 3))  # (B, MOST_REGIONS, 3)
    rows = torch.arange(count, device=g.device)[:, None, None]
    return table[rows, d.regions[:, 0]].permute(0, 3, 1, 2)


def filled(d: Drawing, colours: Tensor, g: torch.Generator, first: int = 3) -> Tensor:
    """The regions in the palette's colours from `first` on; the outside, where seen, in that."""
    return pick_by_region(d, colours[:, first:], g)


def thinned(ink: Tensor, threshold: float) -> Tensor:
    """Strokes (B, 1, H, W) as wide as a soft ridge along them is above the threshold, whatever they were.

    The ridge is the blurred ink over its own height nearby, so a thick stroke gets as thin as a thin one; areas
    that are filled stay filled.
    """
    s = ink.shape[-1] / SIZE
    soft = convolved(ink, gaussian(1.1 * s))
    reach = int(2 * s) * 2 + 1
    height = F.max_pool2d(F.max_pool2d(soft, (reach, 1), 1, (reach // 2, 0)), (1, reach), 1, (0, reach // 2))
    ridge = soft / height.clamp(min=0.25)
    return ((ridge - threshold) * (4 * s) + 0.5).clamp(0, 1)


def edge(mask: Tensor, s: float) -> Tensor:
    """A line (B, 1, H, W) of a pixel of 64, `s` of the picture's own, along a mask's border."""
    soft = convolved(mask, gaussian(0.8 * s))
    return ((0.7 - (2 * soft - 1).abs()) * 2).clamp(0, 1)


def shadow(mask: Tensor, far: float) -> Tensor:
    """What a sheet (B, 1, H, W) darkens beneath itself, `far` pixels down and to the right."""
    step = max(1, round(far))
    moved = F.pad(mask, (step, 0, step, 0))[..., : mask.shape[-2], : mask.shape[-1]]
    return convolved(moved, gaussian(0.6 * far))


def cloud(d: Drawing, cells: int, g: torch.Generator) -> Tensor:
    """Smooth noise (B, 1, H, W) of about unit variance, `cells` a side."""
    seeds = torch.randn(len(d.ink), 1, cells, cells, generator=g, device=g.device)
    return F.interpolate(seeds, size=d.ink.shape[-2:], mode="bicubic", align_corners=True)


def grain(d: Drawing, g: torch.Generator) -> Tensor:
    """Noise (B, 1, H, W) whose specks are as large as a pixel of 64."""
    return cloud(d, SIZE, g)


def stroked(d: Drawing, g: torch.Generator) -> Tensor:
    """Noise (B, 1, H, W) that runs along brush strokes, across or upright."""
    seeds = torch.randn(len(d.ink), 1, 40, 8, generator=g, device=g.device)
    turned = torch.rand(len(d.ink), 1, 1, 1, generator=g, device=g.device) < 0.5
    along = F.interpolate(seeds, size=d.ink.shape[-2:], mode="bicubic", align_corners=True)
    return torch.where(turned, along, along.transpose(2, 3))


def light_side(d: Drawing, g: torch.Generator) -> Tensor:
    """Whether the light comes from above or below, (B, 1, 1, 1): 1 or -1, so that it says nothing."""
    return torch.randint(2, (len(d.ink), 1, 1, 1), generator=g, device=g.device) * 2.0 - 1


def panes(d: Drawing, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """A ground broken into PANES by random centres: which one a pixel is nearest to, how far the border is.

    Both (B, H, W), the second in picture sides.
    """
    side = torch.linspace(0, 1, d.ink.shape[-1], device=g.device)
    centres = torch.rand(len(d.ink), PANES, 2, generator=g, device=g.device)
    across, down = (side - centres[..., :1]) ** 2, (side - centres[..., 1:]) ** 2  # (B, PANES, W or H)
    two, which = (down[..., None] + across[:, :, None]).topk(2, dim=1, largest=False)  # (B, 2, H, W)
    rows = torch.arange(len(d.ink), device=g.device)[:, None, None]
    apart = (centres[rows, which[:, 0]] - centres[rows, which[:, 1]]).norm(dim=-1)
    return which[:, 0], (two[:, 1] - two[:, 0]) / (2 * apart).clamp(min=1e-3)
