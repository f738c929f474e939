"""Visual anagrams: one picture that reads as several things, each under its own view."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cascade import Cascade
    from .errors import (
        AnagramError,
        CapacityError,
        ConfigError,
        InputError,
        PromptWarning,
        SourceError,
        WeightsError,
    )
    from .evaluation.protocol import Protocol, evaluate
    from .files.images import Preview
    from .files.outputs import Anagram
    from .generate import generate_anagram, repeat_anagram
    from .sampling import Recipe, UpscaleRecipe
    from .views import View, get_views

__version__ = "0.1.0"
__all__ = [
    "Anagram", "AnagramError", "CapacityError", "Cascade", "ConfigError", "InputError", "Preview",
    "PromptWarning", "Protocol", "Recipe", "SourceError", "UpscaleRecipe", "View", "WeightsError", "evaluate",
    "generate_anagram", "get_views", "repeat_anagram",
]  # fmt: skip
# A name's module is imported when the name is first used: the command answers --help without torch.
_HOMES = {"Anagram": "files.outputs", "Cascade": "cascade", "Preview": "files.images"}
_HOMES |= dict.fromkeys(["Protocol", "evaluate"], "evaluation.protocol")
_HOMES |= dict.fromkeys(["Recipe", "UpscaleRecipe"], "sampling")
_HOMES |= dict.fromkeys(["View", "get_views"], "views")
_HOMES |= dict.fromkeys(["generate_anagram", "repeat_anagram"], "generate")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES.get(name, 'errors')}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
