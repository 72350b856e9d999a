"""What stands between fairseq and the rooms: patches, options, checkpoints, a training's state, a model's features."""


def register() -> None:
    """Register the task and the criterion with fairseq, whose faults on today's Python and torch are patched first.

    Raises:
        ImportError: there is no fairseq.
    """
    import hgkd_fairseq.tasks  # noqa: F401
