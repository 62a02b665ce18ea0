"""Runs a program that makes attempts, and goes on behind one at which its process dies, hangs or loses the GPU.

`python -m benchmarks.card.guard SECONDS PROGRAM...` starts the program with `--first NUMBER --progress FD`: it makes
its attempts from that number on, and writes a line "number<tab>section<tab>name" to the file descriptor before each.
The process of an attempt that takes more than SECONDS is ended. That, or how the process died, is printed as a finding,
as `probe` prints them.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time

# The program's exit code when a failed attempt, of which it has told, left the GPU's context unusable.
LOST = 75
MOST_DEATHS = 12


def main(argv):
    """0 if all attempts were made in one process; 1 if more were needed, or one of them ended before its first."""
    limit, command = float(argv[0]), argv[1:]
    first, deaths = 0, 0
    while True:
        attempt, code = _run(command, first, limit)
        if code == 0:
            return int(deaths > 0)
        if attempt is None:  # it died before its first attempt, and would again
            return 1
        number, section, name = attempt
        if code != LOST:
            print(
                json.dumps({"section": section, "name": name, "error": _what_happened(code, limit)}),
                flush=True,
            )
        first, deaths = number + 1, deaths + 1
        if deaths == MOST_DEATHS:
            return 1


def _run(command, first, limit):
    """The last attempt (number, section, name), or None without one, and the exit code: "hung" where it was ended."""
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [*command, "--first", str(first), "--progress", str(writing)], pass_fds=[writing]
    )
    os.close(writing)
    attempt, begun, text = None, time.monotonic(), b""
    with os.fdopen(reading, "rb", buffering=0) as progress:
        while True:
            # Before the first attempt the program is loading, for which there is no limit but that of the stage.
            left = None if attempt is None else max(0.0, begun + limit - time.monotonic())
            if not select.select([progress], [], [], left)[0]:
                process.kill()
                _wait(process)
                return attempt, "hung"
            received = progress.read(65536)
            if not received:
                break
            *lines, text = (text + received).split(b"\n")
            if lines:
                number, section, name = lines[-1].decode().split("\t")
                attempt, begun = (int(number), section, name), time.monotonic()
    return attempt, _wait(process)


def _wait(process):
    try:
        return process.wait(20)
    except subprocess.TimeoutExpired:  # a driver may hold what waits for a kernel
        process.kill()
        return "hung"


def _what_happened(code, limit):
    if code == "hung":
        return f"its process was ended after {limit:.0f} s"
    if code < 0:
        return f"its process died of {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
