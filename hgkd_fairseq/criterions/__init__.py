"""fairseq's criterions of this plugin. A worker that is sent the options of one imports it: all of it is registered."""

import hgkd_fairseq.tasks  # noqa: F401
