"""Plain PyTorch streamed in row blocks: the kernels' results on any device, in O(block · M) memory."""
