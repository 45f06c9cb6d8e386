"""Readers of the field's data sets. Each validates what it reads and names file and record in its errors."""
