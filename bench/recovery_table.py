"""The table that articles on 2:4 sparsity promise, of one model, out of `bench finetune`'s records:
dense, pruned, and pruned and trained, with the GPU's minutes and the tokens that each took."""

from __future__ import annotations

NAMES = {
    "magnitude": ("magnitude", "ASP (magnitude, then training)"),
    "wanda": ("Wanda", "Wanda, then training"),
    "sparsegpt": ("SparseGPT", "SparseGPT, then training"),
    "default": ("the default preset", "the default preset, then training"),
    "best": ("the best preset", "the best preset, then training"),
}


def rows(records: list[dict]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """case -> (header, rows). Of records with the same start and minutes the newest counts.

    Args:
        records: of op "finetune", oldest first.
    """
    found = {}
    for case in dict.fromkeys(entry["case"] for entry in records):
        kept: dict[tuple[str, int], dict] = {}
        for entry in records:
            if entry["case"] == case:
                minutes = entry["metrics"]["minutes"]
                kept[entry["backend"], round(60 * minutes / 15)] = entry
        found[case] = _of_case(list(kept.values()))
    return found


def _of_case(records: list[dict]) -> tuple[list[str], list[list[str]]]:
    last = records[-1]["metrics"]
    tests = [name.removeprefix("dense ") for name in last if name.startswith("dense ")]
    tests = [name for name in tests if f"perplexity {name}" in last]
    header = ["", *(f"perplexity, {name}" for name in tests), "GPU minutes", "tokens trained on"]
    dense = [f"{last[f'dense {name}']:.2f}" for name in tests]
    lines = [["dense", *dense, "", ""]]
    order = {name: place for place, name in enumerate(NAMES)}
    records = sorted(records, key=lambda e: (order[e["backend"]], e["metrics"]["minutes"]))
    for backend in dict.fromkeys(entry["backend"] for entry in records):
        entry = [e for e in records if e["backend"] == backend][-1]
        values = [f"{entry['metrics'][f'start {name}']:.2f}" for name in tests]
        seconds = entry["details"]["seconds"]["prune"]
        name = NAMES[backend][0] + _part(entry["details"].get("windows"))
        lines.append([name, *values, f"{seconds / 60:.1f}", "0"])
    for entry in records:
        metrics = entry["metrics"]
        values = [f"{metrics[f'perplexity {name}']:.2f}" for name in tests]
        name = f"{NAMES[entry['backend']][1]} ({metrics['minutes']:.1f} minutes)"
        minutes, tokens = metrics["gpu_seconds"] / 60, metrics["tokens"] / 1e6
        lines.append([name, *values, f"{minutes:.1f}", f"{tokens:.1f} M"])
    return header, lines


def _part(windows: dict | None) -> str:
    """What to say of a start that was evaluated on the first windows of its texts."""
    if windows is None or windows["start"] == windows["all"]:
        return ""
    return f" (the first {max(windows['start'].values())} windows)"
