"""A first look at a GPU: one command that finds the most in a few minutes. `make card` runs it."""
