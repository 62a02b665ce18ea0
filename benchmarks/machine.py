"""The machine and the versions that a number belongs to."""

import os
import pathlib
import platform
import re
import subprocess

import torch

import ssl_kernels
from ssl_kernels.backends import extension

CHECKOUT = pathlib.Path(__file__).resolve().parent.parent


def describe_machine(device):
    """A record of this machine, ready for JSON."""
    gpu = torch.device(device).type == "cuda"
    commit, modified = git_state()
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "instruction_set": extension.build_info()["cpu_instruction_set"] if extension else None,
        "gpu": torch.cuda.get_device_name(device) if gpu else None,
        "memory_bytes": total_memory(),
        "load_average": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ssl_kernels": ssl_kernels.__version__,
        "commit": commit,
        "modified": modified,
    }


def machine_slug(machine):
    """The machine as the name of a folder: "amd-epyc-2-cores-avx512", or the GPU's name."""
    name = machine["gpu"] or f"{machine['cpu']} {machine['cores']} cores {machine['instruction_set'] or ''}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def machine_line(machine):
    """The machine in one sentence."""
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB"
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    cpu = f"{machine['cpu']}, {machine['cores']} cores, {threads}"
    parts = [machine["gpu"], cpu, machine["instruction_set"], memory, f"torch {machine['torch']}"]
    version = f"ssl_kernels {machine['ssl_kernels']}"
    if machine["commit"]:
        version += f" at {machine['commit'][:9]}{' with changes' if machine['modified'] else ''}"
    return ", ".join(part for part in (*parts, version) if part)


def cpu_name():
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def usable_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def total_memory():
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory(device):
    """Bytes that can still be allocated on `device`."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return 1024 * int(line.split()[1])
    return total_memory()


def git_state():
    """(commit, whether tracked files differ from it), or (None, None) outside a git checkout."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None, None
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return commit, bool(changes)


def _git(*args):
    try:
        result = subprocess.run(["git", *args], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
