"""The patches of fairseq; nothing outside this module changes its behaviour.

Each patch documents what fails without it, and checks that the installed fairseq contains the code for which it was
written. If not, fairseq is left unchanged and a warning states the consequence.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import logging
import os
import re
import signal
import sys
import time
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch

from hgkd_fairseq import files
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.plugin import checkpoints, one_training, stopping, training_state
from hgkd_fairseq.plugin.literals import replace_eval

logger = logging.getLogger(__name__)

OLDEST_TORCH = (2, 6)  # the first whose torch.load refuses code in a checkpoint by default
TESTED_FAIRSEQ = "0.12.3"
# For `hgkd doctor`: by function of fairseq, whether its code was as expected in all checks of that function.
APPLIED: dict[str, bool] = {}


def apply() -> None:
    """Apply all patches; further calls have no effect.

    Raises:
        UserError: if torch is older than `OLDEST_TORCH`.
    """
    if getattr(apply, "done", False):
        return
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < OLDEST_TORCH:
        raise UserError(f"torch {torch.__version__} would run code hidden in a checkpoint; install torch>=2.6")
    apply.done = True  # type: ignore[attr-defined]
    # Every fairseq command imports this module, which then logs advice to install tensorboardX.
    logging.getLogger("fairseq.tasks.text_to_speech").setLevel(logging.WARNING)
    show_user_errors_without_call_stack()
    allow_fairseq_options()
    evaluate_literals_only()
    one_loader_of_checkpoints()
    resuming_without_call_stack()
    paths_with_colons()
    plain_checkpoints()
    broadcast_checkpoints_to_workers()
    copy_checkpoints_in_one_step()
    time_of_no_clock()
    same_batches_after_resume()
    same_patience_after_resume()
    one_training_in_a_folder()
    same_run_after_resume()
    what_was_learned_is_validated()
    nan_gradients_are_reported()
    overflow_on_the_cpu()
    native_bf16()
    saved_when_told_to_stop()


def written_for(function, expected: str, consequence: str) -> bool:
    """Return whether the source of a function contains the code that a patch expects, and warn if it does not.

    Args:
        function: function of fairseq.
        expected: part of its source.
        consequence: what happens without the patch, for the warning.
    """
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        source = ""
    name = f"{function.__module__}.{function.__name__}"
    APPLIED[name] = APPLIED.get(name, True) and expected in source
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


def show_user_errors_without_call_stack() -> None:
    """Show a UserError, such as a mistake in an option, as one message without a call stack.

    HYDRA_FULL_ERROR makes hydra raise errors; otherwise it would print them itself before the exception hook runs.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    previous = sys.excepthook

    def excepthook(kind, error, traceback):
        if issubclass(kind, UserError):
            print(f"hgkd_fairseq: error: {error}", file=sys.stderr)
        else:
            previous(kind, error, traceback)

    sys.excepthook = excepthook


def allow_fairseq_options() -> None:
    """Allow argparse.Namespace in torch.load, and disable the environment variable that lets files run code.

    torch >= 2.6 refuses the argparse.Namespace in the files that fairseq itself writes, which CTranslate2's converter
    reads too. The other types that a checkpoint may hold are allowed only by the loader in checkpoints.py, which passes
    weights_only=True; the variable would override that default for the other files that fairseq loads.
    """
    torch.serialization.add_safe_globals([argparse.Namespace])
    if os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None) is not None:
        logger.warning("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD has no effect: with hgkd_fairseq no file runs code")


def evaluate_literals_only() -> None:
    """Evaluate option strings as literals only.

    fairseq passes options of a checkpoint to eval (eval_str_list, eval_bool, fconv's layers, adam's betas), so that
    code in them would run.
    """
    from fairseq import utils

    if written_for(utils.eval_str_dict, "x = eval(x)", "code in options may run"):
        replace_eval()


