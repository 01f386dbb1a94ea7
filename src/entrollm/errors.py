"""The errors that EntroLLM raises for bad input; a caller's own mistake is a ValueError or TypeError."""


class EntroLLMError(Exception):
    """Base of every error that names a bad file, tensor or option."""


class FormatError(EntroLLMError):
    """A file's structure is wrong: a missing shard, a bad header, an impossible shape."""


class CorruptStreamError(FormatError):
    """The structure is right but the coded bytes are not: a checksum or a stream end does not match."""


class UnsupportedError(EntroLLMError):
    """The input is valid, but it uses something that EntroLLM does not implement."""
