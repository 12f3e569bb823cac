"""The numbers of the README, from the records: what is lost, in quality and in speed; then size and
speed, tables of engines and of layers with means and extremes. Losses are in the same ranges, and
counted; one by one they are in bench/RESULTS.md.
"""

from __future__ import annotations

import statistics

from . import engines, recovery_table, results, results8

RANGES = ((1, 16), (17, 64), (65, 512), (513, 10**9))
DTYPE, FP8 = "bfloat16", "float8_e4m3fn"
# The rows of bench quality on the headline's model and test, SmolLM2-135M and WikiText-2.
QUALITY_CASE = "s.gguf, wiki.test.raw, 148 windows of 2048"
BEGIN, END = "<!-- headline:begin -->", "<!-- headline:end -->"


def render(records: list[dict]) -> str:
    """Losses, facts, and tables of ratios; "" without records of a GPU."""
    clean = [entry for entry in records if entry["dirty"] is False]
    gpu = chosen_gpu(clean)
    if gpu is None:
        return ""
    mine = [entry for entry in clean if entry.get("gpu") == gpu]
    found = [cell for cell in results.cells(mine) if cell.dtype == DTYPE]
    facts = [_quality(clean, gpu), _lost(found), _lost_8_bits(clean), _size(mine), _speed(mine)]
    lines = [
        *(fact for fact in facts if fact),
        *_recovery(clean),
        *_engines(clean),
        "",
        f"Linear layers of Llama-3 shapes on one {gpu} in {DTYPE}: time of the peer over ours,",
        "geometric mean and extremes of all that were timed.",
        "",
        "| linear layers | over cuBLAS | over cuSPARSELt, searched |",
        "| --- | ---: | ---: |",
    ]
    for first, last in RANGES:
        cells = [cell for cell in found if first <= cell.tokens <= last]
        if not cells:
            continue
        most = max(cell.tokens for cell in cells)
        ratios = [_ratios(cells, peer) for peer in results.PEERS]
        lines.append(f"| {first} to {most} tokens | {ratios[0]} | {ratios[1]} |")
    return "\n".join([*lines, *_layers_8_bits(clean)]).strip()


def chosen_gpu(clean: list[dict]) -> str | None:
    """The GPU with the most records of linear layers; None without any."""
    gpus = [entry["gpu"] for entry in clean if entry["op"] == "linear" and entry.get("gpu")]
    return max(sorted(set(gpus)), key=gpus.count) if gpus else None


def _ratios(cells: list[results.Cell], peer: str) -> str:
    return _spread([cell.ratio(peer) for cell in cells])


def _spread(ratios: list[float | None]) -> str:
    """ "1.43 (1.21 to 1.94)": geometric mean and extremes; "-" for none."""
    values = [value for value in ratios if value is not None]
    if not values:
        return "-"
    return f"{results.geometric_mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _lost(found: list[results.Cell]) -> str:
    """How often each peer is faster, and the worst of it."""
    parts, losses = [], results.losses(found)
    for peer, name in results.PEERS.items():
        of = sum(cell.ratio(peer) is not None for cell in found)
        ratios = [ratio for _, loser, ratio in losses if loser == peer]
        text = f"{name} is faster in {len(ratios)} of {of} cells"
        parts.append(f"{text}, at worst {min(ratios):.2f}" if ratios else text)
    return f"- **Lost, 16-bit layers**: {'; '.join(parts)}."


def _lost_8_bits(records: list[dict]) -> str:
    """Ratios of what is slower on average among the ways to compute with quantised weights."""
    found = results8.cells(records)
    ways = (
        (
            FP8,
            "fp8, x kept in 16 bits (backend `cuda-a16`) at 33 to 64 tokens",
            33,
            64,
            "W8A16",
            "2:4 16-bit",
            "our 16-bit kernel",
        ),
        (
            FP8,
            "fp8, sums in float32 above 512 tokens",
            513,
            10**9,
            "W8A8 precise",
            "dense 8-bit",
            "dense fp8",
        ),
        ("int4", "int4 at 33 to 512 tokens", 33, 512, "W4A16", "cuBLAS 16-bit", "cuBLAS"),
        ("int4", "and above", 513, 10**9, "W4A16", "2:4 16-bit", "our 16-bit kernel"),
    )
    parts = []
    for dtype, text, first, last, ours, peer, name in ways:
        members = [c for c in found if c.dtype == dtype and first <= c.tokens <= last]
        ratios = [v for cell in members if (v := results8.ratio(cell, ours, peer)) is not None]
        if ratios and results.geometric_mean(ratios) < 1:
            parts.append(f"{text} run at {_spread(ratios)} of the speed of {name}")
    return f"- **Lost, quantised layers**: {'; '.join(parts)}." if parts else ""


