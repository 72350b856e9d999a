#!/usr/bin/env python
"""Distillation in Hugging Face transformers, without fairseq: a Seq2SeqTrainer whose loss is `gated_distillation`.

The example trains randomly initialised Marian models on a few hundred pairs: a teacher with cross-entropy, and two
students of the same size, with cross-entropy and with HKD-T. It prints their NLL, ECE and accuracy on held-out pairs.

    pip install '.[examples]'
    python scripts/examples/transformers_seq2seq.py                    # generated pairs
    python scripts/examples/transformers_seq2seq.py --pairs train.tsv  # source, tab, target, in tokens

The last 20 % of the pairs are held out.

For other models, use `DistillationTrainer`. Teacher and student must have the same target vocabulary, and a linear
output layer `lm_head` on top of `model.model`, as Marian, BART, mBART, M2M-100 and PEGASUS have.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hgkd_fairseq.calibration import CalibrationHistogram
from hgkd_fairseq.loss import Head, gated_distillation

# Do not let transformers import torchaudio, which is not needed here. fairseq installs it, often in a version that does
# not fit the installed torch and fails on import.
sys.modules.setdefault("torchaudio", None)  # type: ignore[arg-type]

from transformers import (  # noqa: E402
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

IGNORED = -100  # label of padding in transformers
PAD, EOS, UNKNOWN = 0, 1, 2
HELD_OUT = 0.2
WIDTH = 64


def head(model: Any, inputs: dict[str, Tensor]) -> Head:
    """Return the decoder's last hidden states (B, T, D), and the weight (V, D) and bias (V,) of the output layer.

    The weight is tied to the embeddings. The bias is Marian's `final_logits_bias`, a buffer of the model that is not
    trained, or None.
    """
    names = ("input_ids", "attention_mask", "decoder_input_ids")
    hidden = model.model(**{name: inputs[name] for name in names}, use_cache=False).last_hidden_state
    bias = getattr(model, "final_logits_bias", None)
    return Head(hidden, model.lm_head.weight, None if bias is None else bias[0])


class DistillationTrainer(Seq2SeqTrainer):
    """A Seq2SeqTrainer that trains with gated distillation: a gate decides which tokens learn from the teacher.

    Args:
        teacher: model with the same target vocabulary; None with the gate "none", which is cross-entropy.
        gate: one of `hgkd gates`, such as "token" (HKD-T), "sentence" (HKD-S) or "always".
        teacher_temperature: divisor of the teacher's logits.
        arguments: arguments of Seq2SeqTrainer.

    Raises:
        ValueError: training is distributed or uses several GPUs.
    """

    def __init__(
        self, *, teacher: PreTrainedModel | None, gate: str = "token", teacher_temperature: float = 1.5, **arguments
    ):
        super().__init__(**arguments)
        if self.args.world_size > 1 or self.args.n_gpu > 1:
            # Data-parallel wrappers need a call of the whole model, but this loss calls its parts to avoid the logits.
            raise ValueError("this example runs on one device; launch one process, with CUDA_VISIBLE_DEVICES=0")
        # The trainer is not a torch module, so that the teacher is not trained, saved or put into train mode.
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False).to(self.args.device)
        self.gate, self.teacher_temperature = gate, teacher_temperature
        # With gradient accumulation, each batch's loss is divided by the number of tokens in all batches of the update.
        # With this attribute, the trainer passes that number and does not divide by the number of batches. Its default
        # depends on whether the model's forward accepts arbitrary keyword arguments. Marian's does, although its own
        # loss is a mean over the batch and thus too large by a factor of the number of batches.
        self.model_accepts_loss_kwargs = True
        self.shares: list[Tensor] = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the gated loss in training and the NLL in evaluation, in nats per token.

        With `return_outputs`, the outputs in evaluation contain "scores" (B, T, 3) instead of logits (B, T, V): the
        probability of each token's top-1 prediction, whether that is correct, and the token's NLL in nats.
        """
        training = model.training
        bare = self.accelerator.unwrap_model(model)
        # accelerate applies autocast to the model's forward, which this loss bypasses.
        with self.accelerator.autocast():
            student = head(bare, inputs)
            teacher = Head(None, None)  # type: ignore[arg-type]
            if training and self.teacher is not None:
                with torch.no_grad():
                    teacher = head(self.teacher, inputs)
            out = gated_distillation(
                student.hidden, student.weight, teacher.hidden, teacher.weight, inputs["labels"],
                student_bias=student.bias, teacher_bias=teacher.bias, padding_idx=IGNORED, top1=not training,
                gate=self.gate if training else "none", teacher_temperature=self.teacher_temperature,
                label_smoothing=self.args.label_smoothing_factor if training else 0.0,
            )  # fmt: skip
        loss = out.loss / (out.tokens if num_items_in_batch is None else num_items_in_batch)
        if training:
            self.shares.append(torch.stack([out.teacher_share.float(), out.tokens.float()]))
        if not return_outputs:
            return loss
        scores = [out.confidence, out.correct, out.token_nll] if not training else []
        return loss, {"loss": loss, "scores": torch.stack([one.float() for one in scores], dim=-1) if scores else None}

    def log(self, logs, *arguments, **options):
        """Log also the share of tokens that learn from the teacher. If it stays at 0 or 1, the gate has no effect."""
        if self.shares and "loss" in logs:
            teacher, tokens = torch.stack(self.shares).sum(0).tolist()
            logs["teacher_share"] = teacher / max(tokens, 1)
            self.shares.clear()
        super().log(logs, *arguments, **options)