def one_loader_of_checkpoints() -> None:
    """Replace fairseq's loader of checkpoints by the one in checkpoints.py, for resuming, generation and validation.

    fairseq's loader does not check the content of a file, and torch's message about content that it refuses advises to
    load the file nevertheless.
    """
    from fairseq import checkpoint_utils

    load, ensemble = checkpoint_utils.load_checkpoint_to_cpu, checkpoint_utils.load_model_ensemble_and_task
    consequence = "checkpoints are read with fewer checks"
    known = [
        written_for(load, "state = torch.load(f, map_location=torch.device", consequence),
        written_for(ensemble, "state = load_checkpoint_to_cpu(filename, arg_overrides)", consequence),
    ]
    if not all(known):
        return

    @functools.wraps(load)
    def load_checkpoint_to_cpu(path, arg_overrides=None, load_on_all_ranks=False):
        return checkpoints.read(path, arg_overrides).state

    @functools.wraps(ensemble)
    def load_model_ensemble_and_task(filenames, *args, **kwargs):
        replace_eval()  # in the modules imported since the last call
        try:
            return ensemble(filenames, *args, **kwargs)
        except (UserError, OSError) as error:
            named = any(name in str(error) for name in filenames)
            raise UserError(f"{'' if named else ', '.join(filenames) + ': '}{error}") from None
        except Exception as error:  # the options in a file may cause any error
            raise checkpoints.unfit(", ".join(filenames), error) from error

    checkpoint_utils.load_checkpoint_to_cpu = load_checkpoint_to_cpu
    checkpoint_utils.load_model_ensemble_and_task = load_model_ensemble_and_task


def resuming_without_call_stack() -> None:
    """Show one message, instead of a call stack, if a checkpoint is missing or does not fit the run that loads it."""
    from fairseq import checkpoint_utils
    from fairseq.trainer import Trainer

    resume, begin = Trainer.load_checkpoint, checkpoint_utils.load_checkpoint
    consequence = "a checkpoint that does not fit ends in a call stack"
    known = [
        written_for(resume, "state = checkpoint_utils.load_checkpoint_to_cpu(", consequence),
        written_for(begin, '"--finetune-from-model can not be set together', consequence),
    ]
    if not all(known):
        return

    @functools.wraps(begin)
    def begin_training(*args, **kwargs):
        try:
            return begin(*args, **kwargs)
        except ValueError as error:
            if isinstance(error, UserError) or "--finetune-from-model" not in str(error):
                raise
            raise UserError(str(error)) from None

    @functools.wraps(resume)
    def load_checkpoint(self, filename, *args, **kwargs):
        try:
            return resume(self, filename, *args, **kwargs)
        except UserError:
            raise
        except Exception as error:  # fairseq raises a plain Exception; the content of a file may cause any error
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"the training cannot go on from {filename}: {reason[:500]}; give the options of the run that wrote "
                "it, another --restore-file, or another --save-dir"
            ) from error

    Trainer.load_checkpoint = load_checkpoint
    checkpoint_utils.load_checkpoint = begin_training


def paths_with_colons() -> None:
    """Let the names of files contain ':'. fairseq splits lists of paths at every ':', also within a name."""
    from fairseq import utils

    if written_for(utils.split_paths, "paths.split(separator)", "a ':' divides paths"):
        utils.split_paths = checkpoints.split_paths


def plain_checkpoints() -> None:
    """Save numpy arrays as tensors, and replace a checkpoint only once the new one is completely written.

    fairseq logs the n-gram counts of --eval-bleu as numpy arrays, which the checkpoints then hold: torch >= 2.6 refuses
    such a checkpoint unless numpy is allowed, which is not safe.

    On a full disk, fairseq waits and writes the checkpoint again, after the part that it has already written. If there
    is enough space by then, the result replaces the good checkpoint; otherwise fairseq ends with call stacks that do
    not mention the disk.
    """
    from fairseq import checkpoint_utils
    from fairseq.file_io import PathManager

    original = checkpoint_utils.torch_persistent_save
    if not written_for(original, "_torch_persistent_save(obj, f)", "checkpoints with --eval-bleu hold numpy arrays"):
        return

    @functools.wraps(original)
    def torch_persistent_save(obj, filename, async_write=False):
        state = {**obj, "extra_state": checkpoints.without_arrays(obj["extra_state"])}
        if async_write or not isinstance(filename, str) or not PathManager.supports_rename(filename):
            return original(state, filename, async_write=async_write)
        with files.writing(filename, "wb", alone=True) as stream:
            torch.save(state, stream)
        return None

    checkpoint_utils.torch_persistent_save = torch_persistent_save


