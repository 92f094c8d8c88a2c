"""The engine: per operation a reference in PyTorch, which is its specification, and one entry that dispatches."""