def _layers_8_bits(records: list[dict]) -> list[str]:
    """Two lines of a table: fp8 weights with x of 16 bits (few tokens) and of 8 bits (more)."""
    found = [cell for cell in results8.cells(records) if cell.dtype == FP8]
    lines = []
    for ours, first, last, text in (
        ("W8A16", 1, 64, "x kept in 16 bits"),
        ("W8A8", 65, 10**9, "x of fp8"),
    ):
        cells = [cell for cell in found if first <= cell.tokens <= last]
        if not cells:
            continue
        spreads = [
            _spread([results8.ratio(cell, ours, peer) for cell in cells])
            for peer in ("dense 8-bit", "cuBLAS 16-bit")
        ]
        most = max(cell.tokens for cell in cells)
        lines.append(f"| {first} to {most} tokens, {text} | {spreads[0]} | {spreads[1]} |")
    if not lines:
        return []
    gpus = sorted({cell.found[name]["gpu"] for cell in found for name in cell.found})
    head = f"| fp8 2:4 layers, {', '.join(gpus)} | over dense fp8 | over cuBLAS bfloat16 |"
    return ["", head, "| --- | ---: | ---: |", *lines]


def _newest(records: list[dict], op: str) -> list[dict]:
    """The records of the newest campaign of an op, oldest first."""
    entries = [entry for entry in records if entry["op"] == op]
    return [entry for entry in entries if entry["campaign"] == entries[-1]["campaign"]]


def _models(records: list[dict]) -> tuple[str, dict, dict] | None:
    """(case, dense, best sparse form): the newest decode_model records of the smallest batch."""
    entries = _newest(records, "decode_model")
    if not entries:
        return None
    case = min((entry["case"] for entry in entries), key=_batch)
    metrics = {entry["backend"]: entry["metrics"] for entry in entries if entry["case"] == case}
    dense = metrics.pop("dense")
    return case, dense, max(metrics.values(), key=lambda m: m["tokens_s"])


def _size(records: list[dict]) -> str:
    models = _models(records)
    if models is None:
        return ""
    case, dense, best = models
    return (
        f"- **Size**: 9/16 of the 16-bit bytes of every pruned layer, on disk and on the GPU. "
        f"A model ({case.partition(', batch')[0]}) with dense embeddings: "
        f"{best['weights_gb']:.1f} instead of {dense['weights_gb']:.1f} GB of weights."
    )


def _speed(records: list[dict]) -> str:
    models = _models(records)
    if models is None:
        return ""
    case, dense, best = models
    rates = f"{best['tokens_s']:.0f} instead of {dense['tokens_s']:.0f} tokens/s"
    return (
        f"- **Speed**: decoding with that model ({case.partition('layers, ')[2]}): {rates}, "
        f"{best['tokens_s'] / dense['tokens_s']:.2f} times as fast."
    )


def _engines(records: list[dict]) -> list[str]:
    """Lines of a table: a real vLLM, every engine over dense bfloat16 of its own run, and 2:4 fp8
    over dense fp8 of the same run."""
    found = [c for c in engines.campaigns(records) if c.gpus == 1]
    if not found:
        return []
    newest = found[0]
    title = f"{newest.model} in vLLM {newest.version}".strip()
    shown = [case.rpartition(", ")[2] for case in newest.cases]
    rates = [f"{newest.rate('dense', case) or 0:.0f}" for case in newest.cases]
    rows = {"dense": [f"{engines.NAMES['dense']}, tokens/s", _gb(newest, "dense"), *rates]}
    for campaign in found:
        for engine in campaign.engines:
            ratios = [campaign.ratio(engine, "dense", case) for case in newest.cases]
            if engine not in rows and any(value is not None for value in ratios):
                texts = ["" if value is None else f"{value:.2f} x" for value in ratios]
                rows[engine] = [engines.NAMES.get(engine, engine), _gb(campaign, engine), *texts]
    order = [engine for engine in engines.NAMES if engine in rows]
    lines = [rows[engine] for engine in order]
    ratios = [newest.ratio(engines.OURS, engines.PEER, case) for case in newest.cases]
    if any(value is not None for value in ratios):
        texts = ["" if value is None else f"{value:.2f} x" for value in ratios]
        lines.append(["**2:4 fp8 over dense fp8**", "", *texts])
    return [
        "",
        f"Whole engines on one {newest.gpu}, random weights, dense lm_head; each over the dense",
        "bfloat16 of its own run.",
        "",
        f"| {title} | weights | {' | '.join(shown)} |",
        "| --- |" + " ---: |" * (len(shown) + 1),
        *(f"| {' | '.join(line)} |" for line in lines),
    ]


