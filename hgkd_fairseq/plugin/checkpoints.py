"""The loader of checkpoints, which all commands use. A checkpoint may come from an untrusted source: loading it gives
tensors and plain options, or one error message."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import pickletools
import stat
import warnings
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from hgkd_fairseq.errors import UserError

MOST_OPTIONS = 100_000  # limit on the values in the options of a checkpoint; fairseq's have about 1,500
NUMPY_2 = int(np.__version__.split(".")[0]) >= 2
DEEPEST = 50  # limit on the nesting of the options
MOST_POSITIONS = 1_000_000
LARGEST = 2**63
NUMBERS = frozenset(("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"))
FAIRSEQ_ONES = "name a checkpoint of fairseq-train"
# Allowed dtypes of tensors, which exclude quantized ones.
DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
}
NET_INPUT = ("src_tokens", "src_lengths", "prev_output_tokens")
ZIP = b"PK\x03\x04"


class Refused(Exception):
    """Raised for a refused file. The message continues a sentence that the caller begins with the file's name."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint, as :func:`read` returns it.

    Attributes:
        path: name of the file.
        state: the dict that fairseq's load_checkpoint_to_cpu returns. "cfg" is an OmegaConf configuration with plain
            values: no interpolations, and no objects other than a Namespace. "model" maps names to dense tensors on the
            CPU. "optimizer_history" ends with a dict that holds "num_updates", an int. "extra_state" is a dict.
    """

    path: str
    state: dict[str, Any]

    @property
    def cfg(self):
        """fairseq's configuration.

        Raises:
            UserError: if the checkpoint holds none.
        """
        if self.state.get("cfg") is None:
            raise UserError(f"{self.path} is no fairseq model: it holds no options; {FAIRSEQ_ONES}")
        return self.state["cfg"]

    def options(self, section: str) -> dict[str, Any]:
        """Return the options of a section of the configuration ("task", "model", ...) as plain values.

        Raises:
            UserError: if there is no such section.
        """
        from omegaconf import OmegaConf

        found = self.cfg.get(section)
        if OmegaConf.is_config(found):
            found = OmegaConf.to_container(found, resolve=False, enum_to_str=True)
        found = dict(vars(found)) if isinstance(found, Namespace) else found
        if not isinstance(found, dict):
            raise UserError(f"{self.path} is no fairseq model: it holds no options of its {section}; {FAIRSEQ_ONES}")
        return found

    @property
    def model(self) -> dict[str, Tensor]:
        return self.state["model"]

    @property
    def updates(self) -> int:
        """The number of updates after which the checkpoint was saved."""
        return self.state["optimizer_history"][-1]["num_updates"]

    @property
    def seconds(self) -> float | None:
        """The training time in seconds, including that before resuming; None of an exported checkpoint.

        0 if the recorded time is negative: fairseq without the plugin measures it with the system clock, which may be
        set back.

        Raises:
            UserError: if the recorded value is no time.
        """
        found = self.state["extra_state"].get("previous_training_time")
        if found is None:
            return None
        if type(found) not in (int, float) or not -LARGEST < found < LARGEST:
            raise UserError(f"{self.path} does not say how long it was trained; {FAIRSEQ_ONES}")
        return max(float(found), 0.0)


def split_paths(text: str) -> list[str]:
    """Split a list of paths, of an ensemble or of several data folders, at each ':'.

    Names may contain a ':' themselves: the longest name of an existing file or folder is taken each time. If the text
    contains "://", it is split at each '|' instead.
    """
    if "://" in text:
        return text.split("|")  # as fairseq does for remote paths
    parts, found = text.split(os.pathsep), []
    while parts:
        lengths = range(len(parts), 1, -1)
        length = next((size for size in lengths if os.path.exists(os.pathsep.join(parts[:size]))), 1)
        found.append(os.pathsep.join(parts[:length]))
        parts = parts[length:]
    return found


def read(path: str | os.PathLike, overrides: Mapping[str, Any] | None = None, model: bool = True) -> Checkpoint:
    """Read a checkpoint that fairseq-train, or a command of this package, wrote, onto the CPU.

    Args:
        path: name of the file.
        overrides: options that replace those in the file, as fairseq's --model-overrides.
        model: whether to check that the model's weights are complete and finite and fit the options.

    Raises:
        UserError: if the file does not exist, cannot be read, is damaged, names objects that fairseq does not save, has
            options that are not plain values, or is not a fairseq checkpoint.
    """
    path = os.fspath(path)
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            check_format(file, size)
            state = without_stand_ins(unpickle(file), {})
        check_state(state)
        if model:
            check_model(state["model"], size)
            check_sizes(state)
        return Checkpoint(path, upgrade(state, overrides))
    except Refused as error:
        raise UserError(f"checkpoint {path} {error}") from None
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror or error}") from None
    except (MemoryError, RecursionError) as error:
        raise UserError(f"checkpoint {path} cannot be read: {type(error).__name__}; copy it again") from None


def open_file(path: str) -> BinaryIO:
    """Open a regular file for reading. With iopath, fairseq's PathManager fetches a remote file first."""
    from fairseq.file_io import PathManager

    try:
        path = PathManager.get_local_path(path)
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise UserError(f"{path} does not exist; name a fairseq checkpoint") from None
    if stat.S_ISDIR(mode):
        raise UserError(f"{path} is a folder, not a checkpoint; name the .pt file in it")
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is no regular file; name a fairseq checkpoint")
    return open(path, "rb")