def token_metrics(found) -> dict[str, float]:
    """Compute NLL (bits per token), ECE and accuracy, including end-of-sentence tokens. For `compute_metrics`."""
    kept = torch.as_tensor(found.label_ids) != IGNORED
    confidence, correct, nll = torch.as_tensor(found.predictions)[kept].double().unbind(1)
    histogram = CalibrationHistogram(bins=20)
    histogram.update(confidence.clamp(max=1), correct)  # may round to more than 1 in fp32
    return {"nll": float(nll.mean()) / math.log(2), "ece": histogram.ece(), "accuracy": histogram.accuracy()}


def toy_pairs(count: int, seed: int = 1) -> list[tuple[list[str], list[str]]]:
    """Generate pairs of 3 to 9 words out of 30. Each word has one translation, which is replaced at random in 10 %."""
    generator = random.Random(seed)
    pairs = []
    for _ in range(count):
        words = generator.choices(range(30), k=generator.randint(3, 9))
        target = [word if generator.random() < 0.9 else generator.randrange(30) for word in words]
        pairs.append(([f"w{word}" for word in words], [f"t{word}" for word in target]))
    return pairs


def read_pairs(file: str) -> list[tuple[list[str], list[str]]]:
    with open(file, encoding="utf-8") as stream:
        rows = [line.rstrip("\n").split("\t") for line in stream]
    wrong = next((place for place, row in enumerate(rows, 1) if len(row) != 2), None)
    if wrong or not rows:
        raise SystemExit(f"{file}: line {wrong or 1} is no source, tab, target")
    return [(source.split(), target.split()) for source, target in rows]


def encode(pairs: Sequence[tuple[list[str], list[str]]], known: dict[str, int]) -> list[dict[str, list[int]]]:
    return [
        {name: [*(known.get(word, UNKNOWN) for word in words), EOS] for name, words in zip(names, pair, strict=True)}
        for pair in pairs
        for names in [("input_ids", "labels")]
    ]


class Collator:
    """Collate pairs to padded batches: sources and attention mask (B, S), labels and decoder input (B, T).

    Sources are padded with the pad token, which the attention mask excludes, and labels with -100. The model makes the
    decoder's input from the labels; any model with the same special tokens can be given.
    """

    def __init__(self, model: MarianMTModel):
        self.model = model

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        def padded(name: str, filling: int) -> Tensor:
            tensors = [torch.tensor(row[name]) for row in rows]
            return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=filling)

        source, labels = padded("input_ids", PAD), padded("labels", IGNORED)
        previous = self.model.prepare_decoder_input_ids_from_labels(labels)
        mask = (source != PAD).long()
        return {"input_ids": source, "attention_mask": mask, "decoder_input_ids": previous, "labels": labels}


