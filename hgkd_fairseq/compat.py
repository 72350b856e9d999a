"""Everything that changes fairseq's behaviour, and nothing else does.

Each patch says what breaks without it, and checks that the fairseq in hand is the one it was written for: where it is
not, fairseq is left as it is and a warning says so.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import logging
import os
import pickle
import re
import shutil
import sys
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from hgkd_fairseq import files
from hgkd_fairseq.errors import UserError

logger = logging.getLogger(__name__)

OLDEST_TORCH = (2, 6)  # the first whose torch.load refuses code in a checkpoint by default
TESTED_FAIRSEQ = "0.12.3"
APPLIED: dict[str, bool] = {}  # for `hgkd doctor`: which functions of fairseq were as the patches expect them


def apply() -> None:
    """Apply every patch, once."""
    if getattr(apply, "done", False):
        return
    apply.done = True  # type: ignore[attr-defined]
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < OLDEST_TORCH:
        raise UserError(f"torch {torch.__version__} would run code hidden in a checkpoint; install torch>=2.6")
    # Imported with every fairseq command, it advises to install tensorboardX whatever the command is.
    logging.getLogger("fairseq.tasks.text_to_speech").setLevel(logging.WARNING)
    show_user_errors_as_one_sentence()
    allow_fairseq_checkpoints()
    refuse_other_checkpoints()
    broadcast_checkpoints_to_workers()
    copy_checkpoints_in_one_step()
    same_batches_after_resume()
    same_patience_after_resume()
    native_bf16()


def written_for(function, expected: str, consequence: str) -> bool:
    """Whether `function`'s source holds the line that a patch was written for; warns with the `consequence` if not."""
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        source = ""
    APPLIED[f"{function.__module__}.{function.__name__}"] = expected in source
    if expected in source:
        return True
    import fairseq

    logger.warning(
        "fairseq %s is not the one that hgkd_fairseq knows (%s.%s differs): %s; install ve-fairseq==%s",
        getattr(fairseq, "__version__", "of unknown version"),
        function.__module__,
        function.__name__,
        consequence,
        TESTED_FAIRSEQ,
    )
    return False


def show_user_errors_as_one_sentence() -> None:
    """A mistake in an option deserves a sentence, not fairseq's call stack."""
    previous = sys.excepthook

    def excepthook(kind, error, traceback):
        if issubclass(kind, UserError):
            print(f"hgkd_fairseq: error: {error}", file=sys.stderr)
        else:
            previous(kind, error, traceback)

    sys.excepthook = excepthook


def allow_fairseq_checkpoints() -> None:
    """torch >= 2.6 refuses what fairseq itself writes: its options, and the n-gram counts of --eval-bleu as arrays."""
    reconstruct: Any = np.ndarray(0).__reduce__()[0]  # numpy.core.multiarray._reconstruct, under numpy 2 in numpy._core
    torch.serialization.add_safe_globals(
        [
            argparse.Namespace,
            np.ndarray,
            np.dtype,
            reconstruct,
            (reconstruct, "numpy.core.multiarray._reconstruct"),
            *{type(np.dtype(name)) for name in ("int32", "int64", "float32", "float64")},
        ]
    )