def damaged(reason: str = "") -> Refused:
    return Refused(f"cannot be read: it is cut short or damaged{f' ({reason})' if reason else ''}; copy it again")


def check_format(file: BinaryIO, size: int) -> None:
    """Refuse a file that torch.save does not write, or that names objects that are not in `KNOWN`.

    In torch's zip format every record has a checksum, which is verified here because torch does not verify it.

    Raises:
        Refused: if the file is refused.
    """
    if not size:
        raise Refused("is empty; copy it again")
    head = file.read(512)
    file.seek(0)
    if head[257:262] == b"ustar":
        raise Refused(f"is a tar file; {FAIRSEQ_ONES}")
    try:
        if not head.startswith(ZIP):
            check_names(names(file, 4))  # pickles of the magic number, the version, the sizes of types, the content
            file.seek(0)
            return
        with zipfile.ZipFile(file) as records:
            entries = records.infolist()
            if any(entry.filename.rpartition("/")[2] == "constants.pkl" for entry in entries):
                raise Refused(f"is a TorchScript program; {FAIRSEQ_ONES}")
            # torch.save does not compress; refusing compression prevents a small file from filling the memory.
            if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > size:
                raise Refused(f"is a compressed archive; {FAIRSEQ_ONES}")
            wrong = records.testzip()
            if wrong is not None:
                raise damaged(f"wrong checksum of {wrong}")
            for entry in entries:
                if entry.filename.rpartition("/")[2] == "data.pkl":
                    check_names(names(records.open(entry)))  # type: ignore[arg-type]
    except (Refused, MemoryError):
        raise
    except Exception:  # invalid bytes cause errors of many kinds
        raise damaged() from None
    file.seek(0)


class Number:
    """Stand-in for a numpy dtype in a checkpoint: a number of fixed size, in either byte order, and nothing else.

    With numpy's own class, the bytes of a file could become an array of pointers.
    """

    def __init__(self, code, align=False, copy=True):
        if code not in NUMBERS:
            raise Refused("is refused and nothing of it was run: it holds an array of what is no number")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        version, order, parts, names, fields, size, alignment, *flags = state
        plain = (parts, names, fields, size, alignment) == (None, None, None, -1, -1) and not any(flags)
        if version not in (3, 4) or order not in ("<", ">", "|", "=") or not plain:
            raise Refused("is refused and nothing of it was run: it holds an array of what is no number")
        self.dtype = self.dtype.newbyteorder(order)


