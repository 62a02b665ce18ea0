"""Measured speed and memory of the operations against what people use today: `python -m benchmarks --help`.

harness     what is measured, and how: agreement, interleaved timing, memory
machine     the machine and the versions a number belongs to
peers       the implementations compared with
results     what is stored, and its tables
figures     the curves
bench_*     one file per operation: its workloads
"""
