"""The tables of results, made from bench/records: `python -m bench table [--check]`.

bench/RESULTS.md is written whole; in README.md what stands between the markers of headline.py is
replaced, and the figure (figure.py) is drawn again. `--check` changes nothing and fails when one of
them differs. So no number there is typed by hand, and shapes where a peer wins come first.

Linear layers become, for each GPU: first the list of all cells where a peer is faster; then for
each dtype a table for few tokens (decode) and one for many (prefill), with the ratios to cuBLAS and
cuSPARSELt (results.py). Other records with "us" become one table per op and GPU: a row per shape, a
column per backend with the median in microseconds and, where the same campaign timed the backend
"dense" (or that of BASES), the speed-up over it. Records with "metrics" become one table per op and
GPU: a row per case and backend. Of several campaigns for the same row the newest is shown. Engines
become one table per campaign (engines.py), random shapes a verdict (verdict.py), quantised layers
one per type and way to compute (results8.py), recovery the table of recovery_table.py. Records of
changed sources (dirty) are left out, and so are sweeps (HIDDEN).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from . import engines, figure, headline, record, recovery_table, results, results8, verdict
from .results import markdown

README = record.ROOT / "README.md"
RESULTS = record.ROOT / "bench" / "RESULTS.md"
INTRODUCTION = """# Results

