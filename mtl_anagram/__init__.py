"""Visual anagrams."""

__version__ = "0.1.0"
