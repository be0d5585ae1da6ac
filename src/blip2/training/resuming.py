"""What a run must agree with before it goes on from a checkpoint."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blip2.distributed import is_first
from blip2.errors import BadRecipe
from blip2.training import state as checkpoints
from blip2.training.keeper import Mirror
from blip2.training.recipe import differences, recipe_from_settings
from blip2.training.sections import Recipe

FREE_TO_CHANGE = {
    "name",
    "data.num_workers",
    "data.stop_share",
    *(f"training.{name}" for name in "log_every checkpoint_every keep evaluate_every".split()),
    *(f"training.{name}" for name in "best_metric early_stop mirror device strategy hang_seconds".split()),
}


def fetched(run_dir: Path, mirror: str | None) -> list[str]:
    """Brings a newer checkpoint from the mirror; what to say about it."""
    if mirror is None or not is_first():
        return []
    fetched = Mirror(mirror).fetch_newest(run_dir)
    return [f"Fetched {fetched.name} from {mirror}"] if fetched else []


def _as_before(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """What to add to the command for the checkpoint's own settings."""
    pairs = (f"{path}={json.dumps(old, ensure_ascii=False)}" for path, (old, _) in changed.items())
    return " ".join(f"--set {shlex.quote(pair)}" for pair in pairs)


def check_same_recipe(start: Path, recipe: Recipe, run_dir: Path, resume: str | Path) -> list[str]:
    """What to say about settings that changed since the checkpoint.

    Raises:
        BadRecipe: resuming is automatic, and a setting that decides what is learnt has changed.
    """
    try:
        saved = recipe_from_settings(checkpoints.read_state(start)["recipe"], f"{start}/state.json")
    except BadRecipe:
        if resume == "auto":
            raise
        return ["The checkpoint's recipe is of another version of blip2"]
    changed = {path: pair for path, pair in differences(saved, recipe).items() if path not in FREE_TO_CHANGE}
    told = [f"{path} is {new!r} here, {old!r} there" for path, (old, new) in changed.items()]
    if resume == "auto" and set(changed) - {"training.steps", "training.threads"}:
        raise BadRecipe(
            f"{run_dir} holds a run of another recipe: {'; '.join(told)}. Choose another --out, or say "
            f"--resume {start} to go on from it with the new settings, or {_as_before(changed)} to go on as it began."
        )
    return [f"Changed since the checkpoint: {line}" for line in told]
