"""`sparsekern verify` of a folder pruned to another pattern than 2:4: dense weights with zeros."""

from __future__ import annotations

from pathlib import Path

from sparsekern.integrations.loading import load_model
from sparsekern.nn.replace import dense_weight, is_linear
from sparsekern.oneshot.report import PruneReport

REPORT = "prune_report.json"


def other_pattern(directory: str | Path) -> PruneReport | None:
    """The report in a folder whose weights are of another pattern than 2:4, else None."""
    path = Path(directory) / REPORT
    if not path.is_file():
        return None
    report = PruneReport.from_json(path.read_text(encoding="utf-8"))
    return report if report.pattern != (2, 4) else None


def verify_pattern(directory: str | Path, report: PruneReport) -> int:
    """Print, for every layer that the report calls pruned, whether its weight in the folder keeps
    the pattern; returns 0, or 1 where one does not."""
    model, _ = load_model(directory)
    modules = dict(model.named_modules())
    pattern, wrong, good = report.pattern, [], 0
    for row in report.pruned:
        module = modules.get(row.name)
        if module is None or not is_linear(module):
            wrong.append(f"{row.name}: no such linear layer")
            continue
        broken = pattern.broken(dense_weight(module))
        if row.pattern is None or not bool(broken.any()):
            good += 1
        else:
            wrong.append(f"{row.name}: {int(broken.sum())} of {broken.numel()} groups are not")
    print(f"{good} of {len(report.pruned)} pruned layers are {pattern}, dense weights with zeros")
    print("".join(f"wrong    {text}\n" for text in wrong), end="")
    return 1 if wrong or not report.pruned else 0
