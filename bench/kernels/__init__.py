"""Benchmarks of the operators, one file an operator, against plain PyTorch and torch.compile, with the floor beside the time."""
