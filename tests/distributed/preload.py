"""What the processes of the tests share: imported once, before they are forked."""

import torch.distributed.fsdp
import torch.distributed.tensor  # noqa: F401

import ssl_kernels.distributed  # noqa: F401
import tests.distributed.cases  # noqa: F401
