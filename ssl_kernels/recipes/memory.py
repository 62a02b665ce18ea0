"""Peak memory of a function."""

import json
import os
import pathlib
import tempfile

import torch
from torch.profiler import ProfilerActivity, profile


def peak_memory(function, device="cpu"):
    """Bytes that `function()` has allocated through torch at its worst moment, beyond what was there before.

    On CUDA the allocator's own peak. On the CPU the profiler's record of every allocation of the tensor
    allocator, that of C++ operators included; what they would take from malloc itself is not seen.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it writes its start and stop to stderr otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = pathlib.Path(folder, "trace.json")
        record.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    events = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    if not events:
        return 0
    # The profiler's total goes on counting from earlier profiles.
    before = events[0]["args"]["Total Allocated"] - events[0]["args"]["Bytes"]
    return max(event["args"]["Total Allocated"] for event in events) - before
