"""The library's own errors and warnings: every message names the value, the limit and the remedy."""


class AnagramError(Exception):
    """Base of all errors that this library raises on purpose."""


class InputError(AnagramError, ValueError):
    """A caller's value is outside what a function accepts."""


class ConfigError(InputError):
    """A model's config holds a field or a value that is not implemented."""


class WeightsError(InputError):
    """A file's tensors do not fit the model: missing, unexpected, misshapen, or not finite."""


class CapacityError(InputError):
    """A model needs more memory, or its files more room on the disk, than this machine has."""


class SourceError(AnagramError, OSError):
    """A file, a folder or a hub repository cannot be found or read."""


class PromptWarning(UserWarning):
    """A prompt asks for what the cascade's makers do not list among the things that it has learnt to draw."""
