"""Integration with fairseq: patches, options, checkpoints, the state of a training run, and a model's features."""


def register() -> None:
    """Patch fairseq, then register the plugin's tasks and criterion with it.

    Raises:
        ImportError: if fairseq is not installed.
        UserError: if torch is older than 2.6.
    """
    import hgkd_fairseq.tasks  # noqa: F401
