"""BLIP-2: let any frozen large language model see.

`load` and `Blip2` are resolved on first use, so that `import blip2` costs milliseconds.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["Blip2", "__version__", "load"]

if TYPE_CHECKING:
    from blip2.inference.loading import Blip2, load


def __getattr__(name: str):
    if name in ("load", "Blip2"):
        from blip2.inference import loading

        return getattr(loading, name)
    raise AttributeError(f"module 'blip2' has no attribute {name!r}")
