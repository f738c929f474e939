"""Visual anagrams: one picture that reads as several things, each under its own view."""

__version__ = "0.1.0"

from .cascade import Cascade
from .errors import AnagramError, ConfigError, InputError, SourceError, WeightsError
from .generate import Anagram, generate_anagram, repeat_anagram
from .sampling import Recipe
from .views import View, get_views

__all__ = [
    "Anagram",
    "AnagramError",
    "Cascade",
    "ConfigError",
    "InputError",
    "Recipe",
    "SourceError",
    "View",
    "WeightsError",
    "generate_anagram",
    "get_views",
    "repeat_anagram",
]