def _gb(campaign: engines.Campaign, engine: str) -> str:
    weights = campaign.weights_gb(engine)
    return "" if weights is None else f"{weights:.1f} GB"


def _quality(records: list[dict], gpu: str) -> str:
    """Perplexity of the newest record of each method and of the dense model, made on this GPU, and
    of the presets, in the mean over the seeds of their newest version; with what quantisation does
    to it, made on any."""
    found = {}
    for entry in records:
        if entry["op"] != "prune_model" or entry.get("gpu") != gpu:
            continue
        details = entry.get("details") or {}
        name = entry["backend"]
        if name == "sparsegpt":
            name += _variant(details)
        found[name] = entry["metrics"]["perplexity"]
    rows = [e for e in records if e["op"] == "quality" and e["case"].startswith(QUALITY_CASE)]
    newest = {entry["backend"]: entry["git"] for entry in rows}
    for name, git in newest.items():
        seeds = [e for e in rows if e["backend"] == name and e["git"] == git]
        found[name] = statistics.fmean(e["metrics"]["perplexity"] for e in seeds)
    wanted = {
        "best": "with the preset `best`",
        "default": "with `default`",
        "fast": "with `fast`",
        "sparsegpt default": "without a preset (SparseGPT, refined, matched to dense)",
        "sparsegpt published": "with SparseGPT as published",
        "wanda": "with Wanda",
        "magnitude": "with magnitude",
    }
    parts = [f"{found[name]:.1f} {text}" for name, text in wanted.items() if name in found]
    if "dense" not in found or not parts:
        return ""
    return (
        f"- **Lost, quality**: one-shot pruning costs much, and a small model pays most. "
        f"SmolLM2-135M, perplexity on WikiText-2: dense {found['dense']:.1f}; {', '.join(parts)}."
        f"{_quantised(records)}"
    )


def _recovery(records: list[dict]) -> list[str]:
    """Lines of a table: pruned, and pruned and trained under the mask; the newest case."""
    entries = [entry for entry in records if entry["op"] == "finetune"]
    if not entries:
        return []
    case, gpu = entries[-1]["case"], entries[-1]["gpu"]
    header, rows = recovery_table.rows(entries)[case]
    return [
        "",
        f"SmolLM2-135M on one {gpu}: pruned, and trained on under the mask by distillation from",
        "the dense model, on texts apart from the tests and on text that it wrote itself.",
        "The presets are calibrated on all of the texts.",
        "",
        f"| {' | '.join(header)} |",
        "| --- |" + " ---: |" * (len(header) - 1),
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _quantised(records: list[dict]) -> str:
    """What levels instead of 16 bits add to the perplexity of the 2:4 model."""
    parts = {}
    for entry in records:
        share = entry["metrics"].get("of_16_bit_2:4") if entry["op"] == "quantize" else None
        if share is not None and entry["backend"].startswith("2:4, "):
            parts[entry["backend"].removeprefix("2:4, ")] = f"{share - 1:.1%}"
    if not parts:
        return ""
    texts = ", ".join(f"{name} {value}" for name, value in parts.items())
    text = f" Quantising the kept weights adds: {texts} (rtn: to the nearest level)."
    return text + _trained(records)


def _trained(records: list[dict]) -> str:
    """Perplexities of presets whose blocks were trained through their levels, beside their 16
    bits, which had half as many epochs."""
    newest = {e["backend"]: e["metrics"]["perplexity"] for e in records if e["op"] == "quantize"}
    rows = []
    for word, preset in (("blocks", "default"), ("best", "best")):
        start, end = f"{word}, ", " trained"
        found = [
            f"{name.removeprefix(start).removesuffix(end)} {value:.1f}"
            for name, value in newest.items()
            if name.startswith(start) and name.endswith(end)
        ]
        if found and word in newest:
            rows.append(f"`{preset}` {', '.join(found)} (16 bits: {newest[word]:.1f})")
    if not rows:
        return ""
    return f" Blocks trained through their levels, for as many epochs again: {'; '.join(rows)}."


def _variant(details: dict) -> str:
    refine, share = details.get("refine"), details.get("match_dense")
    if refine == 16 and share == 0.25:
        return " default"
    return " published" if refine == 0 and not share else " other"


def _batch(case: str) -> int:
    return int(case.partition("batch ")[2].partition(",")[0])
