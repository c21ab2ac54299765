"""What only a GPU can show: `python -m benchmarks.gpu`.

parts.py     which cases each part runs, and what is concluded from them
case.py      one case: model, text, sizes, budgets      worker.py    one case in a process of its own
ours.py      this engine, watched                        peers.py     DeepSpeed, torchao, MegaTrain, plain PyTorch
exact.py     the reference loop with the model on the device
profiled.py  kernels, copies and waits, from the profiler's events
"""
