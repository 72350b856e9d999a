"""The criterion of this plugin. A worker that unpickles its options imports this package, which registers all that the
plugin adds to fairseq."""

import hgkd_fairseq.tasks  # noqa: F401
