"""File format and reader of a store: a teacher's output for every target token of some data.

    manifest.json             kind, temperature, SHA-256 of dictionaries, teacher and data; data/shards.py checks it
    member-0.weight.npy       (V, D) fp32, and member-0.bias.npy (V,) if there is one: the output layer of each member;
                              kind "hidden" only
    shard-00000/keys.npy      (S,) uint64, hash of each sentence's source and target tokens
    shard-00000/offsets.npy   (S + 1,) uint32, or int64 from 2**32 tokens: index of each sentence's first token; a
                              sentence without tokens was too long for the teacher
    shard-00000/gold.npy      (N, 3) fp32, signals.Gold of each of the N tokens; in format 2 (N, 4), where the third
                              column, the log-sum-exp of the logits, is not used

In addition, a shard has the following arrays, depending on the kind:

    hidden     hidden-0.npy (N, D) of each member: fp32, fp16, or bf16 stored as uint16
    sampled    ids.npy (E,): distinct drawn ids, token after token; for each token those drawn more than once come first
               counts.npy (R,): how often each of the latter was drawn
               distinct.npy, repeated.npy (N,): number of ids and number of counts of each token
               ids_offsets.npy, counts_offsets.npy (S + 1,): index of each sentence's first id and first count
    topk       ids.npy, logprobs.npy (N, k); rest.npy (N,): log of the probability of all other tokens
    gold       none

Sentences are numbered consecutively over all parts of the store (subsets and data folders), in the order of the data.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hgkd_fairseq import files
from hgkd_fairseq.data.shards import MANIFEST as SHARDS_MANIFEST
from hgkd_fairseq.data.shards import Shards
from hgkd_fairseq.errors import UserError

FORMAT = 3
AGAIN = "hgkd store --output"
KINDS = ("hidden", "sampled", "topk", "gold")
ALWAYS = {"keys", "offsets", "gold"}  # arrays of every shard; MORE has the additional ones of a kind
MORE: dict[str, set[str]] = {
    "sampled": {"ids", "counts", "distinct", "repeated", "ids_offsets", "counts_offsets"},
    "topk": {"ids", "logprobs", "rest"},
    "gold": set(),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
OPEN_SHARDS = 4096  # shards that a process keeps mapped to memory; Linux allows 65,530 maps per process
PART = {"name": str, "folder": files.Within(0), "first": files.Within(0), "sentences": files.Within(1), "data": str}
MANIFEST = {
    "format": files.Within(2, FORMAT),
    "kind": str,
    "dtype": str,
    "temperature": files.Within(1e-6, 1e6, float),
    "draws": files.Within(0, 255),
    "folds": files.Within(0),
    "vocabulary": files.Within(2),
    "languages": [str],
    "dictionaries": [str],
    "teacher": str,
    "heads": {str: str},
    "members": files.Within(1),
    "parts": [PART],
    "limits?": [files.Within(1)],
    "k?": files.Within(0),
}


def key(source: Tensor, target: Tensor) -> int:
    """Return a 64-bit hash, never 0, of the token ids of a sentence pair, (length,) each and without padding."""
    digest = hashlib.blake2b(digest_size=8)
    for side in (source, target):
        digest.update(np.int64(len(side)).tobytes() + side.long().numpy().tobytes())
    return int.from_bytes(digest.digest(), "little") or 1


def bits(tensor: Tensor) -> np.ndarray:
    """Convert a tensor to a numpy array; bf16 becomes uint16 with the same bits, because numpy has no bf16."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


