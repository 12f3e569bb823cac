"""MaskedCallback inside Transformers' Trainer: masks, checkpoints, resume."""

import pytest
import torch

import sparsekern as sk
from python_tests.finetune.tiny import WINDOW, pair, rows, weights
from sparsekern.finetune import Magnitude, Masked, MaskedCallback

pytest.importorskip("accelerate", reason="Trainer needs accelerate, which is no dependency")
from transformers import Trainer, TrainingArguments


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.rows = rows()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def trainer(folder, schedule=None, compress=False, **options):
    model = pair()[1]
    masked = Masked(model, schedule=schedule)
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.1,
        max_steps=options.pop("max_steps", 6),
        logging_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        **options,
    )
    callback = MaskedCallback(masked, compress)
    data = {"train_dataset": Rows(), "eval_dataset": Rows()}
    made = Trainer(model, args, callbacks=[callback], **data)
    return made, masked


def test_masks_hold_and_are_logged(tmp_path):
    made, masked = trainer(tmp_path, gradient_accumulation_steps=2, save_strategy="no")
    before = weights(made.model)
    made.train()
    assert masked.check() == 0 and masked.step == 6
    assert not torch.equal(before, weights(made.model))
    logged = [row["mask_violations"] for row in made.state.log_history if "loss" in row]
    assert logged == [0, 0, 0]
    masked.compress()
    assert sum(isinstance(m, sk.SparseLinear) for m in made.model.modules()) == 14


@pytest.mark.parametrize("schedule", [None, Magnitude(every=2)], ids=["frozen", "magnitude"])
def test_resume_from_a_checkpoint(tmp_path, schedule):
    whole, _ = trainer(tmp_path / "whole", schedule, save_strategy="no")
    whole.train()
    first, _ = trainer(tmp_path / "parts", schedule, save_steps=3)
    first.train()
    assert (tmp_path / "parts" / "checkpoint-3" / "masks.pt").exists()
    second, masked = trainer(tmp_path / "parts", schedule, save_strategy="no")
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert masked.step == 6 and masked.check() == 0
    assert torch.equal(weights(second.model), weights(whole.model))


def test_compress_at_the_end_and_errors(tmp_path):
    made, masked = trainer(tmp_path, compress=True, save_strategy="no", max_steps=2)
    made.train()
    assert sum(isinstance(m, sk.SparseLinear) for m in made.model.modules()) == 14
    assert len(masked) == 0 and rows(1).shape == (1, WINDOW)
    with pytest.raises(TypeError, match="a Masked object"):
        MaskedCallback("masks")


def test_the_best_model_comes_with_its_masks(tmp_path):
    made, masked = trainer(
        tmp_path,
        Magnitude(every=2),
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the first one
    )
    made.train()
    assert made.state.best_model_checkpoint.endswith("checkpoint-2")
    assert masked.step == 2 and masked.check() == 0


def test_a_checkpoint_without_masks_is_told(tmp_path):
    first, _ = trainer(tmp_path, save_steps=2, max_steps=2)
    first.train()
    (tmp_path / "checkpoint-2" / "masks.pt").unlink()
    second, _ = trainer(tmp_path, save_strategy="no", max_steps=3)
    with pytest.warns(UserWarning, match="masks.pt in .*checkpoint-2, got a checkpoint without"):
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
