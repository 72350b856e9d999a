"""Tests of training through fairseq in every precision, with resuming and translating, and of synchronisations.

They run on the CPU and, marked `cuda`, on a GPU, on which the teacher is as well.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import command_line as cl
import pytest
import torch
from fairseq import options, tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from waiting import NoWaiting

cuda = pytest.mark.cuda
OVERFLOW = ("--fp16-init-scale", 2**30)  # far too high: the updates of the first epoch overflow and are skipped
PRECISIONS = {
    "fp32": (),
    "bf16": ("--bf16",),
    "fp16": ("--fp16",),
    "fp16 that overflows": ("--fp16", *OVERFLOW),
    "memory-efficient-fp16": ("--memory-efficient-fp16",),
    "memory-efficient-fp16 that overflows": ("--memory-efficient-fp16", *OVERFLOW),
    "amp": ("--amp",),
}
ON_THE_CPU = ("bf16", "memory-efficient-fp16 that overflows")  # test_training.py has --memory-efficient-fp16 and --amp
RUNS = [
    *(("cpu", name) for name in ON_THE_CPU),
    *(pytest.param("cuda", name, marks=cuda) for name in PRECISIONS),
]


@pytest.mark.parametrize(("device", "precision"), RUNS)
def test_trained_resumed_and_generated_from(device: str, precision: str, data: Path, teacher: cl.Run, tmp_path: Path):
    """A student is trained for 20 updates, resumed for 5 more, and translates the test set without its teacher."""
    place = ("--cpu",) if device == "cpu" else ()
    common = (*cl.distil(teacher.path(), *PRECISIONS[precision], *cl.KEEP_LAST), "--max-tokens", 400)
    first = cl.train(data, tmp_path, *common, "--max-update", 20, device=device)
    resumed = cl.train(data, tmp_path, *common, "--max-update", 25, device=device)
    rows = first.result.logs("train")
    updated = [row for row in rows if "nll_loss" in row]  # an epoch of overflows alone logs no loss
    assert (len(updated) < len(rows)) == precision.endswith("overflows")
    assert rows[-1]["num_updates"] == 20
    assert "@ 20 updates" in resumed.result.output
    last = resumed.result.logs("train")[-1]
    assert last["num_updates"] == 25
    assert last["nll_loss"] < updated[0]["nll_loss"]
    assert ("gradient overflow detected" in first.result.output) == precision.endswith("overflows")
    assert all(0 < row["teacher_share"] < 1 for row in first.result.logs("valid"))
    assert all(x.isfinite().all() for x in resumed.state()["model"].values() if x.is_floating_point())
    made = cl.fairseq(
        "generate", data, *cl.USER_DIR, *place, "--path", resumed.path(), "--beam", 2,
        "--required-batch-size-multiple", 1, "--max-len-b", 20,
    )  # fmt: skip
    assert made.code == 0, made.end()
    assert len(made.hypotheses()) == 64


@contextmanager
def outside_of(*models: torch.nn.Module, device: str) -> Iterator[None]:
    """Make synchronisations outside the forward passes of `models` an error: on a GPU by torch's detector.

    Those passes are fairseq's own: they ask whether a batch has padding, as they do with plain cross-entropy.
    """
    no_waiting = NoWaiting()

    def allow(value: bool) -> None:
        no_waiting.allowed = value
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default" if value else "error")

    hooks = [
        hook
        for model in models
        for hook in (
            model.register_forward_pre_hook(lambda *_: allow(True)),
            model.register_forward_hook(lambda *_: allow(False)),
        )
    ]
    if device == "cuda":
        torch.cuda.synchronize()
    allow(False)
    try:
        with no_waiting if device == "cpu" else nullcontext():
            yield
    finally:
        allow(True)
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("gate", ["token", "sentence", "random", "selective-batch", "always", "none"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
def test_a_step_waits_for_nothing(device: str, gate: str, data: Path, teacher: cl.Run):
    """The criterion's forward and backward, apart from the forward passes of the models, do not wait for a GPU.

    On the CPU, where `chunked` stands for the kernels, the loss is also the same with the target lengths that the batch
    has and without them.
    """
    command = [
        str(data), *cl.USER_DIR, *map(str, cl.SIZE), *cl.TIED, "--task", "translation_with_teacher", "--criterion",
        "hard_gate_kd", "--teacher-path", str(teacher.path()), "--max-tokens", "400", "--gate", gate,
        *([] if device == "cuda" else ["--loss-impl", "chunked"]),
    ]  # fmt: skip
    parsed = options.parse_args_and_arch(options.get_training_parser(), command)
    utils.import_user_module(argparse.Namespace(user_dir=cl.USER_DIR[1]))
    cfg = convert_namespace_to_omegaconf(parsed)
    task = tasks.setup_task(cfg.task)
    model, criterion = task.build_model(cfg.model).to(device), task.build_criterion(cfg.criterion).to(device)
    task.load_dataset("train")
    batches = task.get_batch_iterator(task.dataset("train"), max_tokens=400).next_epoch_itr(shuffle=False)
    samples = [next(batches) for _ in range(3)]
    pad = task.target_dictionary.pad()
    assert all(s["target_lengths"] == s["target"].ne(pad).sum(1).tolist() for s in samples)
    if device == "cpu":
        for sample in samples:
            results = []
            for counted in (sample, {k: v for k, v in sample.items() if k != "target_lengths"}):
                torch.manual_seed(1)
                loss, _, _ = criterion(model, counted)
                results.append(loss)
            assert torch.equal(*results)
    else:
        samples = [utils.move_to_cuda(sample) for sample in samples]
    criterion(model, samples[0])[0].backward()  # loads the teacher, checks the kernels
    with outside_of(model, *(task.teacher.models if task.teacher else ()), device=device):
        for sample in samples[1:]:
            criterion(model, sample)[0].backward()
