"""The base of every error that is a user's to mend."""


class KloraError(Exception):
    """Something given to klora is not possible, or a file is broken; the message says what to do.

    Each kind has a class of its own beside what raises it, and also derives from ValueError or RuntimeError.

    Example: with contextlib.suppress(KloraError): lm = klora.load("missing.klora")
    """
