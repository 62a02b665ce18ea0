"""Measure operations against what people use today: print tables, store them with the machine, draw curves.

Each operation is a module bench_<op>.py of this folder. Results go to <out>/<machine>/<op>.csv, with the
tables as .md and the curves as .png beside it; options other than the defaults become part of the name.
"""

import argparse
import importlib
import pathlib
import pkgutil
import sys
import time

import torch

import benchmarks
from benchmarks import harness, machine, results

FOLDER = pathlib.Path(__file__).resolve().parent
QUICK = harness.Budget(seconds=1.0, least_rounds=3)
FULL = harness.Budget(seconds=10.0, least_rounds=7)
DTYPES = ("float64", "float32", "float16", "bfloat16")


def operations():
    """The operations that have a benchmark."""
    modules = [module.name for module in pkgutil.iter_modules(benchmarks.__path__)]
    return [name.removeprefix("bench_") for name in modules if name.startswith("bench_")]


def add_arguments(parser):
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(operations())}; all without any")
    parser.add_argument("--quick", action="store_true", help="few sizes, few rounds: well under a minute")
    parser.add_argument("--out", type=pathlib.Path, default=FOLDER / "results", help="folder (%(default)s)")
    parser.add_argument(
        "--show", type=pathlib.Path, metavar="CSV", help="show a stored result, measure nothing"
    )
    parser.add_argument("--batch-sizes", type=size, nargs="+", metavar="B", help="instead of the usual ones")
    parser.add_argument("--dim", type=size, help="width of the embeddings, instead of the usual one")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the inputs (%(default)s)")
    parser.add_argument("--threads", type=size, help="CPU threads, instead of torch's choice")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="(%(default)s)")


def size(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def file_stem(op, options):
    """The operation, and what of `options` is not the default."""
    parts = [op]
    if options.dim:
        parts.append(f"dim{options.dim}")
    if options.dtype != "float32":
        parts.append(options.dtype)
    if options.threads:
        parts.append(f"threads{options.threads}")
    if options.batch_sizes:
        parts.append("batch" + "_".join(map(str, sorted(options.batch_sizes))))
    if options.quick:
        parts.append("quick")
    return "-".join(parts)


def run_operation(op, options):
    """Measure and store one operation; the names of implementations that were refused."""
    module = importlib.import_module(f"benchmarks.bench_{op}")
    here = machine.describe_machine(options.device)
    print(f"{op} on {machine.machine_line(here)}", flush=True)
    records, faults = [], []
    for make_workload in module.workloads(options):
        start = time.perf_counter()
        case = harness.admit(make_workload(), machine.free_memory(options.device))
        record = harness.measure(case, QUICK if options.quick else getattr(module, "BUDGET", FULL))
        records.append(record)
        faults += case.faults
        print(f"  {progress(record)}  ({time.perf_counter() - start:.0f} s)", flush=True)
    settings = {name: getattr(options, name) for name in ("quick", "batch_sizes", "dim", "threads", "device")}
    settings["dtype"] = str(options.dtype).removeprefix("torch.")
    record = results.make_record(op, settings, here, records)
    path = results.write_record(record, options.out, file_stem(op, argparse.Namespace(**settings)))
    print(f"\nwrote {path} and its .md")
    show(record, path)
    return faults


def progress(record):
    """One line on a measured case."""
    sizes = ", ".join(f"{name} = {value}" for name, value in record["sizes"].items())
    entries = record["implementations"].items()
    times = ", ".join(f"{name} {1e3 * entry['step_seconds']['median']:.3g}" for name, entry in entries)
    return f"{record['loss']} {sizes}: ms {times}"


def show(record, path):
    """Print the tables of `record` and draw its curves beside `path`."""
    print(f"\n{results.format_record(record)}\n")
    try:
        from benchmarks.figures import draw_record
    except ImportError as error:
        print(f"no figure: {error}")
        return
    if figure := draw_record(record, path.with_suffix("")):
        print(f"wrote {figure}")


def main(argv=None):
    """Run what `argv` asks for, and return the exit code of `run`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return run(parser.parse_args(argv), parser)


def run(options, parser):
    """Measure what `options` ask for; the exit code, 1 if an implementation was refused."""
    unknown = [op for op in options.ops if op not in operations()]
    if unknown:
        parser.error(f"op must be one of {', '.join(operations())}, got {', '.join(unknown)}")
    if options.show:
        show(results.read_record(options.show), options.show)
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    options.dtype = getattr(torch, options.dtype)
    faults = [name for op in options.ops or operations() for name in run_operation(op, options)]
    if faults:
        print(f"refused: {', '.join(sorted(set(faults)))}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
