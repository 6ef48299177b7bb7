"""transformers' `Trainer` with MoBA, as docs/transformers.md shows it."""

from __future__ import annotations

import pytest
import torch
from hf_examples import build
from transformers import Trainer, TrainingArguments

pytest.importorskip("accelerate", reason="transformers' Trainer needs the package accelerate")


class Repeats(torch.utils.data.Dataset):
    """Texts whose second half repeats the first."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        half = torch.randint(2, 12, (16,), generator=torch.Generator().manual_seed(index))
        ids = torch.cat([half, half])
        return {"input_ids": ids, "labels": ids}


def test_the_loss_falls(tmp_path):
    model = build(initializer_range=0.05).float()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        max_steps=30,
        learning_rate=1e-2,
        logging_steps=5,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Repeats())
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    trainer.save_model(str(tmp_path / "trained"))
    assert '"moba_config"' in (tmp_path / "trained/config.json").read_text()