class Array:
    """Stand-in for a numpy array in a checkpoint, such as the n-gram counts of --eval-bleu; it becomes a tensor."""

    def __init__(self, *_):
        self.tensor = torch.zeros(0)

    def __setstate__(self, state):
        _, shape, dtype, fortran, raw = state
        if type(dtype) is not Number or type(raw) is not bytes:
            raise Refused("is refused and nothing of it was run: it holds an array of what is no number")
        values = np.frombuffer(raw, dtype.dtype).reshape(shape, order="F" if fortran else "C")
        self.tensor = torch.from_numpy(values.astype(dtype.dtype.newbyteorder("="), order="C"))


class OldMeter:
    """Stand-in for the meters that fairseq pickled before version 0.9; their content is not needed and is dropped."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        pass


METERS = ("AverageMeter", "TimeMeter", "StopwatchMeter")
# Objects allowed in addition to tensors and plain values: what is created in place of each name. Namespace is given as
# a pair too: on leaving safe_globals, torch removes its entries from the list, and a plain Namespace is on it for good
# (compat.py).
ALLOWED: list[Any] = [
    (Namespace, "argparse.Namespace"),
    (Number, "numpy.dtype"),
    (Array, "numpy.ndarray"),
    *((Array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((OldMeter, f"fairseq.{module}.{name}") for module in ("meters", "logging.meters") for name in METERS),
]  # fmt: skip


# All names that a checkpoint of fairseq may contain, including those of ALLOWED. torch allows more: a bytearray of any
# size, and tensors that are sparse, on the meta device, or uninitialised.
KNOWN = {
    *(name for _, name in ALLOWED),
    *(f"collections.{name}" for name in ("OrderedDict", "Counter")),
    *(f"torch._utils._rebuild_{name}" for name in ("tensor", "tensor_v2", "parameter")),
    *(f"torch.{str(dtype).partition('.')[2]}" for dtype in DTYPES),
    *(
        f"torch.{kind}Storage"
        for kind in ("Half", "BFloat16", "Float", "Double", "Byte", "Char", "Short", "Int", "Long")
    ),
    "torch.BoolStorage",
    *("torch.Size", "torch.device", "_codecs.encode", "__builtin__.set", "builtins.set"),
}


def names(pickled: BinaryIO, count: int = 1) -> set[str]:
    """Return the names that `count` consecutive pickles would import."""
    operations = (operation for _ in range(count) for operation in pickletools.genops(pickled))
    return {".".join(str(name).split(" ", 1)) for code, name, _ in operations if code.name in ("GLOBAL", "INST")}


def check_names(found: set[str]) -> None:
    if unknown := sorted(found - KNOWN):
        shown = ", ".join(name[:80] for name in unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise Refused(
            f"is refused and nothing of it was run: it wants to import {shown}; use a checkpoint that fairseq-train "
            "wrote"
        )


# The types that a loaded checkpoint may contain, in addition to tensors.
PLAIN = {type(None), bool, int, float, str, bytes, torch.Size, torch.dtype, torch.device}
CONTAINERS = {dict, OrderedDict, Counter, list, Namespace}


def unpickle(file: BinaryIO) -> Any:
    """Return the content of a file, on the CPU.

    weights_only is passed explicitly so that no environment variable can disable it.

    Raises:
        Refused: if the file is damaged.
    """
    with torch.serialization.safe_globals(ALLOWED), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(file, map_location=torch.device("cpu"), weights_only=True)
        except (Refused, MemoryError):
            raise
        except Exception:  # of any kind, for invalid bytes; torch's message would advise to load the file nevertheless
            raise damaged() from None


def without_stand_ins(found: Any, seen: dict[int, tuple[Any, Any]]) -> Any:
    """Return the content of a checkpoint as tensors and plain values; dicts, lists and namespaces are changed in place.

    Arrays become tensors, tensors lose hooks and gradients, and meters, and all else that torch lets a file name (a
    function, a class), become None. Keys and items of sets that :func:`hashable` does not allow are dropped.

    Args:
        found: content, or a part of it.
        seen: by id, each object met so far and its replacement, as an object may occur repeatedly or contain itself.
    """
    if type(found) in PLAIN:
        return found
    if id(found) in seen:
        return seen[id(found)][1]
    if isinstance(found, Array):
        return found.tensor
    if isinstance(found, Tensor):
        result = found.detach().requires_grad_(False)
        seen[id(found)] = found, result
        return result
    if type(found) in (tuple, set):
        result = type(found)(item for one in found if hashable(item := without_stand_ins(one, seen), type(found)))
        seen[id(found)] = found, result
        return result
    if type(found) not in CONTAINERS:
        return None
    seen[id(found)] = found, found
    if isinstance(found, dict):
        if type(found) is not dict:
            without_stand_ins(vars(found), seen)  # the attributes, such as the versions in a model's state dict
        for key in [*found]:
            value = found.pop(key)
            if hashable(key := without_stand_ins(key, seen), set):
                found[key] = without_stand_ins(value, seen)
    elif type(found) is list:
        found[:] = [without_stand_ins(item, seen) for item in found]
    else:
        without_stand_ins(vars(found), seen)
    return found


def hashable(value: Any, kind: type) -> bool:
    """Return whether a container of type `kind` may hold a value.

    A tuple may hold anything; a set, which also stands for the keys of a dict, only plain values and tuples of these.
    """
    return kind is tuple or type(value) in PLAIN or (type(value) is tuple and all(hashable(one, set) for one in value))


def without_arrays(value: Any) -> Any:
    """Return a copy of a value to save in which numpy arrays are tensors and numpy scalars are Python numbers."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (dict, OrderedDict):
        return type(value)((key, without_arrays(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(without_arrays(item) for item in value)
    return value


def check_state(state: Any) -> None:
    """Check that a state is that of a fairseq checkpoint, and replace its options by copies in plain values.

    Raises:
        Refused: if it is not, or its options are refused by :func:`plain`.
    """

    def refuse(reason: str):
        raise Refused(f"is no fairseq checkpoint: {reason}; {FAIRSEQ_ONES}")

    if not isinstance(state, dict):
        refuse(f"it holds {type(state).__name__}")
    for name, kind in (("model", dict), ("cfg", dict), ("args", Namespace)):
        if state.get(name) is not None and not isinstance(state[name], kind):
            refuse(f"its {name} is {type(state[name]).__name__}")
    if not isinstance(state.get("model"), dict):
        refuse("it holds no model")
    if state.get("cfg") is None and state.get("args") is None:
        refuse("it holds no options")
    count = [0]
    for name in ("cfg", "args"):
        if state.get(name) is not None:
            state[name] = plain(state[name], name, count)
    if not isinstance(state.setdefault("extra_state", {}), dict):
        refuse("its extra_state is no dict")
    history = state.get("optimizer_history", [{}])
    if not isinstance(history, list) or not history or not all(isinstance(entry, dict) for entry in history):
        refuse("it has no history of optimizers")
    updates = history[-1].get("num_updates", 0)
    if type(updates) is not int or not 0 <= updates < LARGEST:
        refuse("its number of updates is none")


def plain(value: Any, name: str, count: list[int], depth: int = 0) -> Any:
    """Return a copy of options in plain values, without interpolations.

    OmegaConf would resolve ``${oc.env:NAME}`` anywhere in the options, and the value of the environment variable would
    be written to the next checkpoint.

    Args:
        value: option, or container of options.
        name: name of the option, for messages.
        count: one number, the values copied so far. It is limited because nested lists that hold another list twice
            each would grow beyond any memory.
        depth: nesting depth of the value.

    Raises:
        Refused: if a value is not plain or contains an interpolation, or there are too many or too deeply nested ones.
    """
    count[0] += 1
    if count[0] > MOST_OPTIONS or depth > DEEPEST:
        raise Refused(f"is refused: its options are more than {MOST_OPTIONS:,} or nested too deeply")
    if isinstance(value, str):
        if "${" in value:
            raise Refused(f"is refused: its option {name} is to be replaced by another value ({value[:80]!r})")
        return value
    if value is None or type(value) in (bool, float) or (type(value) is int and abs(value) < LARGEST):
        return value
    if isinstance(value, list | tuple):
        return type(value)(plain(item, f"{name}[{place}]", count, depth + 1) for place, item in enumerate(value))
    if isinstance(value, Namespace):
        return Namespace(**plain(vars(value), name, count, depth))
    if isinstance(value, dict):
        if not all(type(key) is str and "${" not in key for key in value):
            raise Refused(f"is refused: an option of its {name} has a name that is no plain string")
        return {key: plain(item, f"{name}.{key}"[:80], count, depth + 1) for key, item in value.items()}
    raise Refused(f"is refused: its option {name} is {type(value).__name__}, no plain value")


def check_model(model: dict[str, Tensor], size: int) -> None:
    """Check that all weights are dense tensors, finite, and no larger than a file of `size` bytes can hold.

    Raises:
        Refused: if they are not.
    """
    if not model:
        raise Refused(f"is no fairseq checkpoint: its model is empty; {FAIRSEQ_ONES}")
    storages = {}
    for name, tensor in model.items():
        if not isinstance(name, str):
            raise Refused(f"is no fairseq checkpoint: the name of a weight is {type(name).__name__}; {FAIRSEQ_ONES}")
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES:
            raise Refused(f"is no fairseq checkpoint: {name[:80]} in its model is no tensor; {FAIRSEQ_ONES}")
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        if tensor.numel() * tensor.element_size() > storage.nbytes():
            raise damaged(f"{name[:80]} is not all there")
    if sum(storages.values()) > size:
        raise damaged("its weights are not all there")
    for name, tensor in model.items():
        if not bool(torch.isfinite(tensor).all()):
            raise Refused(f"holds nan or infinity in {name[:80]}: its training has diverged; name an earlier one")


def check_sizes(state: dict[str, Any]) -> None:
    """Check that no option gives more layers than there are weights, or a dimension above their number of elements.

    fairseq would build such a model, with the memory and time that it takes, before it compares the shapes.

    Raises:
        Refused: if an option does.
    """
    options = state["args"] if state.get("args") is not None else state["cfg"].get("model")
    options = vars(options) if isinstance(options, Namespace) else options
    elements = sum(tensor.numel() for tensor in state["model"].values())
    limits = {"layers": len(state["model"]), "dim": elements, "size": elements, "positions": MOST_POSITIONS}
    for name, value in options.items() if isinstance(options, dict) else ():
        # open() would take a number for a descriptor of this process and close it; reading a pipe may never end.
        odd = not isinstance(value, str) or (os.path.exists(value) and not os.path.isfile(value))
        if value and name.endswith("embed_path") and odd:
            raise Refused(f"is refused: its option {name} is no name of a file")
        limit = limits.get(name.rpartition("_")[2]) if name.startswith(("encoder", "decoder", "max")) else None
        if limit is not None and type(value) in (int, float) and value > limit:
            raise Refused(f"does not fit its own options: --{name.replace('_', '-')} {value} is more than {limit}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context without the log messages and warnings of fairseq and hydra about upgrading old options."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def check_weights(path: str, weights: Any) -> None:
    """Check other weights of a checkpoint, such as the moving average, as :func:`check_model` checks its model.

    Args:
        path: name of the checkpoint's file.
        weights: by name.

    Raises:
        UserError: if they are not dense tensors, not complete or not finite.
    """
    try:
        if not isinstance(weights, dict):
            raise damaged("its weights are none")
        check_model(weights, os.path.getsize(path))
    except Refused as error:
        raise UserError(f"checkpoint {path} {error}") from None


def upgrade(state: dict[str, Any], overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """Apply overrides and upgrade old options, as fairseq's load_checkpoint_to_cpu does.

    With numpy >= 2 the number of length buckets becomes 0: they only pad batches, and fairseq's code for them fails.

    Raises:
        Refused: if fairseq cannot do so.
    """
    from fairseq.checkpoint_utils import _upgrade_state_dict
    from fairseq.dataclass.utils import overwrite_args_by_name
    from omegaconf import OmegaConf

    try:
        with quiet():
            if state.get("args") is not None:
                for name, value in (overrides or {}).items():
                    setattr(state["args"], name, value)
            if state.get("cfg") is not None:
                state["cfg"] = OmegaConf.create(state["cfg"], flags={"allow_objects": True})
                if overrides:
                    overwrite_args_by_name(state["cfg"], overrides)
            found = _upgrade_state_dict(state)
            task: Any = getattr(found.get("cfg"), "task", None)
            if getattr(task, "num_batch_buckets", 0) and NUMPY_2:
                task.num_batch_buckets = 0
            return found
    except Exception as error:  # fairseq does not check the old options that it upgrades
        given = " with the overrides that were given" if overrides else ""
        raise Refused(f"is no fairseq checkpoint{given} ({repr(error)[:300]}); {FAIRSEQ_ONES}") from None


def model_class(checkpoint: Checkpoint) -> type[nn.Module]:
    """Return the class of a checkpoint's model.

    Raises:
        UserError: if its architecture is not registered, or it does not translate from left to right.
    """
    from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY

    options = checkpoint.options("model")
    name = options.get("_name") or options.get("arch")
    found = (ARCH_MODEL_REGISTRY.get(name) or MODEL_REGISTRY.get(name)) if isinstance(name, str) else None
    if found is None:
        raise UserError(
            f"{checkpoint.path} has the architecture {str(name)[:80]!r}, which this fairseq does not know; give the "
            "plugin that has it in --user-dir"
        )
    check_translates(found, checkpoint.path)
    return found


def check_translates(kind: type[nn.Module], name: str) -> None:
    """Check that a class of models gives the probability of each target token given the source and the previous ones.

    Args:
        kind: class of the model.
        name: name of the model, for messages.

    Raises:
        UserError: if it is a language model, an encoder only, or a non-autoregressive model.
    """
    from fairseq.models import FairseqEncoderModel, FairseqLanguageModel

    if issubclass(kind, FairseqLanguageModel | FairseqEncoderModel):
        raise UserError(f"{name} is no translation model but a {kind.__name__}; name one with an encoder and a decoder")
    if missing := needs_more(kind):  # type: ignore[arg-type]  # a class is hashable
        raise UserError(
            f"{name} is a {kind.__name__}, which does not translate from left to right (it asks for {missing}); name "
            "an autoregressive model"
        )


@functools.cache
def needs_more(model: type[nn.Module]) -> str:
    """Return the required arguments of a model's forward that a batch's ``net_input`` lacks; "" if it lacks none."""
    parameters = list(inspect.signature(model.forward).parameters.values())[1:]
    named = [one for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    return ", ".join(one.name for one in named if one.default is one.empty and one.name not in NET_INPUT)


def build(checkpoint: Checkpoint, task) -> nn.Module:
    """Build the translation model of a checkpoint on the CPU.

    Args:
        checkpoint: checkpoint of the model.
        task: task of fairseq, with the dictionaries of the model.

    Raises:
        UserError: if it is not a translation model, or its options, its weights and the task do not fit together.
    """
    model_class(checkpoint)
    try:
        model = task.build_model(checkpoint.cfg.model, from_checkpoint=True)
        model.load_state_dict(checkpoint.model, strict=True, model_cfg=checkpoint.cfg.model)
    except UserError as error:
        raise UserError(f"{checkpoint.path} is refused: {error}") from None
    except Exception as error:  # the options in a file may cause any error
        raise unfit(checkpoint.path, error) from error
    return model


def unfit(path: str, error: Exception) -> UserError:
    """Return the error for a checkpoint whose weights do not fit its options or the dictionaries of the data.

    Args:
        path: name of the file or files.
        error: what building the model raised.
    """
    reason = (str(error).strip().splitlines() or [""])[-1].strip()
    return UserError(
        f"{path} does not fit the dictionaries of the data, or its own options: {type(error).__name__}: "
        f"{reason[:300]}; name the data that the model was trained on, or another checkpoint"
    )