def refuse_other_checkpoints() -> None:
    """Say what a refused checkpoint wanted to import. torch's own message advises to load it all the same."""
    from fairseq import checkpoint_utils

    original = checkpoint_utils.load_checkpoint_to_cpu
    if not written_for(original, "torch.load(f, map_location", "a refused checkpoint is reported in torch's words"):
        return

    @functools.wraps(original)
    def load_checkpoint_to_cpu(path, *args, **kwargs):
        if os.path.isdir(path):
            raise UserError(f"{path} is a folder, not a checkpoint; name the .pt file in it")
        try:
            return original(path, *args, **kwargs)
        except pickle.UnpicklingError as error:
            raise UserError(refusal(path, str(error))) from None
        except (KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{path} is no fairseq checkpoint ({error!r}); name one of fairseq-train's") from error
        except (EOFError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
                raise
            raise UserError(f"checkpoint {path} cannot be read: it is cut short or damaged; copy it again") from None

    checkpoint_utils.load_checkpoint_to_cpu = load_checkpoint_to_cpu


def refusal(path: str, message: str) -> str:
    """One sentence on a checkpoint that is not made of tensors and plain options only."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # whatever is wrong with the file, the refusal itself must not fail
        names = re.findall(r"GLOBAL (\S+)", message)
    wanted = ", ".join(sorted(set(names))) or "something other than tensors and options"
    return (
        f"checkpoint {path} is refused and nothing of it was run: it wants to import {wanted}; "
        "use a checkpoint that fairseq-train wrote"
    )


def broadcast_checkpoints_to_workers() -> None:
    """On resume rank 0 sends the checkpoint, which it has loaded and parsed, to the other workers through torch.save
    and torch.load; the parsed options are no tensors, so torch >= 2.6 refuses the message. torch.distributed's own
    broadcast of objects carries it."""
    from fairseq.distributed import utils as distributed_utils

    if not written_for(
        distributed_utils._broadcast_object_slow,
        "obj = torch.load(buffer, map_location",
        "resuming with several workers may fail",
    ):
        return

    def broadcast_object_slow(obj, src_rank, group, dist_device):
        box = [obj]
        torch.distributed.broadcast_object_list(box, src=src_rank, group=group, device=dist_device)
        return box[0]

    distributed_utils._broadcast_object_slow = broadcast_object_slow


def copy_checkpoints_in_one_step() -> None:
    """fairseq writes the first of a save's checkpoints in one step, but checkpoint_last.pt as a plain copy of it: a run
    killed in that moment leaves half a file and cannot be resumed."""
    from fairseq.file_io import PathManager

    original = PathManager.copy
    if not written_for(original, "return shutil.copyfile(src_path, dst_path)", "checkpoints are copied as before"):
        return

    def copy(src_path, dst_path, overwrite=False):
        if not PathManager.supports_rename(dst_path):
            return original(src_path, dst_path, overwrite=overwrite)
        with open(src_path, "rb") as source, files.writing(dst_path, "wb") as copied:
            shutil.copyfileobj(source, copied)
        return dst_path

    PathManager.copy = staticmethod(copy)


def same_batches_after_resume() -> None:
    """fairseq seeds the grouping of sentences into batches with the epoch in which the process started, and keeps the
    groups: a run resumed in a later epoch would go on with other batches than one that was never stopped."""
    from fairseq.tasks import FairseqTask

    original = FairseqTask.get_batch_iterator
    if not written_for(original, "batch_sampler = make_batches(dataset, epoch)", "a resumed run may go another way"):
        return

    @functools.wraps(original)
    def get_batch_iterator(self, dataset, *args, epoch=1, **kwargs):
        kept = self.can_reuse_epoch_itr(dataset) and not getattr(self.cfg, "rebuild_batches", False)
        asked_for_new = kwargs.get("update_epoch_batch_itr", False) or kwargs.get("disable_iterator_cache", False)
        if epoch <= 1 or not kept or asked_for_new or dataset in self.dataset_to_epoch_iter:
            return original(self, dataset, *args, epoch=epoch, **kwargs)
        iterator = original(self, dataset, *args, epoch=1, **kwargs)
        iterator.epoch = epoch
        dataset.set_epoch(epoch)
        return iterator

    FairseqTask.get_batch_iterator = get_batch_iterator


def same_patience_after_resume() -> None:
    """fairseq-train counts the validations that bring nothing, for --patience, in attributes of a function, and saves
    them nowhere: a resumed run would wait as long again. Kept beside its best score, and restored where that is."""
    from fairseq import checkpoint_utils
    from fairseq.trainer import Trainer

    save, load = Trainer.save_checkpoint, checkpoint_utils.load_checkpoint
    consequence = "a resumed run counts --patience anew"
    known = [
        written_for(save, 'state_dict["extra_state"].update(extra_state)', consequence),
        written_for(load, 'save_checkpoint.best = extra_state["best"]', consequence),
    ]
    if not all(known):
        return

    def count() -> dict[str, Any]:
        names = ("fairseq_cli.train", "__main__")
        functions = [getattr(sys.modules.get(name), "should_stop_early", None) for name in names]
        return next((vars(function) for function in functions if function), {})

    @functools.wraps(save)
    def save_checkpoint(self, filename, extra_state):
        return save(self, filename, {**extra_state, "patience": dict(count())})

    @functools.wraps(load)
    def load_checkpoint(*args, **kwargs):
        extra_state, iterator = load(*args, **kwargs)
        if extra_state is not None and hasattr(checkpoint_utils.save_checkpoint, "best"):
            count().update(extra_state.get("patience", {}))
        return extra_state, iterator

    Trainer.save_checkpoint = save_checkpoint
    checkpoint_utils.load_checkpoint = load_checkpoint


def native_bf16() -> None:
    """fairseq takes --bf16 for a request of a TPU; without torch_xla it means bf16 on the GPU or CPU in hand."""
    from fairseq import options

    original = options.parse_args_and_arch
    if not written_for(original, "args.tpu = True", "--bf16 means whatever this fairseq takes it for"):
        return

    @functools.wraps(original)
    def parse_args_and_arch(*args, **kwargs):
        parsed = original(*args, **kwargs)
        options_given = parsed[0] if isinstance(parsed, tuple) else parsed
        if getattr(options_given, "bf16", False) and find_spec("torch_xla") is None:
            options_given.tpu = False
        return parsed

    options.parse_args_and_arch = parse_args_and_arch
