"""Registration of model architectures that other plugins define, for the hgkd commands."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from hgkd_fairseq.errors import UserError


def register(user_dir: str) -> None:
    """Import a plugin, which runs its code, so that checkpoints of its architectures can be loaded.

    Args:
        user_dir: folder of the plugin, as for fairseq-train's --user-dir; its name is the name of the module.

    Raises:
        UserError: if the folder has no __init__.py or its import fails.
    """
    from fairseq.utils import import_user_module

    import hgkd_fairseq.tasks  # noqa: F401  patches fairseq before the other plugin imports from it

    if not (Path(user_dir) / "__init__.py").is_file():
        raise UserError(f"--user-dir {user_dir} is no plugin: it has no __init__.py; name the folder for fairseq-train")
    try:
        import_user_module(Namespace(user_dir=user_dir))
    except Exception as error:  # the plugin's code may raise anything
        raise UserError(f"--user-dir {user_dir} cannot be imported: {type(error).__name__}: {error}") from error
