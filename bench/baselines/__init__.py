"""Other editors, as their authors describe them, in plain PyTorch: what the engine is measured against."""
