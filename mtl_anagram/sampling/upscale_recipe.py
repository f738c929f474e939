"""Every number of stage III in one frozen object, beside the Recipe of stages I and II."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..checks import choice, number, whole_number
from ..errors import InputError

VIEWS = ("first", "all", "all_latents")


@dataclass(frozen=True)
class UpscaleRecipe:
    """How stage III is sampled; the defaults are the released anagram code's.

    num_inference_steps: 1 to 999. guidance_scale: of classifier-free guidance, 0 or more. noise_level: of the
    low-resolution picture, 0 to 999 (the published pipeline's own default is 20, the anagram code's 0; the
    released model is meant for at most 350).

    views: "first" (released): the first prompt alone, upright, no views. "all": every view's prompt has its
    say; the views' predicted pictures are averaged in pixels, through the decoder, which is right for every
    view. "all_latents": the same on the latents as if they were pixels: cheap, and only as right as the
    autoencoder is blind to the view (`sample_stage3` says when). exchange_every: in how many steps "all"
    averages once; 1 is the method itself, more is cheaper, and the last step always counts.

    Raises InputError for a wrong type or a value outside its limits.
    """

    num_inference_steps: int = 75
    guidance_scale: float = 9.0
    noise_level: int = 0
    views: str = "first"
    exchange_every: int = 1

    def __post_init__(self) -> None:
        whole_number("num_inference_steps", self.num_inference_steps, 1, 999)
        object.__setattr__(self, "guidance_scale", number("guidance_scale", self.guidance_scale))
        whole_number("noise_level", self.noise_level, 0, 999)
        choice("views", self.views, VIEWS)
        whole_number("exchange_every", self.exchange_every, 1, 999)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UpscaleRecipe:
        """From `to_dict`'s result, as read back from JSON; missing fields take their defaults."""
        if not isinstance(values, Mapping):
            raise InputError(f"an upscale recipe is a JSON object of its fields, not {type(values).__name__}")
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(known)}"
                raise InputError(f"an upscale recipe has no field {name!r}{hint}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, fit for JSON."""
        return asdict(self)
