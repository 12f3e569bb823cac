"""The folder of a run of distill: what it goes on from, and what it says.

checkpoint.pt    the student, random numbers and evaluations after a step, and the manifest:
                 what a run that goes on has to have in common with this one
metrics.jsonl, plot.png    metrics.py
report.json      DistillReport, at the end
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from sparsekern.errors import FormatError, check
from sparsekern.finetune import metrics
from sparsekern.finetune.inputs import Teacher
from sparsekern.finetune.recipe import OP, DistillReport
from sparsekern.finetune.schedule import Frozen
from sparsekern.finetune.student import Student
from sparsekern.finetune.teacher import LiveTeacher
from sparsekern.finetune.world import World
from sparsekern.oneshot.fingerprint import of_tensors
from sparsekern.utils.arguments import shown
from sparsekern.utils.files import renamed, write_atomic

CHECKPOINT, REPORT = "checkpoint.pt", "report.json"


class RunFiles:
    """The files of one run, in a folder or, with None, nowhere. The first process writes them."""

    def __init__(
        self,
        folder: str | Path | None,
        student: Student,
        teacher: Teacher | None,
        report: DistillReport,
        world: World,
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.student, self.report, self.world = student, report, world
        if self.folder is not None:
            self.manifest = json.loads(json.dumps(_identity(student, teacher, report, world)))

    def begin(self, step: int) -> None:
        """Drop what an interrupted process had logged after its checkpoint of `step`."""
        if self.folder is not None and self.world.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            metrics.truncate(self.folder, step)

    def log(self, row: dict[str, Any]) -> None:
        """One line more of metrics.jsonl."""
        if self.folder is not None and self.world.first:
            metrics.append(self.folder, row)

    def save(self, step: int, seconds: float) -> None:
        """Write checkpoint.pt, for which every process is asked."""
        device = self.world.device
        rng = self.world.gather(torch.get_rng_state())
        cuda = device.type == "cuda"
        device_rng = self.world.gather(torch.cuda.get_rng_state(device)) if cuda else []
        student = self.student.state_dict()
        if not self.world.first or self.folder is None:
            return
        state = {
            "manifest": self.manifest,
            "step": step,
            "seconds": seconds,
            **student,
            "rng": rng,
            "device_rng": device_rng,
            "evaluations": self.report.evaluations,
            "loss": self.report.loss,
        }
        final = self.folder / CHECKPOINT
        partial = final.with_suffix(".part")
        remedy = "Make room there: the same call goes on from the checkpoint before."
        with renamed(OP, partial, final, remedy):
            torch.save(state, partial)

    def load(self) -> tuple[int, float]:
        """(step to go on from, seconds until then) after reading checkpoint.pt; (0, 0) without."""
        if self.folder is None or not (self.folder / CHECKPOINT).exists():
            return 0, 0.0
        path, device = self.folder / CHECKPOINT, self.world.device
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            remedy = "Delete it to start again."
            got = f"{type(error).__name__}: {error}"
            check(False, OP, f"a checkpoint in {path}", got, remedy, FormatError)
            raise
        remedy = "Choose another folder, or delete it to start again."
        known = isinstance(state, dict) and isinstance(state.get("manifest"), dict)
        check(known, OP, f"a checkpoint of distill in {path}", shown(state), remedy, FormatError)
        differing = [k for k in self.manifest if state["manifest"].get(k) != self.manifest[k]]
        remedy = "Choose another folder, or pass resume=False."
        check(not differing, OP, f"the run of {path}", f"another {', '.join(differing)}", remedy)
        self.student.load_state_dict(state)
        torch.set_rng_state(state["rng"][self.world.rank])
        if state["device_rng"] and device.type == "cuda":
            torch.cuda.set_rng_state(state["device_rng"][self.world.rank], device)
        self.report.evaluations = list(state["evaluations"])
        self.report.loss = float(state["loss"])
        return int(state["step"]), float(state["seconds"])

    def end(self) -> None:
        """Draw plot.png, and write report.json."""
        if self.folder is not None and self.world.first:
            try:
                metrics.plot(self.folder)
            except ImportError as error:
                self.report.notes.append(str(error))
            write_atomic(self.folder / REPORT, self.report.to_json().encode())
        self.world.wait()


def _identity(
    student: Student, teacher: Teacher | None, report: DistillReport, world: World
) -> dict[str, Any]:
    """What a resumed run has to have in common with this one. The student's weights are not in
    it, which may be the trained ones already; under masks that do not move those say enough."""
    model, masked = student.model, student.masked
    if isinstance(teacher, LiveTeacher):
        weights = of_tensors(teacher.split.model.named_parameters())
    else:
        weights = teacher.manifest if teacher is not None else ""
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    fixed = isinstance(masked.schedule, Frozen)
    return {
        "recipe": {k: v for k, v in report.recipe.items() if not k.endswith("_every")},
        "data": report.data["sha256"],
        "teacher": report.teacher,
        "weights of the teacher": weights,
        "model": of_tensors((), type(model).__name__, json.dumps(shapes)),
        "schedule": masked.schedule.describe(),
        "masks": of_tensors(sorted(masked.masks.items())) if fixed else None,
        "processes": world.size,
    }
