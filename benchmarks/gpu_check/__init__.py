"""Checks that every backend is right on a GPU: ``python -m benchmarks.gpu_check``. Needs torch and Triton alone.

Compares each backend of the device with ``sipo_kernels/reference.py`` in float64, checks the contract of
``docs/architecture.md``, and runs NVIDIA's compute-sanitizer where that is installed.

    __main__.py          the command: build, run, report
    child_processes.py   runs checks in processes of their own, so that a crash ends one check only
    child.py             what such a process does
    all_checks.py        the complete list of checks
    context.py           what a check is made of: comparisons, budgets, poisoned memory
    values.py            types, sizes, methods, inputs, golden values, real shapes
    calls.py             layouts, broken pairs, autograd, repetition, autocast, torch.compile
    device.py            memory, launches, waiting, graphs, streams, more than 2^31 elements
    sanitizer.py         compute-sanitizer over a few small cases
    faults.py            backends that are wrong on purpose (wrong_results.py, wrong_use.py); checks must catch them
"""
