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

    cells: `evaluate`'s JSON files. The intervals are percentiles of a bootstrap that draws pairs, not samples:
    the samples of one pair stand or fall together. A recipe's difference to "plain" is taken pair by pair.
    """
    rows = []
    for readings in sorted({len(cell["request"]["names"]) for cell in cells}):
        mine = [cell for cell in cells if len(cell["request"]["names"]) == readings]
        views = list(dict.fromkeys(cell["request"]["view"] for cell in mine))
        for view in [None, *views] if len(views) > 1 else views:
            seen = [cell for cell in mine if view in (None, cell["request"]["view"])]
            base = _by_pair(seen, BASELINE, temperature)
            for recipe in dict.fromkeys(cell["recipe_name"] for cell in seen):
                pairs = _by_pair(seen, recipe, temperature)
                rows.append(
                    {"readings": readings, "view": view or "all", "recipe": recipe, **_row(pairs, base)}
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


def _by_pair(cells: Sequence[dict[str, Any]], recipe: str, temperature: float) -> list[dict[str, Tensor]]:
    """For each pair under each view: A, C, whether all readings were named, and the CLIP's own score."""
    out = []
    for cell in cells:
        if cell["recipe_name"] != recipe:
            continue
        names, samples = cell["request"]["names"], cell["samples"]
        scores = torch.tensor([sample["scores"] for sample in samples])  # (N, V, V)
        entry = {"A": alignment(scores), "C": concealment(scores, temperature)}
        entry["score"] = torch.tensor([sample["score"] for sample in samples])
        if "named" in samples[0]:
            entry["named"] = torch.tensor([float(sample["named"] == names) for sample in samples])
        out.append(entry)
    return out


def _row(pairs: list[dict[str, Tensor]], base: list[dict[str, Tensor]]) -> dict[str, Any]:
    flat = {name: torch.cat([pair[name] for pair in pairs]) for name in ("A", "C")}
    row: dict[str, Any] = {"pairs": len(pairs), "samples": len(flat["A"])}
    for name, values in flat.items():
        row[name] = round(values.mean().item(), 4)
        row[f"{name}.9"] = round(quantile(values).item(), 4)
    if "named" not in pairs[0]:
        return row
    each = torch.stack([pair["named"].mean() for pair in pairs])
    best = torch.stack([pair["named"][pair["score"].argmax()] for pair in pairs])
    any_of = torch.stack([pair["named"].max() for pair in pairs])
    row["all_named"], row["best_of_n"], row["any_of_n"] = (interval(v) for v in (each, best, any_of))
    if len(base) == len(pairs):
        plain = torch.stack([pair["named"][pair["score"].argmax()] for pair in base])
        plain_each = torch.stack([pair["named"].mean() for pair in base])
        row["all_named_over_plain"] = interval(each - plain_each)
        row["best_of_n_over_plain"] = interval(best - plain)
    return row


def interval(values: Tensor, statistic: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
    """A mean (or `statistic` over the last dimension) of (G,) values and its 95% bootstrap interval."""
    of = statistic or (lambda drawn: drawn.mean(-1))
    generator = torch.Generator().manual_seed(SEED)
    drawn = values[torch.randint(len(values), (DRAWS, len(values)), generator=generator)]
    low, high = of(drawn).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return {"value": round(of(values).item(), 4), "low": round(low, 4), "high": round(high, 4)}
