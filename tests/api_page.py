"""docs/api.md, made from the signatures and docstrings of all public names: `python -m tests.api_page` writes it."""

import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
PARTS = ("mtl_anagram", *(f"mtl_anagram.{name}" for name in ("sampling", "models", "views", "evaluation")))
HEAD = """# All public names

Made from the docstrings by `python -m tests.api_page`. Letters of shapes: B images, V views, C channels, H and W
pixels, N heads, L text tokens, T tokens of a concept, S keys, D width, R rows of a network.
"""


def words(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def signature(called: Callable[..., Any], name: str) -> str:
    """A function or class as it is called: annotations as they are written, `self` and `cls` left out."""
    found, parts = inspect.signature(called), []
    for parameter in found.parameters.values():
        if parameter.name in ("self", "cls") and not parts:
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        text = f"{star}{parameter.name}"
        if parameter.annotation is not parameter.empty:
            text += f": {words(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            default = repr(parameter.default)
            text += " = " + re.sub(r"<(?:built-in method|function) (\w+).*? at 0x\w+>", r"\1", default)
        parts.append(text)
    text = f"{name}({', '.join(parts)})"
    if not inspect.isclass(called) and found.return_annotation is not found.empty:
        text += f" -> {words(found.return_annotation)}"
    return "\n".join(textwrap.wrap(text, 116, subsequent_indent="    ", break_on_hyphens=False))


def block(depth: int, *texts: str | None) -> Iterator[str]:
    for text in texts:
        yield textwrap.indent(text or "", 4 * depth * " ")
        yield ""


def described(name: str, value: Any) -> Iterator[str]:
    """A function, or a class and its public members, also those that it has from bases of ours."""
    if inspect.isclass(value) and issubclass(value, Exception):
        yield from block(0, f"{name}({', '.join(base.__name__ for base in value.__bases__)})")
    else:
        yield from block(0, signature(value, name))
    yield from block(1, inspect.getdoc(value))
    if not inspect.isclass(value) or issubclass(value, Exception):
        return
    listed: set[str] = set()
    for base in inspect.getmro(value):
        if not base.__module__.startswith("mtl_anagram") or (base is not value and base in listed_classes()):
            continue
        if base is not value and base.__doc__ and not dataclasses.is_dataclass(value):
            yield from block(1, inspect.cleandoc(base.__doc__))
        for key, member in vars(base).items():
            if key.startswith("_") or key in listed:
                continue
            listed.add(key)
            if isinstance(member, property | cached_property):
                got = member.fget if isinstance(member, property) else member.func
                yield from block(1, f".{key}: {words(inspect.signature(got).return_annotation)}")
                yield from block(2, got.__doc__ and inspect.cleandoc(got.__doc__))
            elif inspect.isroutine(member) and inspect.getdoc(getattr(base, key)):
                yield from block(1, signature(getattr(base, key), f".{key}"))
                yield from block(2, inspect.getdoc(getattr(base, key)))


def names_of(part: str) -> Iterator[tuple[str, Any]]:
    """A package's public names, or those of its modules where it names none itself."""
    module = importlib.import_module(part)
    if hasattr(module, "__all__"):
        yield from ((name, getattr(module, name)) for name in sorted(module.__all__))
        return
    for path in sorted(Path(str(module.__file__)).parent.glob("[!_]*.py")):
        inner = importlib.import_module(f"{part}.{path.stem}")
        for name, value in vars(inner).items():
            ours = getattr(value, "__module__", "") == inner.__name__ and not name.startswith("_")
            if ours and (inspect.isroutine(value) or inspect.isclass(value)) and inspect.getdoc(value):
                yield f"{path.stem}.{name}", value


@cache
def listed_classes() -> frozenset[type]:
    """The public classes: what one of them has from another is told there."""
    return frozenset(value for part in PARTS for _, value in names_of(part) if inspect.isclass(value))


def page() -> str:
    lines = [HEAD]
    for part in PARTS:
        lines += [f"## {part}", "", inspect.getdoc(importlib.import_module(part)) or "", ""]
        for name, value in names_of(part):
            if inspect.isroutine(value) or inspect.isclass(value):
                text = "\n".join(described(name.rpartition(".")[2], value))
            else:  # a constant
                text = f"{name} = {value!r}"
            lines += [f"### {name}", "", "```text", *map(str.rstrip, text.strip().splitlines()), "```", ""]
    return "\n".join(line for i, line in enumerate(lines) if line or i == 0 or lines[i - 1])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
