"""What is wrong with a recipe, one line a fault: the setting's path, the fault, the name that was probably meant."""

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from typing import Any, get_args

OTHER_NAMES = {  # that other programs have for settings
    "lr": "optimizer.learning_rate",
    "wd": "optimizer.weight_decay",
    "warmup": "optimizer.warmup_steps",
    "gradient_clip": "optimizer.max_grad_norm",
    "max_steps": "training.steps",
    "epochs": "training.steps",
    "max_epoch": "training.steps",
    "gradient_accumulation_steps": "training.accumulation",
    "amp": "training.precision",
    "dtype": "training.precision",
    "llm": "model.language",
    "workers": "data.num_workers",
    "dataset": "data.mixture.0.source",
}


def explain(error: Any, known: Sequence[str]) -> str:
    """One line about one of pydantic's errors.

    Args:
        error: as `ValidationError.errors()` gives it.
        known: paths of all settings.
    """
    path = ".".join(str(part) for part in error["loc"] if not str(part).startswith("<"))  # marks of branches
    match error["type"]:
        case "unexpected_keyword_argument":
            return f"{path} is no setting{hint_at_setting(path, known)}"
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return f"{path} is missing and has no default."
        case "value_error":
            return f"{path}: {error['ctx']['error']}." if path else f"{error['ctx']['error']}."
        case "dataclass_type":
            return f"{path} is {error['input']!r}: it should hold settings of its own."
        case _:
            return f"{path} is {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}."


def hint_at_setting(path: str, known: Sequence[str]) -> str:
    """The end of a sentence: the same name in another section, else a like path, else just a full stop."""
    last = path.rpartition(".")[2]
    if last in OTHER_NAMES:
        return f"; did you mean {OTHER_NAMES[last]}?"
    elsewhere = [name for name in known if name.rpartition(".")[2] == last]
    return f"; did you mean {elsewhere[0]}?" if elsewhere else hint(path, known)


def hint(name: str, known: Sequence[str]) -> str:
    """The end of a sentence that names the nearest known name, or just a full stop."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else "."


def setting_paths(section: Any, prefix: str = "") -> Iterator[str]:
    """Paths of all settings below a section, such as optimizer.learning_rate and data.mixture.0.split."""
    for name, field in section.__pydantic_fields__.items():
        if dataclasses.is_dataclass(field.annotation):
            yield from setting_paths(field.annotation, f"{prefix}{name}.")
            continue
        yield f"{prefix}{name}"
        for item in _within(field.annotation):
            if isinstance(item, type) and dataclasses.is_dataclass(item):
                yield from setting_paths(item, f"{prefix}{name}.0.")


def _within(annotation: Any) -> Iterator[Any]:
    """All that a type is made of."""
    for part in get_args(annotation):
        yield part
        yield from _within(part)