def broadcast_checkpoints_to_workers() -> None:
    """Broadcast a checkpoint to the workers with torch.distributed's broadcast of objects.

    On resuming, rank 0 loads the checkpoint and sends it to the other workers by torch.save and torch.load. The parsed
    options are not tensors, so that torch >= 2.6 refuses the message.
    """
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
    """Copy checkpoints atomically.

    fairseq writes the first checkpoint of a save atomically, but checkpoint_last.pt as a plain copy of it: a run killed
    during the copy leaves a partial file and cannot be resumed.
    """
    from fairseq.file_io import PathManager

    original = PathManager.copy
    if not written_for(original, "return shutil.copyfile(src_path, dst_path)", "checkpoints are copied as before"):
        return

    def copy(src_path, dst_path, overwrite=False):
        if not PathManager.supports_rename(dst_path):
            return original(src_path, dst_path, overwrite=overwrite)
        files.copy(src_path, dst_path)
        return dst_path

    PathManager.copy = staticmethod(copy)


def time_of_no_clock() -> None:
    """Measure the training time with a monotonic clock.

    fairseq measures it with the system clock: if that is changed, --stop-time-hours ends a training too early or never,
    and a checkpoint may record a negative time.
    """
    from fairseq import trainer

    spent = trainer.Trainer._local_cumulative_training_time
    if written_for(spent, "return time.time() - self._start_time", "a clock that is set changes --stop-time-hours"):
        trainer.time = SimpleNamespace(**{**vars(time), "time": time.monotonic})


def same_batches_after_resume() -> None:
    """Use the same batches in a resumed run as in one that was never stopped.

    fairseq seeds the grouping of sentences into batches with the epoch in which the process started, and then keeps the
    groups, so that a run resumed in a later epoch would use other batches.
    """
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
    """Save the count of validations without improvement, for --patience, and restore it together with the best score.

    fairseq-train counts them in attributes of a function and does not save them, so that a resumed run would wait for
    the full number again.
    """
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


def same_run_after_resume() -> None:
    """Compare a checkpoint with the run that loads it, and let the criterion check the model before the first step.

    fairseq loads a checkpoint regardless of the run that wrote it: with another --gate, it would continue with the
    memory or the optimizer's state of the old one. The comparison takes place on the worker that reads the file. With
    --reset-dataloader, fairseq restores no memory of the task, as if it were a position in the data. The
    callbacks of `TrainingState.at_training_begin`, which check the data, are called once these are loaded.
    """
    from fairseq import checkpoint_utils
    from fairseq.trainer import Trainer

    resume, load = Trainer.load_checkpoint, checkpoint_utils.load_checkpoint
    consequence = "a run can be resumed as another one"
    known = [
        written_for(resume, "state = checkpoint_utils.load_checkpoint_to_cpu(", consequence),
        written_for(load, "extra_state = trainer.load_checkpoint(", consequence),
    ]
    if not all(known):
        return

    @functools.wraps(resume)
    def load_checkpoint(self, filename, reset_optimizer=False, *args, **kwargs):
        criterion, read = self.get_criterion(), checkpoint_utils.load_checkpoint_to_cpu
        if hasattr(criterion, "check_model"):
            criterion.check_model(self.model)

        def read_and_compare(path, *arguments, **options):
            state = read(path, *arguments, **options)
            if path == filename:
                ema = self.cfg.ema.store_ema
                training_state.prepare(state, path, self.task, criterion, new_run=reset_optimizer, ema=ema)
            return state

        checkpoint_utils.load_checkpoint_to_cpu = read_and_compare
        try:
            return resume(self, filename, reset_optimizer, *args, **kwargs)
        finally:
            checkpoint_utils.load_checkpoint_to_cpu = read

    @functools.wraps(load)
    def load_and_begin(cfg, trainer, *args, **kwargs):
        extra_state, iterator = load(cfg, trainer, *args, **kwargs)
        if extra_state is not None and cfg.reset_dataloader and hasattr(trainer.task, "set_checkpoint_dict"):
            trainer.task.set_checkpoint_dict(extra_state.get(type(trainer.task).__name__, {}))
            training_state.of(trainer.task).restart_epochs()
        for call in training_state.of(trainer.task).at_training_begin:
            call(iterator.next_epoch_idx, trainer.model)
        return extra_state, iterator

    Trainer.load_checkpoint = load_checkpoint
    checkpoint_utils.load_checkpoint = load_and_begin


