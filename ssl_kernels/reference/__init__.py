"""Plain PyTorch, readable first: the definitions that every kernel is held to. Imports torch only."""
