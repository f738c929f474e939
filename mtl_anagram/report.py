"""From an evaluation's cells to one table: means, quantiles, shares, and intervals by the bootstrap over pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .metrics import alignment, concealment, quantile

DRAWS, SEED = 4_000, 0  # of the bootstrap
BASELINE = "plain"
SHARES = ("all_named", "all_named_over_plain", "any_of_n", "best_of_n", "best_of_n_over_plain")  # columns


def report(cells: Sequence[dict[str, Any]], temperature: float) -> dict[str, Any]:
    """Rows by recipe, over all views and for each view alone; every figure of a share with its 95% interval.

    cells: `evaluate`'s JSON files, in any order, one for each recipe, view and pair. The intervals are percentiles
    of a bootstrap that draws pairs, not samples: all samples of one pair, under every view, stand or fall together.
    A recipe's difference to "plain" is taken pair by pair, where plain has the same pairs, views and seeds.
    """
    rows = []
    for readings in sorted({len(cell["request"]["names"]) for cell in cells}):
        mine = [cell for cell in cells if len(cell["request"]["names"]) == readings]
        views = list(dict.fromkeys(cell["request"]["view"] for cell in mine))
        for view in [None, *views] if len(views) > 1 else views:
            seen = [cell for cell in mine if view in (None, cell["request"]["view"])]
            recipes = {
                recipe: _measured(seen, recipe, temperature)
                for recipe in dict.fromkeys(cell["recipe_name"] for cell in seen)
            }
            for recipe, measured in recipes.items():
                base = {} if recipe == BASELINE else recipes.get(BASELINE, {})
                rows.append(
                    {"readings": readings, "view": view or "all", "recipe": recipe, **_row(measured, base)}
                )
    return {"temperature": temperature, "bootstrap_draws": DRAWS, "rows": rows}


def as_table(summary: dict[str, Any]) -> str:
    """The report's rows as a Markdown table."""
    head = ["view", "recipe", "samples", "A", "A.9", "C", "C.9", "all read", "over plain"]
    head += ["any of N", "best of N", "best over plain"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in summary["rows"]:
        view = "one reading" if row["readings"] == 1 else row["view"]
        figures = [f"{row[name]:.3f}" for name in ("A", "A.9", "C", "C.9")]
        shares = [_share(row.get(name)) for name in SHARES]
        lines.append("| " + " | ".join([view, row["recipe"], str(row["samples"]), *figures, *shares]) + " |")
    return "\n".join(lines)


def _share(entry: dict[str, float] | None) -> str:
    if entry is None:
        return ""
    return f"{100 * entry['value']:.1f}% ({100 * entry['low']:.1f} to {100 * entry['high']:.1f})"


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


def _row(cells: Measured, base: Measured) -> dict[str, Any]:
    row: dict[str, Any] = {"pairs": len({names for names, _, _ in cells})}
    for name in ("A", "C"):
        values = torch.cat([entry[name] for entry in cells.values()])
        row |= {"samples": len(values), name: round(values.mean().item(), 4)}
        row[f"{name}.9"] = round(quantile(values).item(), 4)
    if any("all_named" not in entry for entry in cells.values()):
        return row
    shares = {name: _by_pair(cells, name) for name in ("all_named", "best_of_n", "any_of_n")}
    if base and cells.keys() <= base.keys():
        plain = {key: base[key] for key in cells}
        shares |= {
            f"{name}_over_plain": shares[name] - _by_pair(plain, name) for name in ("all_named", "best_of_n")
        }
    return row | {name: interval(share) for name, share in shares.items()}


def _by_pair(cells: Measured, name: str) -> Tensor:
    """One value for every pair, the mean over its views, (P,)."""
    values: dict[tuple[str, ...], list[Tensor]] = {}
    for (names, _, _), entry in cells.items():
        values.setdefault(names, []).append(entry[name])
    return torch.stack([torch.stack(each).mean() for each in values.values()])


def interval(values: Tensor, statistic: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
    """A mean (or `statistic` over the last dimension) of (G,) values and its 95% bootstrap interval."""
    of = statistic or (lambda drawn: drawn.mean(-1))
    generator = torch.Generator().manual_seed(SEED)
    drawn = values[torch.randint(len(values), (DRAWS, len(values)), generator=generator)]
    low, high = of(drawn).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return {"value": round(of(values).item(), 4), "low": round(low, 4), "high": round(high, 4)}
