"""From an evaluation's cells to one table: means, quantiles, shares, and intervals by the bootstrap over pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .metrics import alignment, concealment

DRAWS, SEED = 4_000, 0  # of the bootstrap
AT_ONCE = 1 << 23  # values drawn at once
BASELINE = "plain"
SCORES = ("A", "C")
SHARES = ("all_named", "best_of_n", "any_of_n")
COMPARED = (*SCORES, "all_named", "best_of_n")  # with the baseline
# The table's columns: heading, the row's figure, how it is written.
COLUMNS = (
    ("A", "A", "{:.3f}"),
    ("A over plain", "A_over_plain", "{:+.3f}"),
    ("A.9", "A.9", "{:.3f}"),
    ("C", "C", "{:.3f}"),
    ("C over plain", "C_over_plain", "{:+.3f}"),
    ("C.9", "C.9", "{:.3f}"),
    ("all read", "all_named", "{:.1%}"),
    ("over plain", "all_named_over_plain", "{:+.1%}"),
    ("any of N", "any_of_n", "{:.1%}"),
    ("best of N", "best_of_n", "{:.1%}"),
    ("best over plain", "best_of_n_over_plain", "{:+.1%}"),
)


def report(cells: Sequence[dict[str, Any]], temperature: float) -> dict[str, Any]:
    """Rows by recipe, over all views and for each view alone; every figure with its 95% interval.

    cells: `evaluate`'s JSON files, in any order, one for each recipe, view and pair. The intervals are percentiles
    of a bootstrap that draws pairs, not samples: all samples of one pair, under every view, stand or fall together.
    A recipe's difference to "plain" is taken pair by pair, where plain has the same pairs, views and seeds.
    """
    rows = []
    for readings in sorted({len(cell["request"]["names"]) for cell in cells}):
        mine = [cell for cell in cells if len(cell["request"]["names"]) == readings]
        views = list(dict.fromkeys(cell["request"]["view"] for cell in mine))
        recipes = {
            recipe: _measured(mine, recipe, temperature)
            for recipe in dict.fromkeys(cell["recipe_name"] for cell in mine)
        }
        for view in [None, *views] if len(views) > 1 else views:
            base = _under(recipes.get(BASELINE, {}), view)
            for recipe, measured in recipes.items():
                if seen := _under(measured, view):
                    row = _row(seen, {} if recipe == BASELINE else base)
                    rows.append({"readings": readings, "view": view or "all", "recipe": recipe, **row})
    return {"temperature": temperature, "bootstrap_draws": DRAWS, "rows": rows}


def as_table(summary: dict[str, Any]) -> str:
    """The report's rows as a Markdown table."""
    head = ["view", "recipe", "samples", *(heading for heading, _, _ in COLUMNS)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in summary["rows"]:
        view = "one reading" if row["readings"] == 1 else row["view"]
        figures = [_written(row.get(name), form) for _, name, form in COLUMNS]
        lines.append("| " + " | ".join([view, row["recipe"], str(row["samples"]), *figures]) + " |")
    return "\n".join(lines)


def _written(figure: dict[str, float] | None, form: str) -> str:
    if figure is None:
        return ""
    value, low, high = (form.format(figure[name]) for name in ("value", "low", "high"))
    return f"{value} ({low.rstrip('%')} to {high.rstrip('%')})"


Key = tuple[tuple[str, ...], str, tuple[int, ...]]  # names, view, seeds
Measured = dict[Key, dict[str, Tensor]]  # of each pair under each view: A and C (N,), and the shares 0-dim


def _measured(cells: Sequence[dict[str, Any]], recipe: str, temperature: float) -> Measured:
    """Each of a recipe's cells: A and C, and the shares of seeds of which all readings were named."""
    out: Measured = {}
    for cell in cells:
        if cell["recipe_name"] != recipe:
            continue
        names, samples = cell["request"]["names"], cell["samples"]
        scores = torch.tensor([sample["scores"] for sample in samples])  # (N, V, V)
        entry = {"A": alignment(scores), "C": concealment(scores, temperature)}
        if "named" in samples[0]:
            named = torch.tensor([float(sample["named"] == names) for sample in samples])
            chosen = torch.tensor([sample["score"] for sample in samples]).argmax()
            entry |= {"all_named": named.mean(), "any_of_n": named.max(), "best_of_n": named[chosen]}
        out[tuple(names), cell["request"]["view"], tuple(sample["seed"] for sample in samples)] = entry
    return out


def _under(cells: Measured, view: str | None) -> Measured:
    """The cells of one view, None = of all."""
    return {key: entry for key, entry in cells.items() if view in (None, key[1])}


def _row(cells: Measured, base: Measured) -> dict[str, Any]:
    samples = {name: _samples_by_pair(cells, name) for name in SCORES}
    row: dict[str, Any] = {"pairs": len(samples["A"]), "samples": int(samples["A"].isfinite().sum())}
    for name, values in samples.items():
        row[name] = interval(values, lambda drawn: drawn.nanmean(-1))
        row[f"{name}.9"] = interval(values, lambda drawn: drawn.nanquantile(0.9, dim=-1))
    judged = all("all_named" in entry for entry in cells.values())
    for name in SHARES if judged else ():
        row[name] = interval(_by_pair(cells, name))
    if base and cells.keys() <= base.keys():
        plain = {key: base[key] for key in cells}
        for name in COMPARED if judged else SCORES:
            row[f"{name}_over_plain"] = interval(_by_pair(cells, name) - _by_pair(plain, name))
    return row


def _grouped(cells: Measured, name: str) -> list[list[Tensor]]:
    """What each pair has under each of its views."""
    values: dict[tuple[str, ...], list[Tensor]] = {}
    for (names, _, _), entry in cells.items():
        values.setdefault(names, []).append(entry[name])
    return list(values.values())


def _samples_by_pair(cells: Measured, name: str) -> Tensor:
    """All samples of every pair, (P, S); NaN where a pair has fewer than others."""
    rows = [torch.cat(each) for each in _grouped(cells, name)]
    return pad_sequence(rows, batch_first=True, padding_value=float("nan"))


def _by_pair(cells: Measured, name: str) -> Tensor:
    """One value for every pair, the mean over its views, (P,)."""
    return torch.stack([torch.stack([view.mean() for view in each]).mean() for each in _grouped(cells, name)])


def interval(values: Tensor, statistic: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
    """A statistic of groups' values and its 95% interval by a bootstrap that draws groups.

    values (G,), or (G, S) where a group has several; statistic: (..., values) -> (...), None = the mean.
    """
    of = statistic or (lambda drawn: drawn.mean(-1))
    generator = torch.Generator().manual_seed(SEED)
    places = torch.randint(len(values), (DRAWS, len(values)), generator=generator)
    parts = places.split(max(1, AT_ONCE // values.numel()))
    drawn = torch.cat([of(values[part].flatten(1)) for part in parts])
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return {"value": round(of(values.flatten()).item(), 4), "low": round(low, 4), "high": round(high, 4)}
