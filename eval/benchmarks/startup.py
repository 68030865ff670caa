"""How long `rankdistill --help` takes in a fresh process, and what it imports.

python eval/benchmarks/startup.py
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time

from rankdistill.artifacts import write_atomically

ENTRY = "from rankdistill.cli.main import main; main()"
HEAVY = ("torch", "transformers", "sentence_transformers", "faiss", "pyarrow", "scipy", "numpy", "pydantic", "rich")
VERBS = (["--help"], ["run", "--help"], ["--version"], ["recipes", "list"])


def seconds(arguments: list[str]) -> float:
    """Wall time of one process that does nothing but these arguments."""
    began = time.perf_counter()
    # Our own argument list, no shell.
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def imported(verb: list[str]) -> list[tuple[str, float]]:
    """(package, milliseconds in its own modules) of every imported package, slowest first."""
    command = [sys.executable, "-X", "importtime", "-c", ENTRY, *verb]
    trace = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spent: dict[str, float] = {}
    for line in trace.splitlines():
        fields = line.removeprefix("import time:").split("|")
        if len(fields) == 3 and fields[0].strip().isdigit():
            package = fields[2].strip().split(".")[0]
            spent[package] = spent.get(package, 0.0) + int(fields[0]) / 1000
    return sorted(spent.items(), key=lambda item: -item[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", default="eval/results/startup.md")
    options = parser.parse_args()
    commands = {"python -c pass": ["-c", "pass"]}
    commands |= {f"rankdistill {' '.join(verb)}": ["-c", ENTRY, *verb] for verb in VERBS}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for arguments in commands.values():
        seconds(arguments)  # compiles .pyc files and fills the page cache
    for _ in range(options.rounds):  # in turns, so that the machine's drift hits all
        for name, arguments in commands.items():
            times[name].append(seconds(arguments))
    lines = [
        "# Start-up",
        "",
        f"`python {' '.join(sys.argv)}` on {platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python "
        f"{platform.python_version()}; {options.rounds} fresh processes each, in turns, after one to warm the disk "
        "cache. Target: `--help` below 0.5 s, aim 0.3 s.",
        "",
        "| command | median, s | fastest, s | slowest, s | slow packages imported |",
        "|---|---:|---:|---:|---|",
    ]
    for name, found in times.items():
        verb = name.split()[1:] if name.startswith("rankdistill") else None
        packages = {package for package, _ in imported(verb)} if verb else set()
        heavy = ", ".join(package for package in HEAVY if package in packages) or "none"
        lines.append(f"| `{name}` | {statistics.median(found):.3f} | {min(found):.3f} | {max(found):.3f} | {heavy} |")
    slowest = ", ".join(f"{package} {spent:.0f}" for package, spent in imported(["--help"])[:8])
    lines += ["", f"Milliseconds in the slowest packages of `--help` (traced, which slows them): {slowest}.", ""]
    text = "\n".join(lines)
    print(text)
    write_atomically(options.out, text)


if __name__ == "__main__":
    main()
