"""The parts of `examples/benchmark.py`, one module each; `python examples/benchmark.py --help` lists them."""