@contextlib.contextmanager
def array_errors(place: Path) -> Iterator[None]:
    """Turn errors of reading an array file into a UserError that names `place`.

    All exceptions are caught, because numpy parses the header as a Python literal: a damaged one can raise any kind.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        why = getattr(error, "strerror", None) or f"it is no array ({type(error).__name__})"
        raise UserError(f"{place}: {why}; write the store again") from None


class Part(NamedTuple):
    """One part of a store: a subset of the data in one of the data folders."""

    name: str  # of the subset
    folder: int  # index of the data folder
    first: int  # number of its first sentence in the store
    sentences: int  # how many it has
    data: str  # SHA-256 of its keys


class Store:
    """Reader of a store that `hgkd store` has written.

    Args:
        folder: folder of the store.
        option: command-line option that names the folder, for error messages.

    Attributes:
        manifest: content of manifest.json; see `MANIFEST`.
        parts: list of :class:`Part`, in the order of the sentence numbers.

    Raises:
        UserError: the store does not exist or is not finished, or its manifest or a shard's record is damaged.
    """

    def __init__(self, folder: str, option: str = "--teacher-store"):
        self.folder, self.named = Path(folder), f"{option} {folder}"
        if not (self.folder / SHARDS_MANIFEST).is_file():
            raise UserError(f"{self.named} is no store: it has no {SHARDS_MANIFEST}; write one with {AGAIN}")
        try:
            self.shards = Shards.open(folder)
        except UserError as error:
            raise UserError(f"{self.named}: {error}; write another one with {AGAIN}") from None
        self.manifest: dict[str, Any] = self.shards.manifest
        if problem := files.mismatch(self.manifest, MANIFEST):
            raise UserError(
                f"{self.named} is no teacher's store: of its manifest {problem}; write another one with {AGAIN}"
            )
        if len(self.manifest["dictionaries"]) != 2 or len(self.manifest["languages"]) != 2:
            raise UserError(
                f"{self.named} is no teacher's store: its manifest does not name two dictionaries and two languages; "
                f"write another one with {AGAIN}"
            )
        if self.kind not in KINDS or self.manifest["dtype"] not in DTYPES:
            raise UserError(f"{self.named} is no teacher's store of a kind that is known; {' '.join(KINDS)} are")
        self.parts = [Part(*[one[name] for name in Part._fields]) for one in self.manifest["parts"]]
        for shard in range(self.shards.count):
            self.shards.described(shard)
        # Whether the files of each shard have been hashed; shared, so that not each worker of the data loader does it.
        self.hashed = torch.zeros(self.shards.count, dtype=torch.uint8).share_memory_()
        self.arrays = functools.lru_cache(OPEN_SHARDS)(self._arrays)

    @property
    def kind(self) -> str:
        return self.manifest["kind"]

    @property
    def temperature(self) -> float:
        return self.manifest["temperature"]

    def head(self, member: int) -> tuple[Tensor, Tensor | None]:
        """Read the output layer of a member from a store of the kind "hidden".

        Returns:
            The weight (V, D) and the bias (V,) in fp32; None instead of a bias if the layer has none.

        Raises:
            UserError: a file is missing or damaged, or the store has no output layers.
        """
        found: list[Tensor | None] = []
        for name in (f"member-{member}.weight.npy", f"member-{member}.bias.npy"):
            digest = self.manifest["heads"].get(name)
            if digest is None:
                found.append(None)
                continue
            with array_errors(self.folder / name):
                if files.sha256(self.folder / name) != digest:
                    raise UserError(f"{self.folder / name} is damaged or was changed; write the store again")
                found.append(torch.from_numpy(np.load(self.folder / name, allow_pickle=False)))
        weight, bias = found
        sizes = [tuple(one.shape) for one in found if one is not None and one.dtype == torch.float32]
        wanted = [self.manifest["vocabulary"]] * (1 if bias is None else 2)
        if weight is None or weight.dim() != 2 or [size[0] for size in sizes if size] != wanted:
            raise UserError(f"{self.folder} has no output layer of the teacher; write the store again")
        return weight, bias

    def part(self, name: str, folder: int) -> Part:
        """Return the part of the subset `name` in the data folder with index `folder`.

        Raises:
            UserError: the store has no such part.
        """
        for part in self.parts:
            if (part.name, part.folder) == (name, folder):
                return part
        known = list(dict.fromkeys(part.name for part in self.parts))
        if name in known:
            raise UserError(
                f"{self.named} has nothing of {name} of data folder {folder + 1}; write one of all folders, with ':' "
                f"between them, with {AGAIN}"
            )
        raise UserError(
            f"{self.named} has the subsets {', '.join(known)} and not {name}; write one with "
            f"hgkd store --subset {','.join([*known, name])}"
        )

    def _arrays(self, shard: int) -> dict[str, np.ndarray]:
        """Map the arrays of a shard to memory, after checking their hashes if no process of the loader has done so.

        Raises:
            UserError: a file is damaged, or the arrays are not those of the store's kind.
        """
        if not self.hashed[shard]:
            self.shards.files(shard)
            self.hashed[shard] = 1
        folder = self.shards.name(shard)
        with array_errors(folder):
            found = {file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in sorted(folder.iterdir())}
        more = found.keys() - ALWAYS
        whole = len(more) == self.manifest["members"] and all(name.startswith("hidden-") for name in more)
        if not found.keys() >= ALWAYS or not (whole if self.kind == "hidden" else more == MORE[self.kind]):
            raise UserError(f"{folder} has not the arrays of a store of the kind {self.kind}; write the store again")
        # Plain arrays instead of np.memmap objects, whose slicing takes ten times as long.
        return {name: values.view(np.ndarray) for name, values in found.items()}

    def sentence(self, number: int) -> tuple[int, dict[str, np.ndarray]]:
        """Read a sentence by its number in the store.

        Returns:
            The key of the sentence (:func:`key`), and by name the rows of each array for its N tokens, N = 0 if the
            sentence was too long; "ids" and "counts" of the kind "sampled" contain those of all tokens concatenated.

        Raises:
            UserError: the sentence's shard is damaged.
        """
        shard, local = divmod(number, self.shards.shard_size)
        arrays = self.arrays(shard)
        found = {}
        for name, values in arrays.items():
            if name != "keys" and not name.endswith("offsets"):
                start, end = arrays.get(f"{name}_offsets", arrays["offsets"])[local : local + 2].tolist()
                found[name] = values[start:end]
        return int(arrays["keys"][local]), found

    # Batches

    def batch(self, sentences: list[dict[str, np.ndarray]], kept: Tensor) -> dict[str, Any]:
        """Combine the arrays of several sentences into padded tensors (B, T, ...).

        With --fp16, fairseq converts all fp32 tensors of a batch to half precision. Therefore "gold" is in fp64, and
        other floating-point values are integers with the same bits.

        Args:
            sentences: arrays of each sentence of the batch, as :meth:`sentence` returns them.
            kept: (B, T) bool, the positions of the sentences' tokens; the result is 0 at all other positions.

        Returns:
            "gold" (B, T, 3), and depending on the kind "hidden-MEMBER" (B, T, D); "ids" and "counts" (B, T, K), where K
            is the largest number of distinct ids of a token; or "ids" and "logprobs" (B, T, k) and "rest" (B, T).
        """
        joined = {name: np.concatenate([one[name] for one in sentences]) for name in sentences[0]}
        gold = torch.from_numpy(joined.pop("gold")[:, [0, 1, -1]]).double()  # in format 2 and in format 3
        made: dict[str, Any] = {"gold": spread(gold, kept)}
        if self.kind == "sampled":
            distinct, repeated = (torch.from_numpy(joined[name].astype(np.int64)) for name in ("distinct", "repeated"))
            places = torch.arange(int(distinct.max()) if len(distinct) else 1)  # (K,)
            filled = places < distinct[:, None]  # (N, K)
            ids, counts = torch.zeros(filled.shape, dtype=torch.int64), filled.long()
            ids[filled] = torch.from_numpy(joined["ids"].astype(np.int64))
            counts[places < repeated[:, None]] = torch.from_numpy(joined["counts"].astype(np.int64))
            return made | {"ids": spread(torch.where(filled, ids, ids[:, :1]), kept), "counts": spread(counts, kept)}
        for name, values in joined.items():
            whole = values.astype(np.int64) if name == "ids" else values.view(np.dtype(f"int{8 * values.itemsize}"))
            made[name] = spread(torch.from_numpy(whole), kept)
        return made


def save(folder: Path, name: str, values: np.ndarray) -> None:
    """Write an array of a shard to FOLDER/NAME.npy.

    Unlike np.save, which hides the reason of a failed write, it raises an OSError that gives it, such as a full disk.
    """
    values = np.ascontiguousarray(values)
    with open(folder / f"{name}.npy", "wb") as stream:
        np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(values))
        stream.write(values.data)


def ends(lengths: list[int]) -> np.ndarray:
    """Return the offsets (S + 1,) of S concatenated sequences, from their lengths; int64 from 2**32 on, else uint32."""
    found = np.cumsum([0, *lengths], dtype=np.int64)
    return found if found[-1] >= 2**32 else found.astype(np.uint32)


def spread(values: Tensor, kept: Tensor) -> Tensor:
    """Place the values (N, ...) of N tokens at the positions that `kept` (B, T) selects; 0 elsewhere: (B, T, ...)."""
    whole = values.new_zeros(*kept.shape, *values.shape[1:])
    whole[kept] = values
    return whole
