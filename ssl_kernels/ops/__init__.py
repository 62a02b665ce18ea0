"""The spine of each operation: schema, fake kernel, autograd. One file per operation, named as everywhere."""
