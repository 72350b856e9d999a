#!/usr/bin/env python
"""Distillation in Hugging Face transformers, without fairseq: a Seq2SeqTrainer whose loss is `gated_distillation`.

Trains Marian models of random weights on a few hundred pairs: a teacher by cross-entropy, and two students of its
size, by cross-entropy and by HKD-T. Prints NLL, ECE and accuracy on held-out pairs.

    pip install '.[examples]'
    python scripts/examples/transformers_seq2seq.py                    # pairs that it makes
    python scripts/examples/transformers_seq2seq.py --pairs train.tsv  # source, tab, target, in tokens

The last 20 % of the pairs are held out.

For models of your own take `DistillationTrainer`: teacher and student need one target vocabulary, and a linear output
layer behind `model.model`, as Marian, BART, mBART, M2M-100 and PEGASUS have it.
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

# Where fairseq is installed too it has brought a torchaudio, often one that does not load beside this torch; and
# transformers would import it, for nothing that is needed here.
sys.modules.setdefault("torchaudio", None)  # type: ignore[arg-type]

from transformers import (  # noqa: E402
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

IGNORED = -100  # transformers' label of padding
PAD, EOS, UNKNOWN = 0, 1, 2
HELD_OUT = 0.2
WIDTH = 64


def head(model: Any, inputs: dict[str, Tensor]) -> Head:
    """The decoder's last hidden states (B, T, D) and what makes logits of them: a layer that is tied to the embeddings,
    and Marian's `final_logits_bias`, which is no part of that layer and is not trained."""
    names = ("input_ids", "attention_mask", "decoder_input_ids")
    hidden = model.model(**{name: inputs[name] for name in names}, use_cache=False).last_hidden_state
    bias = getattr(model, "final_logits_bias", None)
    return Head(hidden, model.lm_head.weight, None if bias is None else bias[0])


class DistillationTrainer(Seq2SeqTrainer):
    """A Seq2SeqTrainer that learns from a teacher, token by token, where the gate says so.

    Args:
        teacher: of the same target vocabulary; None with the gate "none", which is cross-entropy.
        gate: of `hgkd gates`, such as "token" (HKD-T), "sentence" (HKD-S) or "always".
        teacher_temperature: divides the teacher's logits.
        arguments: of Seq2SeqTrainer.
    """

    def __init__(
        self, *, teacher: PreTrainedModel | None, gate: str = "token", teacher_temperature: float = 1.5, **arguments
    ):
        super().__init__(**arguments)
        if self.args.world_size > 1 or self.args.n_gpu > 1:
            # Data-parallel wrappers must see the call of the whole model, whose logits this loss does without.
            raise ValueError("this example runs on one device; launch one process, with CUDA_VISIBLE_DEVICES=0")
        # The trainer is no torch module: what it holds is neither trained, nor saved, nor put into train mode.
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False).to(self.args.device)
        self.gate, self.teacher_temperature = gate, teacher_temperature
        # Gradients of several batches are summed, each divided by the tokens of all: the trainer shall count them, and
        # shall not divide by the number of batches again. (It asks whether the model's forward takes any argument,
        # which Marian's does; its own loss, a mean, then comes out as many times too large as there are batches.)
        self.model_accepts_loss_kwargs = True
        self.shares: list[Tensor] = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """In training the gated loss, elsewhere NLL; nats a token. The output in evaluation is (B, T, 3): the top-1
        confidence, whether it is right, and the NLL of each token, in place of the logits (B, T, V)."""
        training = model.training
        bare = self.accelerator.unwrap_model(model)
        # accelerate wraps the model's own forward with autocast, and this loss calls what is inside.
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
        """With the share of the tokens that learnt from the teacher: a run where it stays at 0 or 1 is broken."""
        if self.shares and "loss" in logs:
            teacher, tokens = torch.stack(self.shares).sum(0).tolist()
            logs["teacher_share"] = teacher / max(tokens, 1)
            self.shares.clear()
        super().log(logs, *arguments, **options)


def token_metrics(found) -> dict[str, float]:
    """For `compute_metrics`: NLL in bits, ECE and accuracy of the tokens of held-out pairs, their ends among them."""
    kept = torch.as_tensor(found.label_ids) != IGNORED
    confidence, correct, nll = torch.as_tensor(found.predictions)[kept].double().unbind(1)
    histogram = CalibrationHistogram(bins=20)
    histogram.update(confidence.clamp(max=1), correct)  # fp32 may pass 1 by a rounding
    return {"nll": float(nll.mean()) / math.log(2), "ece": histogram.ece(), "accuracy": histogram.accuracy()}


def toy_pairs(count: int, seed: int = 1) -> list[tuple[list[str], list[str]]]:
    """Sentences of 3 to 9 of 30 words; the translation has one word for each, one of ten at random."""
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
    """Batches of (B, S) and (B, T), padded: the sources with the pad token, which the attention mask hides, the labels
    with -100, and the decoder's input with what the model makes of that. `model` is any of the same special tokens."""

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
    """Of random weights, with one layer of each kind; one matrix embeds both sides and is the output layer."""
    set_seed(seed)
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
             (("layers", 1), ("ffn_dim", 2 * width), ("attention_heads", 4))}  # fmt: skip
    special = {"pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD, "forced_eos_token_id": None}
    # So small a model learns nothing from MarianConfig's own standard deviation of 0.02.
    start = {"init_std": 0.1, "scale_embedding": True, "max_position_embeddings": 256}
    return MarianMTModel(MarianConfig(vocab_size=vocabulary, d_model=width, **start, **sizes, **special))


def train(model: MarianMTModel, data: dict[str, list], options: argparse.Namespace, teacher=None, gate="none") -> dict:
    """Trains the model and scores it on the held-out pairs."""
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
