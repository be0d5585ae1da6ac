"""How long a user waits for the first caption, on a warm cache, and for `blip2 --help`: whole commands, median of runs.

python benchmarks/first_answer.py --runs 5
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

PICTURE = Path(__file__).parents[1] / "examples" / "pictures" / "photo-cat.jpg"
COMMANDS = {
    "blip2 --help": ["--help"],
    "blip2 caption FILE": ["caption", str(PICTURE)],
    "import transformers": None,  # a yardstick of the machine: Hugging Face alone, before any weights
}


def main() -> None:
    """Prints JSON: seconds by command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(runs + 1):  # alternating; the first round warms the caches and is not counted
        for name, arguments in COMMANDS.items():
            seconds[name].append(_seconds(arguments))
    found = {name: {"median": statistics.median(s[1:]), "all": s[1:]} for name, s in seconds.items()}
    print(
        json.dumps({"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), **found}, indent=1)
    )


def _seconds(arguments: list[str] | None) -> float:
    program = Path(sys.executable)
    if arguments is None:
        command = [
            str(program),
            "-c",
            "import torch; from transformers import LlamaForCausalLM, PreTrainedTokenizerFast",
        ]
    else:
        command = [str(program.with_name("blip2")), *arguments]
    begin = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
