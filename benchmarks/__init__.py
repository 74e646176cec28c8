"""What the operators of mmeff gain over PyTorch's own, measured: `python -m benchmarks kernels`, from a checkout.

Reading order: `cases.py` says what is measured and `suites.py` which cases belong together; `workloads.py` makes tensors
of a case, ours and exact results, `peers.py` what ours is compared with; `gate.py` refuses to time what is wrong; `timing.py`
times two sides alternately, `runner.py` runs a suite and `results.py` keeps its rows; `plots.py` draws them.
"""
