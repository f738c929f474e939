"""Where a cascade's parts are: a release's name, a folder or a hub id, and what is named over it, resolved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .errors import ConfigError, SourceError
from .models.sources import Folder, Source, open_source, read_config, read_json
from .releases import DEFAULT_VARIANT, FULL, RELEASES, explain, has_variant, part_source, release_of
from .sampling import Recipe


@dataclass(frozen=True)
class Parts:
    """sources and variants by part ("stage_1", ...); name, recipe and names learnt where the source has them."""

    sources: dict[str, Source | None]
    variants: dict[str, str | None]
    name: str | None = None
    recipe: Recipe | None = None
    concepts: tuple[str, ...] = ()
    clip_concepts: tuple[str, ...] = ()


def find_parts(source: Source, variant: str | None, **named: Source | None) -> Parts:
    """Resolve a cascade's source and the parts named beside it (stage_2=, ...); None = the source's own part.

    variant: of all parts' files; None = what the folder's cascade.json says, fp16 for what comes by a
    release's name, else the files without a variant; "fp32" = those for all.
    """
    own: dict[str, Any] = {"stage_1": source}
    stored: dict[str, str | None] = {}
    about = _About()
    release = release_of(source)
    if release is not None:
        about = _About(release.name)
        own = dict.fromkeys(("stage_1", *named), source)
    else:
        try:
            files = open_source(source, None, "cascade.json")
        except SourceError as error:
            raise explain(error, source) from None
        if isinstance(files, Folder):
            own = _folder(files, source, ("stage_1", *named))
            if own["stage_1"] != files.path:
                about, stored = _about(files.path)
    given = own | {part: value for part, value in named.items() if value is not None}
    sources = {part: part_source(given.get(part), part) for part in ("stage_1", *named)}
    if named.get("stage_3") is None and sources.get("stage_2", "") is None:
        sources |= {part: None for part in sources if part == "stage_3"}  # it enlarges stage II's pictures
    variants: dict[str, str | None] = {}
    for part in sources:
        value = given.get(part)
        default = stored.get(part) if value == own.get(part) else None
        default = DEFAULT_VARIANT if release_of(value) is not None else default
        chosen = default if variant is None else variant
        variants[part] = chosen if chosen != FULL and has_variant(sources[part], part) else None
    return Parts(sources, variants, *about)


def _folder(files: Folder, source: Source, parts: tuple[str, ...]) -> dict[str, Any]:
    """The parts that a folder holds: those of a whole cascade, or one release of stage I."""
    folder = files.path
    if (folder / "stage_1").is_dir():
        return {part: folder / part for part in parts if (folder / part).is_dir()}
    if (folder / "unet").is_dir():
        return {"stage_1": folder}
    hint = ""
    if isinstance(source, str) and source in RELEASES:
        hint = f", or start from elsewhere: here the folder goes before the release named {source}"
    raise SourceError(
        f"{folder} is no cascade: it has neither stage_1/ nor unet/ ({files.listing()}); give the folder of a "
        f"release{hint}"
    )


class _About(NamedTuple):
    """What a source says of itself."""

    name: str | None = None
    recipe: Recipe | None = None
    concepts: tuple[str, ...] = ()
    clip_concepts: tuple[str, ...] = ()


def _about(folder: Path) -> tuple[_About, dict[str, str | None]]:
    """What a folder's cascade.json says of itself, and by part the variant of its files."""
    place = folder / "cascade.json"
    about = read_json(place) if place.is_file() else {}
    name = about.get("name", folder.name)
    if not isinstance(name, str):
        raise ConfigError(f"{place}: name={name!r} must be a string; change it back")
    recipe = None
    if about.get("recipe") is not None:
        recipe = read_config(place, lambda content: Recipe.from_dict(content["recipe"]))
    learnt = []
    for field in ("concepts", "clip_concepts"):
        names = about.get(field, [])
        if not isinstance(names, list) or not all(isinstance(concept, str) for concept in names):
            raise ConfigError(f"{place}: {field}={names!r} must be a list of names; change it back")
        learnt.append(tuple(names))
    variants = about.get("variants", {})
    if not isinstance(variants, dict) or not all(isinstance(v, str | None) for v in variants.values()):
        raise ConfigError(f"{place}: variants={variants!r} must give a word or null by part; change it back")
    return _About(name, recipe, *learnt), variants
