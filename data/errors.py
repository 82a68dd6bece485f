"""The one exception of the data package for mistakes a user can mend; its text is a complete message."""


class DataError(Exception):
    """Something is wrong with what the user pointed at: a path, a data set, a tokenizer, a shard. Shown without a
    traceback."""
