"""Helpers of the tests of stored teachers: stores written by `hgkd store`, and tasks that read them."""

from pathlib import Path

import command_line as cl
import torch
from omegaconf import OmegaConf

from hgkd_fairseq import cli, plugin

plugin.register()

from hgkd_fairseq.tasks.translation_with_teacher import (  # noqa: E402
    TranslationWithTeacherConfig,
    TranslationWithTeacherTask,
)

CPU, FP32 = torch.device("cpu"), torch.float32
FROM_A_STORE = (*cl.USER_DIR, "--task", "translation_with_teacher", "--criterion", "hard_gate_kd")
SHARDS = ("--shard-size", 200)


def command(data: Path | str, teacher: Path | str, folder: Path, *options) -> list[str]:
    words = ("store", data, "--teacher-path", teacher, "--output", folder, "--cpu", *SHARDS, *options)
    return [str(word) for word in words]


def of_kind(kind: str) -> tuple[str, ...]:
    """Return the options of a store of a kind in fp32; kinds other than hidden states are always in fp32."""
    return ("--kind", kind, *(("--dtype", "fp32") if kind == "hidden" else ()))


def write(data: Path | str, teacher: cl.Run, folder: Path, *options) -> int:
    return cli.main(command(data, teacher.path(), folder, *options))


def make_task(data: Path | str, **options) -> TranslationWithTeacherTask:
    given = {
        "data": str(data), "train_subset": "train", "dataset_impl": None, "required_seq_len_multiple": 1,
        "store_ema": False, "save_dir": "nowhere", "max_tokens": 800, "valid_subset": "valid",
        "tensorboard_logdir": None, **options,
    }  # fmt: skip
    return TranslationWithTeacherTask.setup_task(OmegaConf.merge(TranslationWithTeacherConfig, given))


def load(data: Path, store: Path) -> TranslationWithTeacherTask:
    task = make_task(data, teacher_store=str(store))
    task.load_teacher()
    task.load_dataset("train", combine=True)
    return task


def batches(task, subset: str = "train", workers: int = 0):
    """Return an iterator over the shuffled batches of an epoch."""
    task.load_dataset(subset, combine=subset == "train")
    found = task.get_batch_iterator(task.dataset(subset), max_tokens=400, seed=1, num_workers=workers)
    return found.next_epoch_itr(shuffle=True)
