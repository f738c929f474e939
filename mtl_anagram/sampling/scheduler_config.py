"""What a published scheduler_config.json may say: fields that are read, that have one value, that do not matter."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError


def read_fields(
    config: Mapping[str, Any],
    *,
    class_name: str,
    owner: str,
    fixed: Mapping[str, Any],
    spelled: tuple[str, ...],
    unused: tuple[str, ...],
    read: Mapping[str, Any],
) -> dict[str, Any]:
    """The fields of `read`, with its values where the file has none; the file's other fields are checked.

    owner: whose scheduler it is, for the errors. fixed: fields of which one value is implemented. spelled: those
    of them that a file must have, because the format's own default is another. unused: fields of no effect.

    Raises ConfigError for another class, and for a field or a value that is not implemented.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"a scheduler's config is a JSON object, not {type(config).__name__}")
    if config.get("_class_name", class_name) != class_name:
        raise ConfigError(
            f"_class_name={config['_class_name']!r} is not implemented; {owner} has {class_name!r}"
        )
    known = [*fixed, *unused, *read]
    for name, value in config.items():
        if isinstance(name, str) and name.startswith("_"):
            continue  # notes of the program that wrote the file
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ConfigError(f"unknown scheduler field {name!r} = {value!r}{hint}: nothing implements it")
        if name in fixed and (value != fixed[name] or type(value) is not type(fixed[name])):
            raise ConfigError(f"{name}={value!r} is not implemented; {owner} has {fixed[name]!r}")
    for name in spelled:
        if name not in config:
            raise ConfigError(
                f"the config lacks {name}, and the format's default for it is not implemented; "
                f"{owner} has {fixed[name]!r}"
            )
    return {name: config.get(name, default) for name, default in read.items()}
