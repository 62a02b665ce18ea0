"""Print what is built, for what, and which backends can run here, with the reason where one cannot."""

import platform

import torch

import ssl_kernels
from ssl_kernels import backends


def add_arguments(parser):
    """This command has no options."""


def run(args, parser):
    """Print the report; returns 0."""
    print(
        f"ssl_kernels {ssl_kernels.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    )
    if backends.extension is None:
        print(f"extension: {backends.extension_missing}")
    else:
        built = backends.extension.build_info()
        architectures = built["cuda_architectures"] or "none"
        print(f"extension: built with torch {built['torch']} and compiler {built['compiler']}")
        print(f"CPU kernels: {built['cpu_instruction_set']}, {torch.get_num_threads()} threads")
        products = "in TF32" if backends.extension.allow_tf32() else "exact"
        print(f"CUDA kernels: {architectures}; float32 products {products}")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            print(f"cuda:{index}: {torch.cuda.get_device_name(index)}, sm_{major}{minor}")
    else:
        print("no CUDA device")
    for device in devices:
        rows = torch.zeros(2, 128, device=device)
        for operation in backends.operations():
            print(f"\n{operation} on {device}, float32, D = 128:")
            for name, reason in backends.backends_for(operation, rows).items():
                print(f"  {name:<10} {reason or 'can run'}")
            if device == "cuda":
                print("  first {}: {}".format(*backends.preferred(operation, rows)))
    return 0
