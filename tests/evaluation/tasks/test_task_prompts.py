"""A checkpoint is asked what its export is asked, the beginning of a text included."""

from __future__ import annotations

from pathlib import Path

import torch
from distributed import run_ranks
from small_run import begin_texts, copy_tokens, small_config, train_here

from moba_megatron.convert.export_hf import export_huggingface
from moba_megatron.convert.exported import open_exported
from moba_megatron.evaluation.subject import open_subject
from moba_megatron.evaluation.tasks.asked import from_huggingface, from_subject
from moba_megatron.evaluation.tasks.opened_model import OpenedTaskModel

PROMPT = [3 + 7 * i * i % 29 for i in range(100)]


def _asked(run: Path, exported: Path):
    """Template and logits of both, and the checkpoint's logits without a template."""
    subject = open_subject(run, on_validation=False)
    both = [from_subject(subject), from_huggingface(exported, None)]
    found = [(asked.template, asked.attend("moba").last_logits(PROMPT, 3)) for asked in both]
    return found, OpenedTaskModel(subject.opened).last_logits(PROMPT, 3)


def test_a_checkpoint_and_its_export_get_the_template_of_the_tokenizer(tmp_path):
    begin_texts(copy_tokens(tmp_path) / "tokenizer")
    config = small_config(tmp_path, training__steps=3, model__init_method_std=0.3)
    run_ranks(1, train_here, config)
    run = Path(config.run.dir)
    export_huggingface(open_exported(run), tmp_path / "out")
    [(((ours, our_logits), (theirs, their_logits)), bare)] = run_ranks(1, _asked, run, tmp_path / "out", prepare=False)
    assert ours == theirs == 1
    torch.testing.assert_close(our_logits, their_logits, rtol=1e-4, atol=1e-4)
    assert (our_logits - bare).abs().max() > 1e-2