def what_was_learned_is_validated() -> None:
    """Restore the criterion's parameters and the task's memory in fairseq-validate.

    fairseq-validate creates a new criterion and ignores both, so that it would report the loss of another gate, or
    another teacher, than that of the training.
    """
    from fairseq import checkpoint_utils
    from fairseq.tasks import FairseqTask

    load, build = checkpoint_utils.load_model_ensemble_and_task, FairseqTask.build_criterion
    consequence = "fairseq-validate does not know what a gate or teacher has learned"
    known = [
        written_for(load, "state = load_checkpoint_to_cpu(filename, arg_overrides)", consequence),
        written_for(build, "criterions.build_criterion(cfg, self", consequence),
    ]
    if not all(known):
        return

    @functools.wraps(load)
    def load_model_ensemble_and_task(filenames, arg_overrides=None, task=None, *args, **kwargs):
        given, state = task, kwargs.get("state")
        if given is None and state is None and len(filenames) == 1 and kwargs.get("num_shards", 1) == 1 and not args:
            suffix = kwargs.get("suffix", "")
            path = checkpoint_utils.get_maybe_sharded_checkpoint_filename(filenames[0], suffix, 0, 1)
            if os.path.exists(path):
                state = kwargs["state"] = checkpoint_utils.load_checkpoint_to_cpu(path, arg_overrides)
        models, cfg, task = load(filenames, arg_overrides, task, *args, **kwargs)
        if given is None and state is not None:
            training_state.keep(task, filenames[0], state)
        return models, cfg, task

    @functools.wraps(build)
    def build_criterion(self, *args, **kwargs):
        criterion = build(self, *args, **kwargs)
        if training_state.of(self).loaded is not None:
            training_state.restore(self, criterion)
        return criterion

    checkpoint_utils.load_model_ensemble_and_task = load_model_ensemble_and_task
    FairseqTask.build_criterion = build_criterion


def nan_gradients_are_reported() -> None:
    """Report gradients that are not finite as one message.

    fairseq then repeats the step with hooks that find the module. Its backward hooks, which are omitted here, fail with
    a StopIteration on the dict that the encoder returns.
    """
    from fairseq.nan_detector import NanDetector
    from fairseq.trainer import Trainer

    hooks, step = NanDetector.add_hooks, Trainer.train_step
    consequence = "a nan gradient ends in a StopIteration"
    known = [
        written_for(hooks, "module.register_backward_hook(self.bhook_fn)", consequence),
        written_for(step, "with NanDetector(self.get_model()):", consequence),
    ]
    if not all(known):
        return

    @functools.wraps(hooks)
    def add_hooks(self, module):
        if self.forward:
            self.fhooks.append(module.register_forward_hook(self.fhook_fn))

    @functools.wraps(step)
    def train_step(self, *args, **kwargs):
        try:
            return step(self, *args, **kwargs)
        except FloatingPointError as error:  # from fairseq: gradients, or an fp16 loss scale that is too small
            if "inconsistent between workers" in str(error):
                raise UserError(f"update {self.get_num_updates() + 1}: {error}") from error
            raise UserError(
                f"update {self.get_num_updates() + 1}: {error}: the training has diverged; lower --lr, add --clip-norm "
                "or more --warmup-updates, and look at the data; the state before it is in crash.pt of the --save-dir"
            ) from error

    NanDetector.add_hooks = add_hooks
    Trainer.train_step = train_step


def overflow_on_the_cpu() -> None:
    """Skip an update whose fp16 gradients overflow on the CPU too, where fairseq then asks for a GPU."""
    from fairseq.logging import metrics
    from fairseq.trainer import Trainer

    step = Trainer.train_step
    if not written_for(step, "grad_norm = torch.tensor(0.0).cuda()", "an fp16 overflow on the CPU ends the training"):
        return

    @functools.wraps(step)
    def train_step(self, *args, **kwargs):
        try:
            return step(self, *args, **kwargs)
        except (AssertionError, RuntimeError) as error:  # torch without CUDA, or a machine without a GPU
            if self.cuda or not isinstance(error.__context__, OverflowError):
                raise
        # What fairseq does from there on. (The error has left the aggregator "train", which is not to be ended here.)
        self.zero_grad()
        with metrics.aggregate("train"):
            metrics.log_scalar("loss_scale", self.optimizer.scaler.loss_scale, priority=700, round=4, weight=0)
            metrics.log_stop_time("train_wall")
        return None

    Trainer.train_step = train_step


def native_bf16() -> None:
    """Let --bf16 mean bf16 on the GPU or CPU unless torch_xla is installed; fairseq takes it to imply --tpu."""
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


