"""Operations at which a host waits for its GPU, found on the CPU: torch's own detector needs a device.

`tolist`, `numpy` and copies from one device to the other are not seen.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Their results, or the shapes of these, depend on values that a device has still to compute.
WAITING = {
    f"aten.{name}"
    for name in (
        *("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select"),
        *("_unique2", "unique_dim", "unique_consecutive", "bincount"),
    )
}
INDEXED = {f"aten.{name}" for name in ("index", "index_put", "index_put_", "_index_put_impl_")}  # waiting with a mask


class Waited(AssertionError):
    """Raised at an operation for which a host would wait for its GPU."""


class NoWaiting(TorchDispatchMode):
    """Within it, operations for which a host would wait for its GPU raise `Waited`, unless `allowed` is True."""

    def __init__(self, allowed: bool = False):
        super().__init__()
        self.allowed = allowed

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).rpartition(".")[0]
        masked = name in INDEXED and any(one is not None and one.dtype is torch.bool for one in args[1])
        if not self.allowed and (name in WAITING or masked):
            raise Waited(f"the host waits for the device at {name}")
        return func(*args, **(kwargs or {}))
