"""What a teacher said of every target token of some data, on disk: the format, and its reading. No fairseq here.

    manifest.json             kind, temperature, SHA-256 of dictionaries, teacher and data; data/shards.py checks it
    member-0.weight.npy       (V, D), and member-0.bias.npy (V,) where there is one, of each member; kind "hidden"
    shard-00000/keys.npy      (S,) uint64, hash of each sentence's source and target tokens
    shard-00000/offsets.npy   (S + 1,) uint32, of each sentence's first token; a sentence without tokens was too long
    shard-00000/gold.npy      (N, 3) fp32, signals.Gold of each of the N tokens; in format 2 (N, 4), the third the
                              log-sum-exp of its logits, which nobody reads

    hidden     hidden-0.npy (N, D): fp32, fp16, or bf16 as uint16; of each member
    sampled    ids.npy (E,), the distinct ids that were drawn, of the tokens in turn, first those drawn more than once;
               counts.npy (R,), how often those were drawn; distinct.npy, repeated.npy (N,), how many ids and how many
               counts a token has; ids_offsets.npy, counts_offsets.npy (S + 1,), of each sentence's first
    topk       ids.npy, logprobs.npy (N, k), rest.npy (N,), log of the other tokens' probability
    gold       nothing more

Sentences have numbers: the place in a subset's data, after those of the subsets and folders before it.
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
ALWAYS = {"keys", "offsets", "gold"}  # arrays of a shard, and those of some kinds beside them
MORE: dict[str, set[str]] = {
    "sampled": {"ids", "counts", "distinct", "repeated", "ids_offsets", "counts_offsets"},
    "topk": {"ids", "logprobs", "rest"},
    "gold": set(),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
OPEN_SHARDS = 4096  # whose memory maps a process keeps; Linux grants it 65,530 maps
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
    """Of a sentence pair's token ids, without pads."""
    digest = hashlib.blake2b(digest_size=8)
    for side in (source, target):
        digest.update(np.int64(len(side)).tobytes() + side.long().numpy().tobytes())
    return int.from_bytes(digest.digest(), "little") or 1


def bits(tensor: Tensor) -> np.ndarray:
    """As numpy has it: bf16 as uint16."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


@contextlib.contextmanager
def array_errors(place: Path) -> Iterator[None]:
    """What numpy raises of a file that is no array: it parses the header as Python, which may raise anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        why = getattr(error, "strerror", None) or f"it is no array ({type(error).__name__})"
        raise UserError(f"{place}: {why}; write the store again") from None


class Part(NamedTuple):
    """A subset of the data, or of one of several folders of them."""

    name: str
    folder: int
    first: int  # number of its first sentence
    sentences: int
    data: str  # SHA-256 of its keys


class Store:
    """A store that `hgkd store` has written.

    Args:
        folder: of it.
        option: that names it.

    Raises:
        UserError: it is not there, is not finished, or its manifest or a shard's record is damaged.
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
        if self.kind not in KINDS or self.manifest["dtype"] not in DTYPES:
            raise UserError(f"{self.named} is no teacher's store of a kind that is known; {' '.join(KINDS)} are")
        self.parts = [Part(*[one[name] for name in Part._fields]) for one in self.manifest["parts"]]
        for shard in range(self.shards.count):
            self.shards.described(shard)
        # Of each shard whether it has been hashed, by whichever of the loader's workers came first.
        self.hashed = torch.zeros(self.shards.count, dtype=torch.uint8).share_memory_()
        self.arrays = functools.lru_cache(OPEN_SHARDS)(self._arrays)

    @property
    def kind(self) -> str:
        return self.manifest["kind"]

    @property
    def temperature(self) -> float:
        return self.manifest["temperature"]

    def head(self, member: int) -> tuple[Tensor, Tensor | None]:
        """(V, D) weight and (V,) bias or None of a member's output layer, fp32."""
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
        """Raises:
        UserError: the store has no such subset.
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
        """Of a shard, mapped to memory; hashed before they are used for the first time."""
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
        # As plain arrays: slices of a memmap take ten times as long.
        return {name: values.view(np.ndarray) for name, values in found.items()}

    def sentence(self, number: int) -> tuple[int, dict[str, np.ndarray]]:
        """Of a sentence its key and the rows of each array; `counts` and `ids` of a kind "sampled" are those of all its
        tokens, one behind another."""
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
        """Tensors (B, T, ...) of the sentences of a batch, whose tokens stand where `kept` (B, T) is True. fairseq
        halves what is fp32: statistics are fp64, and other floating-point numbers the integers of their bits."""
        joined = {name: np.concatenate([one[name] for one in sentences]) for name in sentences[0]}
        gold = torch.from_numpy(joined.pop("gold")[:, [0, 1, -1]]).double()  # of formats 2 and 3
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
    """An array of a shard. np.save does not say why it cannot be written: on a full disk, say."""
    values = np.ascontiguousarray(values)
    with open(folder / f"{name}.npy", "wb") as stream:
        np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(values))
        stream.write(values.data)


def ends(lengths: list[int]) -> np.ndarray:
    """0 and the running sums."""
    found = np.cumsum([0, *lengths], dtype=np.int64)
    return found if found[-1] >= 2**32 else found.astype(np.uint32)


def spread(values: Tensor, kept: Tensor) -> Tensor:
    """(N, ...) values of tokens at their places, (B, T, ...); 0 elsewhere."""
    whole = values.new_zeros(*kept.shape, *values.shape[1:])
    whole[kept] = values
    return whole
