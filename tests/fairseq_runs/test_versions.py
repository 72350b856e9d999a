"""Test that a training started with version 0.1.0, before the package was reorganised, is continued by this version.

version_0_1_0/ holds the data, the teacher, the checkpoint after 2 of 4 epochs and the final state of that version. The
gate is selective-global, whose memory is in the checkpoint. On one machine both final states are bit-identical; another
machine may round differently.
"""

import shutil
from pathlib import Path

import command_line as cl
import torch

OLD = Path(__file__).with_name("version_0_1_0")
OPTIONS = (
    *("--gate", "selective-global", "--gate-queue", 500, "--optimizer", "adam", "--lr", 1e-3, "--max-tokens", 400),
    *("--seed", 1, "--num-workers", 0, "--best-checkpoint-metric", "nll_loss", "--no-epoch-checkpoints"),
    *("--share-all-embeddings", "--max-epoch", 4),
)
SIZE = [
    *("--arch", "transformer_iwslt_de_en", "--encoder-layers", "1", "--decoder-layers", "1"),
    *(f"--{side}-{what}={size}" for side in ("encoder", "decoder")
      for what, size in (("embed-dim", 16), ("ffn-embed-dim", 16), ("attention-heads", 2))),
]  # fmt: skip


def test_resumed_from_an_older_version(tmp_path: Path):
    shutil.copy(OLD / "checkpoint_last.pt", tmp_path)
    distilling = cl.distil(OLD / "teacher.pt", "--teacher-model-overrides", f"{{'data': '{OLD / 'data-bin'}'}}")
    run = cl.train(OLD / "data-bin", tmp_path, *distilling, *OPTIONS, size=SIZE)
    assert "resumed with other options" not in run.result.output
    state, expected = run.state(), torch.load(OLD / "expected.pt")
    assert state["optimizer_history"][-1]["num_updates"] == expected["updates"] == 12
    for name, tensor in expected["model"].items():
        torch.testing.assert_close(state["model"][name], tensor, rtol=1e-3, atol=1e-4)
    for name, tensor in expected["gate"].items():
        kept = state["extra_state"]["TranslationWithTeacherTask"]["gate"][name]
        torch.testing.assert_close(kept, tensor, rtol=1e-3, atol=1e-3, equal_nan=True)
