"""Training on the device in hand through fairseq: every precision, resumed and generated from; what makes it wait.

The same functions run on the CPU and, marked `cuda`, on a GPU, where the teacher is too.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import command_line as cl
import pytest
import torch
from fairseq import options, tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

cuda = pytest.mark.cuda
OVERFLOW = ("--fp16", "--fp16-init-scale", 2**30)  # far too high: the first updates overflow and are skipped
PRECISIONS = {
    "fp32": (),
    "bf16": ("--bf16",),
    "fp16": ("--fp16",),
    "fp16 that overflows": OVERFLOW,
    "memory-efficient-fp16": ("--memory-efficient-fp16",),
    "amp": ("--amp",),
}
ON_THE_CPU = ("bf16",)  # test_training.py has the others
RUNS = [
    *(("cpu", name) for name in ON_THE_CPU),
    *(pytest.param("cuda", name, marks=cuda) for name in PRECISIONS),
]


@pytest.mark.parametrize(("device", "precision"), RUNS)
def test_trained_resumed_and_generated_from(device: str, precision: str, data: Path, teacher: cl.Run, tmp_path: Path):
    """20 updates, 5 more after a resume, translations of the test set by the student alone."""
    place = ("--cpu",) if device == "cpu" else ()
    common = (*cl.distil(teacher.path(), *PRECISIONS[precision], *cl.KEEP_LAST), "--max-tokens", 400)
    first = cl.train(data, tmp_path, *common, "--max-update", 20, device=device)
    resumed = cl.train(data, tmp_path, *common, "--max-update", 25, device=device)
    assert first.result.logs("train")[-1]["num_updates"] == 20
    assert "@ 20 updates" in resumed.result.output
    last = resumed.result.logs("train")[-1]
    assert last["num_updates"] == 25
    assert last["nll_loss"] < first.result.logs("train")[0]["nll_loss"]
    assert ("gradient overflow detected" in first.result.output) == (precision == "fp16 that overflows")
    assert all(0 < row["teacher_share"] < 1 for row in first.result.logs("valid"))
    assert all(x.isfinite().all() for x in resumed.state()["model"].values() if x.is_floating_point())
    made = cl.fairseq(
        "generate", data, *cl.USER_DIR, *place, "--path", resumed.path(), "--beam", 2,
        "--required-batch-size-multiple", 1, "--max-len-b", 20,
    )  # fmt: skip
    assert made.code == 0, made.end()
    assert len(made.hypotheses()) == 64


@contextmanager
def outside_of(*models: torch.nn.Module) -> Iterator[None]:
    """torch's detector of synchronisations, but not inside of the models: fairseq's own forward passes ask whether a
    batch has pads, and so does plain cross-entropy's."""

    def mode(value: str):
        return lambda *_: torch.cuda.set_sync_debug_mode(value)

    hooks = [
        hook
        for m in models
        for hook in (m.register_forward_pre_hook(mode("default")), m.register_forward_hook(mode("error")))
    ]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("gate", ["token", "sentence", "random", "selective-batch", "always", "none"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
def test_a_step_waits_for_nothing(device: str, gate: str, data: Path, teacher: cl.Run):
    """The criterion's forward and backward, around the two models', leave the host running ahead. On the CPU: the same
    step with the targets counted on the host gives what it gives where they are counted on the device."""
    command = [
        str(data), *cl.USER_DIR, *map(str, cl.SIZE), *cl.TIED, "--task", "translation_with_teacher", "--criterion",
        "hard_gate_kd", "--teacher-path", str(teacher.path()), "--max-tokens", "400", "--gate", gate,
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
        return
    samples = [utils.move_to_cuda(sample) for sample in samples]
    criterion(model, samples[0])[0].backward()  # loads the teacher, checks the kernels
    with outside_of(model, *(task.teacher.models if task.teacher else ())):
        for sample in samples[1:]:
            criterion(model, sample)[0].backward()