def saved_when_told_to_stop() -> None:
    """Let a signal save and stop the training; it would otherwise end fairseq-train and lose all since the last save.

    A request to stop is checked after each update and before each batch of a validation. All workers act on it at the
    same point, because their votes are summed together with the logging statistics.
    """
    from fairseq import checkpoint_utils
    from fairseq.distributed import utils as distributed_utils
    from fairseq.trainer import Trainer

    total, step = Trainer._aggregate_logging_outputs, Trainer.valid_step
    load, call = checkpoint_utils.load_checkpoint, distributed_utils.call_main
    consequence = "a training that is told to stop does not save"
    known = [
        written_for(total, "return self._fast_stat_sync_sum(", consequence),
        written_for(step, "_loss, sample_size, logging_output = self.task.valid_step(", consequence),
        written_for(load, "epoch_itr.load_state_dict(itr_state)", consequence),
        written_for(call, "torch.multiprocessing.spawn(", consequence),
    ]
    if not all(known):
        return

    @functools.wraps(total)
    def aggregate_logging_outputs(self, logging_outputs, *sums, ignore=False):
        outputs, found = total(self, logging_outputs, *sums, stopping.vote(), ignore=ignore)
        *sums, stopping.request.votes = found
        return outputs, sums

    @functools.wraps(step)
    def valid_step(self, *args, **kwargs):
        if stopping.votes(self):
            raise stopping.Stop
        return step(self, *args, **kwargs)

    @functools.wraps(load)
    def load_checkpoint(cfg, trainer, *args, **kwargs):
        extra_state, iterator = load(cfg, trainer, *args, **kwargs)
        stopping.request.checked = False
        stopping.handle(signal.SIG_DFL)  # this process is a worker and has none to pass a signal on to
        # The training loop is in the module of fairseq-train, which other commands do not import.
        names = ("fairseq_cli.train", "__main__")
        loops = [sys.modules[name] for name in names if hasattr(sys.modules.get(name), "validate_and_save")]
        if stopping.possible(trainer) and loops and all(stops_when_told(loop, consequence) for loop in loops):
            stopping.listen()
            if extra_state is not None and trainer.get_num_updates() and not cfg.reset_dataloader:
                stopping.request.unvalidated = extra_state["train_iterator"].get(stopping.UNVALIDATED)
        return extra_state, iterator

    @functools.wraps(call)
    def call_main(*args, **kwargs):
        with stopping.starting_workers():
            return call(*args, **kwargs)

    Trainer._aggregate_logging_outputs, Trainer.valid_step = aggregate_logging_outputs, valid_step
    checkpoint_utils.load_checkpoint, distributed_utils.call_main = load_checkpoint, call_main


def stops_when_told(loop: Any, consequence: str) -> bool:
    """Patch the module of a training loop, unless this is already done or its code is not as expected.

    Returns:
        Whether the module is patched.
    """
    train, after_update = loop.train, loop.validate_and_save
    if getattr(train, "stops", False):
        return True
    known = [
        written_for(train, "valid_losses, should_stop = validate_and_save(", consequence),
        written_for(after_update, "valid_losses = validate(cfg, trainer, task, epoch_itr, valid_subsets)", consequence),
    ]
    if all(known):
        loop.validate_and_save = functools.wraps(after_update)(
            functools.partial(stopping.validate_and_save, after_update)
        )
        loop.train = functools.wraps(train)(functools.partial(stopping.train, train, loop))
        loop.train.stops = True
    return all(known)


def one_training_in_a_folder() -> None:
    """Refuse a second training in the same --save-dir; the two would silently overwrite each other's checkpoints.

    The folder is locked after its checkpoint has been loaded and compared with the run, whose errors thus come first.
    """
    from fairseq import checkpoint_utils
    from fairseq.distributed import utils as distributed_utils

    load = checkpoint_utils.load_checkpoint
    if not written_for(load, "extra_state = trainer.load_checkpoint(", "two trainings can write to one --save-dir"):
        return

    @functools.wraps(load)
    def load_checkpoint(cfg, *args, **kwargs):
        found = load(cfg, *args, **kwargs)
        if distributed_utils.get_global_rank() == 0 and not cfg.no_save:
            one_training.hold(cfg.save_dir)
        return found

    checkpoint_utils.load_checkpoint = load_checkpoint
