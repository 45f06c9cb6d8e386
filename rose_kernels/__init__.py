"""Operators of the editing engine on plain tensors. This package knows no model, no tokenizer and no file."""
