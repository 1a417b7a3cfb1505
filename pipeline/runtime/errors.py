"""Every error that Coldstill raises for its user's sake. Those of the store are in `coldstill.cache.errors`.

    ColdstillError
    ├── RecipeError (ValueError)            the recipe, or an override of it, is wrong
    ├── DataError (ValueError)              the text cannot give the rows that were asked for, or a batch is malformed
    ├── TargetError (ValueError)            a term of the loss has a weight, and no target to learn from
    ├── ModelError (ValueError)             a model cannot be loaded, or does not fit the other one
    ├── NonFiniteError (ArithmeticError)    a model gave a NaN or an infinity
    ├── HubError (OSError)                  the model hub does not take a student
    └── StoreError (OSError)                something about a store on disk
        ├── StoreNotFoundError              no store, selection or student where one is needed
        ├── FormatError                     written by another version of the format
        ├── IdentityError                   made from another teacher than the one at hand
        ├── IncompleteError                 columns that a run needs are not all there
        ├── CorruptError                    bytes that are not the bytes that were written
        ├── InUseError                      another process writes what this one wants to write
        ├── RemoteError                     object storage that does not do what it was asked to
        └── NoRoomError                     what a run would write is more than there is room for

Each message is one line: what, where, got against expected, what to do. The library raises; only the command line
prints and exits.
"""

from coldstill.cache.errors import ColdstillError


class RecipeError(ColdstillError, ValueError):
    """A recipe key or value is wrong."""


class DataError(ColdstillError, ValueError):
    """The text source cannot give the rows that were asked for, or a batch is not what training takes."""


class TargetError(ColdstillError, ValueError):
    """A term of the loss has a weight, and nothing gives its target."""


class ModelError(ColdstillError, ValueError):
    """A model cannot be loaded, or teacher and student do not fit each other."""


class NonFiniteError(ColdstillError, ArithmeticError):
    """A model's forward gave a NaN or an infinity, or its training did."""


class HubError(ColdstillError, OSError):
    """The model hub cannot be reached, or does not take what is sent to it."""