def marian(vocabulary: int, width: int, seed: int) -> MarianMTModel:
    """Make a randomly initialised Marian model with one encoder and one decoder layer and shared embeddings."""
    set_seed(seed)
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
             (("layers", 1), ("ffn_dim", 2 * width), ("attention_heads", 4))}  # fmt: skip
    special = {"pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD, "forced_eos_token_id": None}
    # With MarianConfig's default standard deviation of 0.02, a model of this size does not learn.
    start = {"init_std": 0.1, "scale_embedding": True, "max_position_embeddings": 256}
    return MarianMTModel(MarianConfig(vocab_size=vocabulary, d_model=width, **start, **sizes, **special))


def train(model: MarianMTModel, data: dict[str, list], options: argparse.Namespace, teacher=None, gate="none") -> dict:
    """Train a model and return its scores on the held-out pairs, with the last logged share of the teacher."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Seq2SeqTrainingArguments(
            folder, max_steps=options.steps, learning_rate=options.lr, warmup_steps=options.steps // 10,
            per_device_train_batch_size=options.batch, per_device_eval_batch_size=64, bf16=options.bf16,
            gradient_accumulation_steps=options.accumulate, seed=options.seed, use_cpu=not torch.cuda.is_available(),
            logging_steps=max(options.steps // 4, 1), remove_unused_columns=False, report_to="none", save_strategy="no",
            disable_tqdm=True,
        )  # fmt: skip
        trainer = DistillationTrainer(
            teacher=teacher, gate=gate, teacher_temperature=options.temperature, model=model, args=settings,
            data_collator=Collator(model), train_dataset=data["train"], eval_dataset=data["held out"],
            compute_metrics=token_metrics,
        )  # fmt: skip
        trainer.train()
        scores = trainer.evaluate()
        shares = [row["teacher_share"] for row in trainer.state.log_history if "teacher_share" in row]
    return {
        **{name: scores[f"eval_{name}"] for name in ("nll", "ece", "accuracy", "loss")},
        "teacher_share": shares[-1],
    }


def main(words: Sequence[str] | None = None) -> dict[str, dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", metavar="FILE", help="source, tab, target (default: 500 pairs that are made)")
    parser.add_argument("--steps", type=int, default=300, help="updates of each model (default: 300)")
    parser.add_argument("--batch", type=int, default=16, help="pairs a batch (default: 16)")
    parser.add_argument("--accumulate", type=int, default=2, help="batches an update (default: 2)")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate (default: 2e-3)")
    parser.add_argument("--gate", default="token", help="of the distilled student (default: token, HKD-T)")
    parser.add_argument("--temperature", type=float, default=1.5, help="of the teacher (default: 1.5)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    options = parser.parse_args(words)

    pairs = read_pairs(options.pairs) if options.pairs else toy_pairs(500)
    if len(pairs) < 2:
        parser.error(f"--pairs {options.pairs}: has {len(pairs)} pair(s); at least one to train on and one to test on")
    cut = len(pairs) - max(int(HELD_OUT * len(pairs)), 1)
    known: dict[str, int] = {}
    for word in (word for pair in pairs[:cut] for side in pair for word in side):
        known.setdefault(word, UNKNOWN + 1 + len(known))
    data = {"train": encode(pairs[:cut], known), "held out": encode(pairs[cut:], known)}
    vocabulary = UNKNOWN + 1 + len(known)

    teacher = marian(vocabulary, WIDTH, options.seed)
    rows = {"teacher": train(teacher, data, options)}
    rows["CE"] = train(marian(vocabulary, WIDTH, options.seed + 1), data, options)
    student = marian(vocabulary, WIDTH, options.seed + 1)
    rows["HKD-T" if options.gate == "token" else options.gate] = train(student, data, options, teacher, options.gate)
    print("| model | NLL, bits | ECE, % | accuracy, % | teacher's share, % |\n|---|---:|---:|---:|---:|")
    for name, row in rows.items():
        shares = f"{100 * row['ece']:.2f} | {100 * row['accuracy']:.1f} | {100 * row['teacher_share']:.0f}"
        print(f"| {name} | {row['nll']:.3f} | {shares} |")
    return rows


if __name__ == "__main__":
    main()
