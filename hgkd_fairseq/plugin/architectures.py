"""Architectures of other plugins, for the commands of hgkd."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from hgkd_fairseq.errors import UserError


def register(user_dir: str) -> None:
    """Import a plugin as fairseq-train does, so that checkpoints of its architectures can be loaded. Its code is run.

    Args:
        user_dir: the folder, with an __init__.py, whose name is that of the module.

    Raises:
        UserError: there is none, or its import fails.
    """
    from fairseq.utils import import_user_module

    import hgkd_fairseq.tasks  # noqa: F401  our patches of fairseq stand before what others take from it

    if not (Path(user_dir) / "__init__.py").is_file():
        raise UserError(f"--user-dir {user_dir} is no plugin: it has no __init__.py; name the folder for fairseq-train")
    try:
        import_user_module(Namespace(user_dir=user_dir))
    except Exception as error:  # of code that is not ours
        raise UserError(f"--user-dir {user_dir} cannot be imported: {type(error).__name__}: {error}") from error
