"""The one exception for input that the user can mend."""


class UserError(ValueError):
    """Says in one sentence which option or file is wrong and how to mend it; shown without a traceback."""
