"""``hgkd doctor``: check whether this installation can train. It prints a line for each check, and remedies."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from importlib.util import find_spec


class Problem(Exception):
    """A failed check. The message says what is wrong and how to fix it."""


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def python() -> str:
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        raise Problem(f"{platform.python_version()}; fairseq's wheels are for 3.11 and 3.12: use one of them")
    return platform.python_version()


def torch() -> str:
    if find_spec("torch") is None:
        raise Problem("not installed; pip install torch")
    import torch

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        raise Problem(f"{torch.__version__} would run code hidden in a checkpoint; pip install 'torch>=2.6'")
    return torch.__version__


def fairseq() -> str:
    if find_spec("fairseq") is None:
        raise Problem("not installed; pip install ve-fairseq==0.12.3")
    names = list(dict.fromkeys(packages_distributions().get("fairseq", [])))
    fork = ", ".join(f"{name} {distribution(name).version}" for name in names)
    removed = f"pip uninstall {' '.join(names)}" if names else "take the checkout off PYTHONPATH"
    anew = f"{removed}, then pip install ve-fairseq==0.12.3"
    if len(names) > 1:
        raise Problem(f"{fork}: one is written over the other; {anew}")
    try:
        import fairseq.checkpoint_utils  # fails in a partly working installation
    except Exception as error:
        what = f"{fork or 'a checkout'} does not import in Python {platform.python_version()}"
        raise Problem(f"{what} ({one_line(error)}); {anew}") from error
    from hgkd_fairseq import plugin
    from hgkd_fairseq.plugin import compat

    plugin.register()
    fork = fork or f"a checkout of {getattr(fairseq, '__version__', 'unknown version')}"
    unpatched = [name for name, applied in compat.APPLIED.items() if not applied]
    if unpatched:
        expected = f"pip install ve-fairseq=={compat.TESTED_FAIRSEQ}"
        raise Problem(f"{fork}, which is not as the plugin's patches expect: {', '.join(unpatched)}; {expected}")
    return fork


def registration() -> str:
    from fairseq.criterions import CRITERION_REGISTRY
    from fairseq.tasks import TASK_REGISTRY

    for name, registry in (("translation_with_teacher", TASK_REGISTRY), ("hard_gate_kd", CRITERION_REGISTRY)):
        if name not in registry:
            raise Problem(f"{name} is not registered; is another package named hgkd_fairseq on the path?")
    return "task translation_with_teacher, criterion hard_gate_kd"


def installed(package: str) -> str:
    try:
        return distribution(package).version
    except PackageNotFoundError:
        raise Problem(f"not installed; pip install {package}") from None


def cuda() -> str:
    import torch

    if torch.version.cuda is None:
        return "none: this torch is built for the CPU"
    if not torch.cuda.is_available():
        return f"none: torch is built for CUDA {torch.version.cuda} and sees no GPU; give fairseq --cpu"
    return f"{torch.version.cuda}, {torch.cuda.get_device_name()}"


def triton() -> str:
    try:
        return distribution("triton").version
    except PackageNotFoundError:
        return "none: only the CUDA kernels would use it"


def loss_implementations() -> str:
    """Compare each loss implementation that this device can run with the eager one, on a small input.

    Returns: the names of the implementations, and the device.

    Raises:
        Problem: the CPU kernel cannot be used, or an implementation gives another loss.
    """
    import torch

    from hgkd_fairseq.loss import IMPLEMENTATIONS, gated_distillation
    from hgkd_fairseq.loss.native import rows as cpu_rows
    from hgkd_fairseq.loss.triton import rows as triton_rows

    device = "cuda" if torch.cuda.is_available() else "cpu"
    why_not = {"native": cpu_rows.usable(device), "triton": triton_rows.usable(device)}
    usable = [name for name in IMPLEMENTATIONS if why_not.get(name) is None]
    if device == "cpu" and why_not["native"]:
        remedy = "; install a C compiler" if "no C compiler" in why_not["native"] else ""
        raise Problem(f"slower than it could be: {why_not['native']}{remedy}")

    generator = torch.Generator().manual_seed(0)
    hidden, teacher = (torch.randn(4, 5, 8, generator=generator).to(device) for _ in range(2))
    weight = torch.randn(11, 8, generator=generator).to(device)
    target = torch.tensor([[2, 3, 4, 5, 6], [7, 8, 9, 2, 1], [5, 1, 1, 1, 1], [1, 1, 1, 1, 1]], device=device)
    expected = gated_distillation(hidden, weight, teacher, weight, target, implementation="eager").loss
    for name in usable:
        loss = gated_distillation(hidden, weight, teacher, weight, target, implementation=name).loss
        if not torch.allclose(loss, expected, rtol=1e-5):
            raise Problem(f"{name} gives {float(loss)}, eager {float(expected)}; use --loss-impl eager and report it")
    return f"{', '.join(name for name in usable if name != 'auto')} on {device}"


CHECKS: list[tuple[str, Callable[[], str]]] = [
    ("Python", python),
    ("torch", torch),
    ("fairseq", fairseq),
    ("plugin", registration),
    ("sacrebleu", partial(installed, "sacrebleu")),
    ("sentencepiece", partial(installed, "sentencepiece")),
    ("CUDA", cuda),
    ("Triton", triton),
    ("loss", loss_implementations),
]
# For each check, the checks without which it is skipped: it would fail for the same reason.
NEEDS = {"fairseq": {"torch"}, "plugin": {"torch", "fairseq"}, "CUDA": {"torch"}, "loss": {"torch"}}


def report() -> int:
    """Run all checks, print their results and return the exit status: 0 if all pass, else 1."""
    failed: list[str] = []
    for name, check in CHECKS:
        if without := NEEDS.get(name, set()).intersection(failed):
            print(f"--    {name:14}not checked without {', '.join(sorted(without))}")
            continue
        try:
            print(f"ok    {name:14}{check()}")
        except Problem as problem:
            failed.append(name)
            print(f"FAIL  {name:14}{problem}")
        except Exception as error:  # a broken installation can fail anywhere; the other checks still say what works
            failed.append(name)
            print(f"FAIL  {name:14}{type(error).__name__}: {one_line(error)}")
    return int(bool(failed))
