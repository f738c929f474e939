"""Which things go together: what a cascade makes of two names under a view, measured, and asked for by a name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from ..cascade import Cascade
from ..errors import InputError, SourceError
from ..files.atomic import write_atomically
from ..files.hub import read_json
from ..files.outputs import check_folder
from ..models.prompts import without_article
from .protocol import Protocol, choose_pairs, measure

TABLE = "partners.json"


class Partner(NamedTuple):
    """first is read upright, second under view; read: the share of samples that the judge reads both ways (or None);
    score: the mean of `metrics.anagram_score`, by the cascade's own CLIP."""

    first: str
    second: str
    view: str
    read: float | None
    score: float


def measure_partners(
    cascade: Cascade, folder: str | Path, *, names: Sequence[str] | None = None,
    views: Sequence[str] = ("flip", "rotate_180", "rotate_ccw", "rotate_cw"), style: str = "a poster of",
    seeds: Sequence[int] = tuple(range(8)), **options: Any,
) -> list[Partner]:  # fmt: skip
    """Sample every pair of names under every view and write FOLDER/partners.json, best first; it goes on where it was.

    names None = what the cascade has learnt to draw. options: as for `measure`. By the cascade's own recipe.
    """
    pairs = choose_pairs(names or cascade.concepts)
    protocol = Protocol(pairs, tuple(views), {"own": cascade.recipe}, tuple(seeds), style)
    cells = measure(cascade, protocol, folder, **options)
    partners = sorted(map(_partner, cells), key=lambda p: (p.read or 0.0, p.score), reverse=True)
    about: dict[str, Any] = {"model": cascade.name, "style": style, "seeds": list(protocol.seeds)}
    lines = ",\n  ".join(map(json.dumps, partners))
    text = f'{json.dumps(about)[:-1]}, "rows": [\n  {lines}\n]}}\n'
    write_atomically(check_folder(folder) / TABLE, text.encode())
    return partners


def partners_of(table: str | Path, name: str | None = None) -> list[Partner]:
    """The rows of a partners.json, of one name alone ("a duck" or "duck") or of all, best first."""
    try:
        rows = [Partner(*row) for row in read_json(Path(table))["rows"]]
    except (SourceError, KeyError, TypeError) as error:
        raise SourceError(f"{table} is no table of partners ({error!r}): make one with --measure") from error
    wanted = listed(name, sorted({name for row in rows for name in row[:2]}), str(table))
    return [row for row in rows if wanted in (None, without_article(row.first), without_article(row.second))]


def listed(name: str | None, names: Sequence[str], where: str) -> str | None:
    """A name without its article, in lower case; None stays. InputError for one that is not among the names."""
    wanted = None if name is None else without_article(name)
    if wanted not in (None, *map(without_article, names)):
        raise InputError(f"{name!r} is not in {where}, which knows {', '.join(names)}: take one of these")
    return wanted


def _partner(cell: dict[str, Any]) -> Partner:
    (first, second), samples = cell["request"]["names"], cell["samples"]
    judged = [sample["named"] == [first, second] for sample in samples if "named" in sample]
    read = mean(judged) if judged else None
    score = round(mean(sample["score"] for sample in samples), 4)
    return Partner(first, second, cell["request"]["view"], read, score)
