"""What a downloaded model folder may not say: anything that would fetch or run code.

transformers runs Python from a model's folder where `auto_map` names it and trust_remote_code allows it, and fetches
compiled kernels from the hub where an attention implementation has a name such as "owner/kernel". Nothing here ever
allows the first; these checks name the fault instead of leaving it to chance, and close the second.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blip2.errors import BadData, Untrusted

ATTENTIONS = {None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"}
MOST_BYTES = 64 << 20  # of a JSON file; tokenizers have the largest, some 20 MB


def check_configuration(folder: Path, *, refuse_own_code: bool) -> None:
    """Looks through every JSON file of settings in a folder.

    Args:
        folder: of a Hugging Face model.
        refuse_own_code: refuse `auto_map` too. Off for language models and image encoders: many that transformers knows
            by itself still name their old code, which is not run.

    Raises:
        Untrusted: a setting that would fetch or run code, with the file's and the setting's names.
        BadData: a file that is no JSON, or too large for one.
    """
    for path in sorted(folder.glob("*.json")):
        if path.name.startswith(("tokenizer.", "vocab", "added_tokens")) or path.name.endswith(".index.json"):
            continue  # words, and where weights lie
        for name, value in _settings(_read(path)):
            if name == "trust_remote_code" and value:
                raise Untrusted(f"{path} asks for trust_remote_code. Code of a model's folder is never run; remove it.")
            if "attn_implementation" in name and not _is_known(value):
                raise Untrusted(
                    f"{path} sets {name} to {value!r}, which would fetch compiled code. Remove the setting; known are "
                    f"{', '.join(sorted(filter(None, ATTENTIONS)))}."
                )
            if name == "auto_map" and value and refuse_own_code:
                raise Untrusted(
                    f"{path} has an auto_map to Python code, which is never run. Remove it if you trust the rest."
                )


def _is_known(value: Any) -> bool:
    """Whether an attention's name, or every name in a mapping of sub-models to names, is transformers' own."""
    values = value.values() if isinstance(value, dict) else [value]
    return all(one is None or (isinstance(one, str) and one in ATTENTIONS) for one in values)


def _read(path: Path) -> Any:
    if path.stat().st_size > MOST_BYTES:
        raise BadData(f"{path} has {path.stat().st_size / 1e6:.0f} MB, too much for settings. Fetch the model again.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadData(f"{path} is broken ({error}). Fetch it again.") from None


def _settings(value: Any) -> Iterator[tuple[str, Any]]:
    """Every name with its value, however deep."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield from one.items()
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
