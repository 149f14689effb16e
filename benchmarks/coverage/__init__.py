"""The model zoo and its three gates: does a pruned network of every family run, compute what it must, and export?

    python -m benchmarks.coverage [--only PATTERN] [--list] [--gates 123] [--again] [--seconds-per-model 300]
    python -m benchmarks.coverage.peers [--only PATTERN]

Run from the repository's root, with the extras `vision`, `onnx` and `dev` installed (`peers` also needs
`torch-pruning==1.6.1`). Every model runs in a fork of one process; its row is appended to
benchmarks/results/coverage.jsonl, and a second run goes on where the first one stopped. With COVERAGE_PLANS=1 in the
environment one random plan is run in float64 instead of three.
"""
