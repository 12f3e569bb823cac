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
    """case -> (header, rows). Of records with the same start, loss and minutes the newest counts.

    Args:
        records: of op "finetune", oldest first.
    """
    found = {}
    for case in dict.fromkeys(entry["case"] for entry in records):
        kept: dict[tuple[str, str, int], dict] = {}
        for entry in records:
            if entry["case"] == case:
                minutes = entry["metrics"]["minutes"]
                kept[entry["backend"], loss_of(entry), round(60 * minutes / 15)] = entry
        found[case] = _of_case(list(kept.values()))
    return found


def loss_of(entry: dict) -> str:
    """What a record trained on: KL to the teacher, cross-entropy (CE), outputs of blocks; and with
    weight decay, where it had one."""
    settings = entry.get("settings") or {}
    alpha, block = settings.get("alpha", 0.0), settings.get("block", 0.0)
    parts = ["KL" if not alpha else f"{1 - alpha:g} KL"] if alpha < 1 else []
    parts += ["CE" if alpha == 1 else f"{alpha:g} CE"] if alpha else []
    parts += [f"{block:g} blocks"] if block else []
    decay = settings.get("weight_decay", 0.0)
    return " + ".join(parts) + (f", weight decay {decay:g}" if decay else "")


def _of_case(records: list[dict]) -> tuple[list[str], list[list[str]]]:
    last = records[-1]["metrics"]
    tests = [name.removeprefix("dense ") for name in last if name.startswith("dense ")]
    tests = [name for name in tests if f"perplexity {name}" in last]
    header = ["", "loss", *(f"perplexity, {name}" for name in tests), "GPU minutes"]
    header.append("tokens trained on")
    dense = [f"{last[f'dense {name}']:.2f}" for name in tests]
    lines = [["dense", "", *dense, "", ""]]
    order = {name: place for place, name in enumerate(NAMES)}
    records = sorted(
        records,
        key=lambda e: (order[e["backend"]], loss_of(e) != "KL", e["metrics"]["minutes"]),
    )
    for backend in dict.fromkeys(entry["backend"] for entry in records):
        entry = [e for e in records if e["backend"] == backend][-1]
        values = [f"{entry['metrics'][f'start {name}']:.2f}" for name in tests]
        seconds = entry["details"]["seconds"]["prune"]
        name = NAMES[backend][0] + _part(entry["details"].get("windows"))
        lines.append([name, "", *values, f"{seconds / 60:.1f}", "0"])
    for entry in records:
        metrics = entry["metrics"]
        values = [f"{metrics[f'perplexity {name}']:.2f}" for name in tests]
        name = f"{NAMES[entry['backend']][1]} ({metrics['minutes']:.1f} minutes)"
        minutes, tokens = metrics["gpu_seconds"] / 60, metrics["tokens"] / 1e6
        lines.append([name, loss_of(entry), *values, f"{minutes:.1f}", f"{tokens:.1f} M"])
    return header, lines


def _part(windows: dict | None) -> str:
    """What to say of a start that was evaluated on the first windows of its texts."""
    if windows is None or windows["start"] == windows["all"]:
        return ""
    return f" (the first {max(windows['start'].values())} windows)"


ARMS = {
    "sparse": "LoRA on the 2:4 model",
    "dense": "LoRA on the same weights, dense with zeros",
    "masked": "LoRA under the mask",
}


def lora_rows(records: list[dict]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """case -> (header, rows) of the newest record of each case and start.

    Args:
        records: of op "lora", oldest first.
    """
    newest = {(entry["case"], entry["backend"]): entry for entry in records}
    several = len({start for _, start in newest}) > 1
    return {
        f"{case}, {NAMES[start][0]}" if several else case: _of_lora(entry)
        for (case, start), entry in newest.items()
    }


def _of_lora(entry: dict) -> tuple[list[str], list[list[str]]]:
    metrics = entry["metrics"]
    tests = [name.removeprefix("ratio ") for name in metrics if name.startswith("ratio ")]
    header = ["", *(f"perplexity, {name}" for name in tests), "ms a step", "peak GB", "weights, MB"]
    header.append("a merge changes logits by")

    def line(name: str, kind: str, *more: str) -> list[str]:
        values = (metrics[f"{kind} {test}"] for test in tests)
        return [name, *("inf" if v is None else f"{v:.2f}" for v in values), *(more or [""] * 4)]

    lines = [line("dense model", "dense"), line(NAMES[entry["backend"]][0], "start")]
    for arm, name in ARMS.items():
        if f"ms_per_step {arm}" not in metrics:
            continue
        peak = metrics.get(f"peak_gb {arm}")
        megabytes = metrics[f"weight_bytes {arm}"] / 1e6
        numbers = [f"{metrics[f'ms_per_step {arm}']:.1f}", "" if peak is None else f"{peak:.2f}"]
        numbers += [f"{megabytes:.1f}", f"{metrics[f'merge_logits exact {arm}']:.2g}"]
        lines.append(line(name, f"lora {arm}", *numbers))
        if f"merged {arm} {tests[0]}" in metrics:
            lines.append(line("the same, merged", f"merged {arm}"))
    return header, lines


TABLES = {"finetune": rows, "lora": lora_rows}  # op -> what makes its tables of its records
