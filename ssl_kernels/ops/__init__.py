"""The spine of each operation: schema, fake kernel, autograd. One file an operation, named as everywhere."""
