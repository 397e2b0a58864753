"""Correctness on a GPU in one command: ``python -m benchmarks.gpu_check``. Needs torch and Triton alone.

Each backend of the device is held to ``sipo_kernels/reference.py`` in float64, to the properties of the contract
(``docs/architecture.md``), and to NVIDIA's compute-sanitizer where that is installed.

    context.py     what a check is made of: the list of checks, budgets, poisoned memory
    values.py      types, sizes, methods, inputs, golden values, real shapes
    calls.py       layouts, broken pairs, autograd, repetition, autocast, torch.compile
    device.py      memory, launches, waiting, graphs, streams, more than 2^31 elements
    sanitizer.py   compute-sanitizer over a few small cases
    faults.py      backends that are wrong on purpose (wrong_results.py, wrong_use.py), which the checks must catch
    processes.py   runs checks in processes of their own, so that one crash ends one check
    __main__.py    the command: build, run, report
"""
