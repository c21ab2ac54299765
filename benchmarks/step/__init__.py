"""Step time, memory and SSD traffic of this engine beside plain PyTorch and DeepSpeed: `python -m benchmarks.step`.

setting.py    what is trained: model, data, batch sizes; the same for every system
plain.py      (a) plain PyTorch in memory      zero.py    (b), (c) DeepSpeed      ours.py    (d), (e) this engine
worker.py     one system in a process of its own, timed from inside
watch.py      that process seen from outside: its memory, its end
compare.py    medians, paired ratios with intervals, the bars
"""