Made from bench/records by `python -m bench table`; not to be edited. How it is measured, and how to
repeat it, is in bench/README.md. Ratios are the time of the peer over ours: below 1 the peer is
faster. In the tables of pruning and quantisation m.gguf and s.gguf are
SmolLM2-135M-Instruct.Q4_1.gguf, calibrated on C4 (128 windows of 2048 tokens where the case names
no other number) and evaluated on WikiText-2; "refine 0" is each method as published. Those made on
a CPU use the demo's text, with 20 windows of 512 tokens.
"""
NOTHING = "No measurements are recorded yet."

# In this order; ops that are not here follow, under their own name.
TITLES = {
    "linear": "Linear layers",
    "linear8": "Linear layers with quantised 2:4 weights",
    "activations": "Quantising activations",
    "mma_era": "mma.sp against dense mma.sync kernels on this GPU",
    "vllm": "A real vLLM, tokens per second (times dense bfloat16), random weights",
    "generate": "Decoding in Transformers, static cache, compiled",
    "serve": "Behind vLLM's HTTP server",
    "decode_model": "Decoding a whole model",
    "prune_model": "Pruning",
    "quality": "Pruning, what each part is worth",
    "prune_blocks": "Pruning blocks of a large model's shape by a preset, random weights",
    "quantize": "Quantised 2:4 weights, and quantising before pruning",
    "checkpoint": "Checkpoints",
    "compress": "Compression",
    "public_call": "What a caller gets who compresses and calls",
    "eager_call": "Host time of one eager call",
    "hosttime": "Host time of one eager call, this version against the one before",
    "finetune": "Recovery by masked distillation",
    "lora": "LoRA on a compressed model against the same weights dense with zeros",
    "training_step": "A training step of an MLP block, sparse against dense",
    "lora_step": "A LoRA step on a frozen 2:4 block against a dense one",
    "linear_peer": "What could not be compared",
    "bandwidth": "Memory bandwidth of the machine",
}
BASES = {"mma_era": "dense mma.sync"}  # the backend whose time is divided; others: "dense"
# One record per config, for csrc/NOTES.md and not for the README; what was not finished; random
# shapes, which have a section of their own (verdict.py).
HIDDEN = ("linear_config", "finetune_stopped", "quality_stopped", "serve_stopped")
HIDDEN += (verdict.OP, verdict.PICK)
DECODE_TOKENS = 64  # up to here a cell stands in the decode table
MAX_LOSSES = 20  # to cuSPARSELt in the list, the worst first; the rest is counted


def number(value: float) -> str:
    """Four significant digits, without exponent."""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.4g}"


def newest(records: list[dict], key) -> dict:
    """Groups records by `key`, keeping those of the newest campaign of each group.

    A campaign is one run: its records carry the same "campaign", or are alone without it.
    """
    groups: dict = {}
    for entry in records:  # oldest first
        campaign = entry.get("campaign", entry["id"])
        group = groups.get(key(entry))
        if group is None or group[0] != campaign:
            groups[key(entry)] = group = (campaign, {})
        group[1][entry["backend"]] = entry
    return groups


def timing_table(records: list[dict], base: str = "dense") -> str:
    """Rows of shapes, columns of backends. All records have "us" and the same op and GPU.

    Args:
        base: the backend that comes first; the others have their speed-up over it in parentheses.
    """

    def shape(entry):
        return tuple(entry.get(n, 0) for n in ("out_features", "in_features", "tokens", "dtype"))

    groups = newest(records, lambda entry: tuple(str(part) for part in shape(entry)))
    groups = dict(sorted(groups.items(), key=lambda item: _numeric(item[0])))
    backends = {name: None for _, found in groups.values() for name in found}
    order = sorted(backends, key=lambda name: (name != base, name))
    rows = []
    for (out_features, in_features, tokens, dtype), (campaign, found) in groups.items():
        reference = found.get(base)
        row = [f"{out_features} x {in_features}", tokens, dtype]
        for name in order:
            if name not in found:
                row.append("")
                continue
            cell = number(found[name]["us"]["p50"])
            if reference is not None and name != base:
                cell += f" ({reference['us']['p50'] / found[name]['us']['p50']:.2f}x)"
            row.append(cell)
        rows.append([*row, str(campaign)])
    return markdown(["out x in", "tokens", "dtype", *(f"{b} us" for b in order), "campaign"], rows)


def metrics_table(records: list[dict]) -> str:
    """Rows of cases and backends, columns of metrics. All records have the same op and GPU."""
    groups = newest(records, lambda entry: (_case(entry), entry["backend"]))
    entries = [
        (case, backend, found[backend], campaign)
        for (case, backend), (campaign, found) in sorted(groups.items(), key=_natural)
    ]
    names = list(dict.fromkeys(name for _, _, entry, _ in entries for name in entry["metrics"]))
    rows = []
    for case, backend, entry, campaign in entries:
        values = (entry["metrics"].get(name) for name in names)
        cells = ("" if v is None else v if isinstance(v, str) else number(v) for v in values)
        rows.append([case, backend, *cells, str(campaign)])
    return markdown(["case", "backend", *names, "campaign"], rows)


def _natural(item: tuple) -> list:
    """Orders texts with their numbers by value: 256 x 4096 before 4096 x 4096."""
    parts = (re.split(r"(\d+)", text) for text in item[0])
    return [[int(part) if part.isdigit() else part for part in text] for text in parts]


def _case(entry: dict) -> str:
    """The case without the backend; of a pruning also the dtype, the steps of refinement and the
    batch size."""
    case, details = entry.get("case", ""), entry.get("details") or {}
    if entry["op"] == "quality":
        case = case.replace(f", {entry['backend']}, ", ", ")
    if entry["op"] == "prune_blocks":
        case += f", {details['ranks']} GPUs" if details["ranks"] > 1 else ", one GPU"
    if entry["op"] == "prune_model" and "refine" in details:
        case += f", {entry['dtype']}, refine {details['refine']}"
        if share := details.get("match_dense"):
            case += f", match_dense {share}"
        if batch := entry["settings"].get("batch_size"):
            case += f", batch size {batch}"
    return case


def linear_tables(records: list[dict]) -> str:
    """Decode and prefill by dtype. All records have op "linear" and the same GPU."""
    found = results.cells(records)
    portable = results.cells(records, timed="triton")
    parts = []
    for dtype in dict.fromkeys(cell.dtype for cell in found):
        cells = [cell for cell in found if cell.dtype == dtype]
        few = [cell for cell in cells if cell.tokens <= DECODE_TOKENS]
        many = [cell for cell in cells if cell.tokens > DECODE_TOKENS]
        triton = [cell for cell in portable if cell.dtype == dtype]
        kinds = (
            (few, "decode", "time of cuBLAS / cuSPARSELt over ours", results.OURS),
            (triton, "Triton kernels", "the same for the portable kernels", "triton"),
            (many, "prefill", "the same, and (dense-equivalent TFLOPS)", results.OURS),
        )
        for members, name, text, ours in kinds:
            timed = [cell for cell in members if cell.us(ours) is not None]
            if timed:
                lines = markdown(*results.grid(timed, members is many, ours))
                parts.append(f"{name}, {dtype}: {text}\n\n{lines}")
    campaigns = ", ".join(sorted({cell.campaign for cell in found}))
    return "\n\n".join([*parts, f'Medians of campaigns {campaigns}; "-": not timed.'])


def quantized_tables(records: list[dict]) -> str:
    """The grids of results8. All records have op "linear8" and the same GPU."""
    parts = [
        f"{title}\n\n{markdown(header, rows)}" for title, header, rows in results8.grids(records)
    ]
    campaigns = ", ".join(sorted({cell.campaign for cell in results8.cells(records)}))
    return "\n\n".join([*parts, f'Medians of campaigns {campaigns}; "-": not timed.'])


def engine_tables(records: list[dict]) -> str:
    """A table per campaign. All records have op "vllm" and the same GPU."""
    parts = []
    for campaign in engines.campaigns(records):
        version = f"vLLM {campaign.version}, " if campaign.version else ""
        title = f"{version}{campaign.model}, campaign {campaign.name}"
        parts.append(f"{title}\n\n{markdown(*campaign.table())}")
    return "\n\n".join(parts)


def activation_losses(records: list[dict]) -> str:
    """How often quantising activations moves bytes more slowly than a copy; "" without records."""
    entries = [e for e in records if e["op"] == "activations"]
    groups = newest(entries, lambda e: (_case(e), e["backend"])).values()
    shares = [e["metrics"]["of_copy"] for _, found in groups for e in found.values()]
    if not shares:
        return ""
    lost = sum(share < 1 for share in shares)
    return (
        f"Quantising activations moves bytes more slowly than a copy in {lost} of {len(shares)} "
        f"cases, {min(shares):.2f} to {max(shares):.2f} of its bandwidth."
    )


def engine_losses(records: list[dict]) -> str:
    """Where a dense engine is faster than a 2:4 one; "" without records of engines."""
    found = engines.campaigns(records)
    lost = [(e, p, case, v) for c in found for e, p, case, v in c.losses()]
    if not found:
        return ""
    if not lost:
        return "Engines: 2:4 is slower than dense in none of the cases."
    rows = [
        [case, engines.NAMES[engine], engines.NAMES[peer], f"{value:.3f}"]
        for engine, peer, case, value in sorted(lost, key=lambda item: item[3])
    ]
    return "Engines\n\n" + markdown(["case", "ours", "faster", "ours / its tokens/s"], rows)


def losses(records: list[dict]) -> str:
    """What is slower than a peer on one GPU: linear layers, the Triton and the mma.sp kernel,
    quantised layers, quantising activations, engines."""
    linear = [entry for entry in records if entry["op"] == "linear" and "us" in entry]
    parts = [losses_table(results.cells(linear))] if linear else []
    cells = results.cells(linear, timed="triton")
    ratios = [c.ratio("dense", "triton") for c in cells if c.us("triton") and c.us("dense")]
    if ratios:
        lost = sum(ratio < 1 for ratio in ratios)
        parts.append(
            f"The Triton kernel is slower than cuBLAS in {lost} of {len(ratios)} comparisons, "
            f"{min(ratios):.2f} to {max(ratios):.2f}."
        )
    quantized = results8.losses_table(records)
    if quantized is not None:
        text, header, rows = quantized
        parts.append(f"{text}\n\n{markdown(header, rows)}" if rows else f"{text}.")
        parts += results8.more_losses(records)
    parts += [text for text in (activation_losses(records), engine_losses(records)) if text]
    eras = [entry for entry in records if entry["op"] == "mma_era" and "us" in entry]
    base, ratios = BASES["mma_era"], []
    for _, found in newest(
        eras, lambda e: (e["out_features"], e["in_features"], e["tokens"], e["dtype"])
    ).values():
        ours = [e["us"]["p50"] for name, e in found.items() if name.startswith("cuda-mma")]
        if ours and base in found:
            ratios.append(found[base]["us"]["p50"] / min(ours))
    if ratios:
        lost = sum(ratio < 1 for ratio in ratios)
        parts.append(
            f"The mma.sp kernel is slower than dense `mma.sync` kernels in {lost} of {len(ratios)} "
            f"comparisons, {min(ratios):.2f} to {max(ratios):.2f}."
        )
    return "\n\n".join(parts)


def losses_table(found: list[results.Cell]) -> str:
    """Every cell in which dense is faster, and the worst to cuSPARSELt."""
    lost = results.losses(found)
    total = sum(map(results.compared, found))
    if not lost:
        return f"Linear layers: in none of {total} comparisons."
    by_peer = {peer: [loss for loss in lost if loss[1] == peer] for peer in results.PEERS}
    listed = by_peer["dense"] + by_peer["cusparselt"][:MAX_LOSSES]
    rows = [
        [cell.shape, str(cell.tokens), cell.dtype, results.PEERS[peer], f"{ratio:.3f}"]
        for cell, peer, ratio in sorted(listed, key=lambda loss: loss[2])
    ]
    counts = [f"{len(by_peer[peer])} times to {name}" for peer, name in results.PEERS.items()]
    more = f", of which the worst {MAX_LOSSES}" if len(listed) < len(lost) else ""
    text = f"Linear layers: in {len(lost)} of {total} comparisons, {' and '.join(counts)}{more}"
    lines = markdown(["out x in", "tokens", "dtype", "faster", "its time / ours"], rows)
    return f"{text}\n\n{lines}"


def render(records: list[dict]) -> str:
    """The text between the markers for these records."""
    clean = [e for e in records if e["dirty"] is False and e["op"] not in HIDDEN]
    tables: dict = {}
    for entry in clean:
        kind = "us" if "us" in entry else "metrics"
        tables.setdefault((entry["op"], entry.get("gpu") or "CPU", kind), []).append(entry)
    if not tables:
        return NOTHING
    order = list(TITLES)
    parts = []
    for gpu in sorted({entry.get("gpu") or "CPU" for entry in clean}):
        text = losses([entry for entry in clean if (entry.get("gpu") or "CPU") == gpu])
        if text:
            parts.append(f"**Where we lose**, {gpu}\n\n{text}")
    for key in sorted(tables, key=lambda k: (order.index(k[0]) if k[0] in order else 99, *k)):
        (op, gpu, kind), entries = key, tables[key]
        if op == "linear" and kind == "us":
            table = linear_tables(entries)
        elif op == "linear8" and kind == "us":
            table = quantized_tables(entries)
        elif op == "vllm":
            table = engine_tables(entries)
        else:
            base = BASES.get(op, "dense")
            table = timing_table(entries, base) if kind == "us" else metrics_table(entries)
        if op in recovery_table.TABLES:
            tables_of = recovery_table.TABLES[op](entries).items()
            promised = [f"{case}\n\n{markdown(*table_of)}" for case, table_of in tables_of]
            table = "\n\n".join([*promised, table] if op == "finetune" else promised)
        sources = sorted({str(entry.get("git"))[:10] for entry in entries})
        versions = sorted({f"torch {entry.get('torch')}" for entry in entries})
        title = f"**{TITLES.get(op, op)}**, {gpu}, {', '.join(versions)}, git {', '.join(sources)}"
        parts.append(f"{title}\n\n{table}")
    return "\n\n".join(parts)


def replace(readme: str, text: str, first: str, last: str) -> str:
    """README text with `text` between the markers `first` and `last`.

    Raises:
        ValueError: the markers are not there exactly once, in order.
    """
    before, begin, rest = readme.partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end) or first in rest or last in before + after:
        expected = f"one {first} and one {last} after it in the README"
        raise ValueError(f"bench.table: expected {expected}.")
    return f"{before}{begin}\n{text}\n{end}{after}"


def _numeric(key: tuple[str, ...]) -> tuple:
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in key)


def main(
    arguments: list[str],
    readme: Path = README,
    target: Path = RESULTS,
    records: list[dict] | None = None,
) -> int:
    """Write, or with --check compare, RESULTS.md, the README's numbers and the figure."""
    if arguments not in ([], ["--check"]):
        print("usage: python -m bench table [--check]", file=sys.stderr)
        return 2
    records = record.read() if records is None else records
    text = readme.read_text(encoding="utf-8")
    wanted = {
        target: f"{INTRODUCTION}\n{verdict.section(records)}\n\n{render(records)}\n",
        readme: replace(text, headline.render(records), headline.BEGIN, headline.END),
    }
    code = 0
    for path, content in wanted.items():
        if path.is_file() and path.read_text(encoding="utf-8") == content:
            continue
        if arguments:
            print(f"{path.name} differs from bench/records. Run: python -m bench table")
            code = 1
        else:
            path.write_text(content, encoding="utf-8")
            print(f"{path.name}: written")
    if readme == README and not figure.up_to_date(records):
        if arguments:
            print("docs/figures differs from bench/records. Run: python -m bench table")
            code = 1
        else:
            figure.draw(records)
            print("docs/figures: drawn")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
