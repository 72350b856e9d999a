"""The example outside fairseq: its loss, its gradients and its table."""

import importlib.util
import math
import re
import sys

import command_line as cl
import pytest
import torch
import torch.nn.functional as F

for package in ("transformers", "accelerate"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install '.[examples]'", allow_module_level=True)

SCRIPT = cl.ROOT / "scripts" / "examples" / "transformers_seq2seq.py"


@pytest.fixture(scope="module")
def example():
    # The example, a process of its own, says that there is no torchaudio before transformers is there. In this process
    # transformers may have been asked before, and remembers its answer.
    from transformers.utils import import_utils

    sys.modules.setdefault("torchaudio", None)
    import_utils.is_torchaudio_available.cache_clear()
    spec = importlib.util.spec_from_file_location("transformers_seq2seq", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


VOCABULARY = 40


@pytest.fixture
def setting(example, tmp_path):
    """(trainer, student, teacher, batches of different lengths); the models have biases, and no dropout."""
    models = []
    for width, seed in ((16, 1), (32, 2)):
        model = example.marian(VOCABULARY, width, seed)
        generator = torch.Generator().manual_seed(seed)
        model.final_logits_bias.copy_(torch.randn(1, VOCABULARY, generator=generator))
        model.model.shared.weight.data.mul_(4)  # far from uniform
        for module in model.modules():
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        models.append(model)
    known = {f"{letter}{i}": 3 + i for letter in "wt" for i in range(30)}
    rows = example.encode(example.toy_pairs(12), known)
    collate = example.Collator(models[0])

    def trainer(**settings):
        arguments = example.Seq2SeqTrainingArguments(
            str(tmp_path), use_cpu=True, remove_unused_columns=False, report_to="none", disable_tqdm=True, **settings
        )
        made = example.DistillationTrainer(
            teacher=models[1], model=models[0], args=arguments, data_collator=collate, train_dataset=rows,
            eval_dataset=rows, compute_metrics=example.token_metrics,
        )  # fmt: skip
        models[0].train()
        return made

    return trainer, *models, [collate(rows[:4]), collate(rows[4:])]


def eager(example, student, teacher, batch, gate: str = "token") -> torch.Tensor:
    """The summed loss from the models' own logits, by the oracle."""
    logits = student(**{name: batch[name] for name in batch if name != "labels"}).logits
    with torch.no_grad():
        theirs = teacher(**{name: batch[name] for name in batch if name != "labels"}).logits
    loss = example.gated_distillation
    return loss(logits, None, theirs, None, batch["labels"], padding_idx=-100, gate=gate, implementation="eager").loss


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def test_loss_is_eager_over_the_models_own_logits(example, setting):
    """To 1e-6, and so are the gradients, that of the shared matrix of embeddings and output layer among them; pads are
    -100 in the batch."""
    trainer, student, teacher, batches = setting
    made = trainer()
    for batch in batches:
        tokens = int((batch["labels"] != -100).sum())
        assert tokens < batch["labels"].numel()
        loss = made.compute_loss(student, dict(batch))
        loss.backward()
        found = gradients(student)
        expected = eager(example, student, teacher, batch) / tokens
        expected.backward()
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
        wanted = gradients(student)
        assert found.keys() == wanted.keys()
        assert "model.shared.weight" in found
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    shares = torch.stack(made.shares)
    assert 0 < shares[:, 0].sum() < shares[:, 1].sum()  # the gate has opened, and closed


def test_cross_entropy_is_transformers_own(example, setting):
    trainer, student, _, (batch, _) = setting
    made = trainer()
    made.gate = "none"
    loss = made.compute_loss(student, dict(batch))
    assert float(loss) == pytest.approx(float(student(**batch).loss), rel=1e-6)


def test_accumulated_gradients_are_those_of_one_batch(example, setting):
    """Batches with different numbers of tokens: through the trainer's own step."""
    trainer, student, teacher, batches = setting
    made = trainer(gradient_accumulation_steps=2, per_device_train_batch_size=4)
    made.create_optimizer_and_scheduler(2)
    number = made._get_num_items_in_batch(batches, made.args.device)
    made.current_gradient_accumulation_steps = 2
    counts = [int((batch["labels"] != -100).sum()) for batch in batches]
    assert int(number) == sum(counts)
    assert counts[0] != counts[1]
    for batch in batches:
        made.training_step(student, dict(batch), number)
    found = gradients(student)
    (sum(eager(example, student, teacher, batch) for batch in batches) / sum(counts)).backward()
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_bf16(example, setting):
    """Mixed precision: products in bf16, parameters and gradients in fp32, the loss near that of fp32."""
    trainer, student, teacher, (batch, _) = setting
    made = trainer(bf16=True)
    seen = []
    student.model.decoder.layers[0].fc1.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    loss = made.compute_loss(student, dict(batch))
    loss.backward()
    assert seen == [torch.bfloat16]
    assert all(
        gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients(student).values()
    )
    with torch.no_grad():
        expected = eager(example, student, teacher, batch) / int((batch["labels"] != -100).sum())
    assert float(loss.detach()) == pytest.approx(float(expected), rel=0.03)
    assert float(loss.detach()) != pytest.approx(float(expected), rel=1e-6)


def test_evaluation_by_hand(example, setting):
    """NLL, ECE and accuracy from the model's own logits, in batches that are padded to different lengths."""
    trainer, student, _, batches = setting
    found = trainer(per_device_eval_batch_size=4).evaluate()
    student.eval()
    probability, gold = [], []
    for batch in batches:
        kept = batch["labels"] != -100
        with torch.no_grad():
            probability.append(student(**batch).logits[kept].double().softmax(-1))
        gold.append(batch["labels"][kept])
    probability, gold = torch.cat(probability), torch.cat(gold)
    top, argmax = probability.max(1)
    right = (argmax == gold).double()
    surplus = torch.zeros(20).double().index_add_(0, (top * 20).ceil().long() - 1, top - right)
    assert found["eval_ece"] == pytest.approx(float(surplus.abs().sum()) / len(gold), abs=1e-6)
    assert found["eval_accuracy"] == pytest.approx(float(right.mean()))
    assert found["eval_nll"] == pytest.approx(float(F.nll_loss(probability.log2(), gold)), rel=1e-5)


def test_the_table(example, capsys):
    """Twenty updates of each model in mixed precision; that they work without fairseq `tests/test_rooms.py` sees to."""
    found = example.main(["--steps", "20", "--bf16"])
    printed = capsys.readouterr().out
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (\d+) \|$", printed, flags=re.MULTILINE)
    assert [row[0] for row in rows] == list(found) == ["teacher", "CE", "HKD-T"]
    for name, *numbers in rows:
        row = found[name]
        expected = [row["nll"], 100 * row["ece"], 100 * row["accuracy"], 100 * row["teacher_share"]]
        assert [float(number) for number in numbers] == pytest.approx(expected, abs=0.5)
        assert 0 < row["nll"] < math.log2(63)  # of 60 words, the end and what stands for none
        assert (row["teacher_share"] > 0) == (name == "HKD-T")
    text = SCRIPT.read_text()
    assert "import fairseq" not in text
    assert "from fairseq" not in text
