"""Reads tokens per second of inference engines out of records (op "vllm"): one row per engine.

Ratios are within one campaign. Each engine is shown with the numbers of the newest campaign that
measured it, beside the dense bfloat16 of the same campaign.
"""

from __future__ import annotations

from collections.abc import Iterable

NAMES = {
    "dense": "dense bfloat16",
    "fp8": "dense fp8 (vLLM's own)",
    "sparse": "2:4 bfloat16",
    "sparse-fp8": "2:4 fp8",
    "sparse-int8": "2:4 int8",
}
OURS, PEER = "sparse-fp8", "fp8"  # whose ratio is a row of its own


class Campaign:
    """The records of one campaign: cases in order of measurement, {engine: {case: record}}."""

    def __init__(self, name: str, records: list[dict]) -> None:
        self.name, self.gpu = name, records[0].get("gpu")
        self.cases = list(dict.fromkeys(entry["case"] for entry in records))
        self.engines: dict[str, dict[str, dict]] = {}
        for entry in records:
            self.engines.setdefault(entry["backend"], {})[entry["case"]] = entry

    @property
    def model(self) -> str:
        """ "8b, 32 layers" of "8b, 32 layers, batch 1"."""
        return self.cases[0].rpartition(", ")[0]

    @property
    def gpus(self) -> int:
        """2 of "8b, 32 layers, 2 GPUs, batch 1"; of "8b, 32 layers, batch 1" 1."""
        count, _, unit = self.model.rpartition(", ")[2].partition(" ")
        return int(count) if unit == "GPUs" else 1

    @property
    def version(self) -> str:
        """vLLM's, where the records say it."""
        details = (next(iter(e.values())).get("details") or {} for e in self.engines.values())
        return next((d["vllm"] for d in details if "vllm" in d), "")

    def rate(self, engine: str, case: str) -> float | None:
        entry = self.engines.get(engine, {}).get(case)
        return None if entry is None else entry["metrics"]["tokens_s"]

    def ratio(self, engine: str, peer: str, case: str) -> float | None:
        mine, other = self.rate(engine, case), self.rate(peer, case)
        return None if mine is None or other is None else mine / other

    def weights_gb(self, engine: str) -> float | None:
        details = [e.get("details") or {} for e in self.engines.get(engine, {}).values()]
        return next((d["weights_gb"] for d in details if "weights_gb" in d), None)

    def losses(self) -> list[tuple[str, str, str, float]]:
        """(engine, peer, case, ratio) where a 2:4 engine is slower than a dense one."""
        return [
            (engine, peer, case, value)
            for engine in self.engines
            if engine.startswith("sparse")
            for peer in ("dense", PEER)
            for case in self.cases
            if (value := self.ratio(engine, peer, case)) is not None and value < 1
        ]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(header, rows): engines down, cases across, tokens per second (times dense)."""
        shown = [case.rpartition(", ")[2] for case in self.cases]
        rows = []
        for engine in sorted(self.engines, key=_place):
            weights = self.weights_gb(engine)
            cells = [self._cell(engine, case) for case in self.cases]
            rows.append([NAMES.get(engine, engine), f"{weights:.1f}" if weights else "", *cells])
        ratios = [self.ratio(OURS, PEER, case) for case in self.cases]
        if any(value is not None for value in ratios):
            ours, peer = self.weights_gb(OURS), self.weights_gb(PEER)
            share = f"{ours / peer:.2f} x" if ours and peer else ""
            cells = ["" if value is None else f"{value:.2f}" for value in ratios]
            rows.append(["2:4 fp8 over dense fp8", share, *cells])
        return ["engine", "weights, GB", *shown], rows

    def _cell(self, engine: str, case: str) -> str:
        rate, value = self.rate(engine, case), self.ratio(engine, "dense", case)
        if rate is None:
            return ""
        return f"{rate:.0f}" if value is None or engine == "dense" else f"{rate:.0f} ({value:.2f})"


def campaigns(records: Iterable[dict]) -> list[Campaign]:
    """Of each GPU and set of engines the newest campaign, without those whose 2:4 engines a newer
    one measured, too; the newest first. Records oldest first."""
    groups: dict[str, list[dict]] = {}
    for entry in records:
        if entry["op"] == "vllm":
            groups.setdefault(entry.get("campaign", entry["id"]), []).append(entry)
    found: list[Campaign] = []
    known: set[tuple] = set()
    for name in reversed(groups):
        campaign = Campaign(name, groups[name])
        new = {(campaign.gpu, campaign.model, e) for e in campaign.engines if e != "dense"} - known
        if new or not known:
            found.append(campaign)
            known |= new
    return found


def _place(engine: str) -> tuple[int, str]:
    order = list(NAMES)
    return (order.index(engine) if engine in order else len(order), engine)
