"""Every error a user can meet, told apart by who can mend it.

    Blip2Error
    ├── UserError             the command, the file or the recipe is at fault    exit code 2
    │   ├── BadImage          a file that is no picture, or one we refuse to decode
    │   ├── BadData           a data set that is missing, broken or of another version
    │   │   └── BadSample     one sample of it, with the others sound
    │   ├── BadRecipe         a recipe with a wrong, unknown or contradictory field
    │   ├── MissingFile       a path that leads nowhere
    │   ├── MissingPart       a model that lacks what was asked of it
    │   ├── UnknownModel      a name that is no model
    │   └── Untrusted         a file that could run code or lies about its contents
    ├── DownloadFailed        the network or a mirror is at fault                exit code 2
    └── Busy                  too many requests at once
        └── Closing           an engine that takes no more

Exit codes are those of the command line.
"""


class Blip2Error(Exception):
    """Base of all errors this package raises on purpose; the message says what is wrong and what to do."""

    exit_code = 2


class UserError(Blip2Error):
    """Something the user gave is at fault."""


class BadImage(UserError):
    """A file that is no picture, or one that is refused before it is decoded."""


class BadData(UserError):
    """A data set that is missing, broken or made by another version."""


class BadSample(BadData):
    """One sample that cannot be used, while the others of its data set can.

    Attributes:
        sample_id: the sample's name in its data set.
        where: the file it was to be read from.
        reason: what is wrong, as the end of a sentence that begins with the file.
    """

    def __init__(self, sample_id: str, where: str, reason: str) -> None:
        super().__init__(sample_id, where, reason)  # all three, so that it can be sent between processes
        self.sample_id, self.where, self.reason = sample_id, where, reason

    def __str__(self) -> str:
        return f"Sample {self.sample_id!r} cannot be used: {self.where} {self.reason}."


class BadRecipe(UserError):
    """A recipe with a wrong, unknown or contradictory field."""


class MissingFile(UserError):
    """A path that leads nowhere."""


class MissingPart(UserError):
    """A model that lacks the part which was asked of it."""


class UnknownModel(UserError):
    """A name that is neither a known model, a folder nor a hub name."""


class Untrusted(UserError):
    """A file that could run code, or whose header lies about its contents."""


class Busy(Blip2Error):
    """A request that cannot be taken now; it may be made again later."""


class Closing(Busy):
    """A request to an engine that is being shut down."""


class DownloadFailed(Blip2Error):
    """A file could not be fetched or did not have the expected contents."""
