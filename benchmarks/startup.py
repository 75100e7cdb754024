"""How long imports and the command take to start, beside diffusers' own import.

Fresh processes, one of each in turn, so that what else the machine does falls on all alike.

    python -m benchmarks.startup
"""

import argparse
import statistics
import subprocess
import sys
import time

RUNS = {
    "import torch": ("-c", "import torch"),
    "import diffusers": ("-c", "import diffusers"),
    "import diffusion_attn": ("-c", "import diffusion_attn"),
    "import diffusion_attn.editing": ("-c", "import diffusion_attn.editing"),
    "import diffusion_attn.pipelines": ("-c", "import diffusion_attn.pipelines"),
    "diffusion-attn --help": ("-m", "diffusion_attn", "--help"),
    "diffusion-attn --version": ("-m", "diffusion_attn", "--version"),
}


def main() -> None:
    """Print the median of each and its ratio to ``import diffusers``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    times: dict[str, list[float]] = {name: [] for name in RUNS}
    for _ in range(parser.parse_args().repeats):
        for name, arguments in RUNS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            times[name].append(time.perf_counter() - began)
    base = statistics.median(times["import diffusers"])
    print("| what | seconds | by import diffusers |\n|---|---:|---:|")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"| {name} | {median:.2f} | {median / base:.2f} |")


if __name__ == "__main__":
    main()
