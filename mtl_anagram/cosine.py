"""The squared-cosine noise schedule, of which the IF stages, GLIDE's CLIP and the training make their tables."""

from __future__ import annotations

import math


def cosine_alpha_bar(u: float) -> float:
    """The kept share of a picture's power at u of the way to pure noise, 0 to 1 (Nichol & Dhariwal 2021, eq. 17).

    Not divided by its value at 0, which is 0.99985: ratios and what is left of 1 are what users of it take.
    """
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
