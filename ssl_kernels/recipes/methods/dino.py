"""DINO: a student predicts from each crop which prototypes its slow average, the teacher, sees in a view.

The teacher's logits are centred and sharpened, which keeps it from collapse.

Source: Caron et al., arXiv:2104.14294, algorithm 1.
"""

import torch
from torch import nn

from ssl_kernels import dino_loss
from ssl_kernels.nn import DINOCenter, MomentumEncoder
from ssl_kernels.recipes.methods.method import Method
from ssl_kernels.recipes.ranks import gathered


class DINO(Method):
    criterion = staticmethod(dino_loss)
    crops = 2

    def __init__(
        self,
        encoder,
        data,
        *,
        temperature=0.1,
        teacher_temperature=0.04,
        prototypes=256,
        momentum=0.99,
        center_momentum=0.9,
        width=128,
    ):
        super().__init__(encoder, width)
        self.prototypes = nn.Linear(width, prototypes, bias=False)
        self.average = MomentumEncoder(self.online, momentum)
        self.average_prototypes = MomentumEncoder(self.prototypes, momentum)
        self.center = DINOCenter(prototypes, momentum=center_momentum)
        self.temperature, self.teacher_temperature = temperature, teacher_temperature

    def forward(self, batch):
        images = torch.cat(batch.views)
        # Crops of one size go through the network together; the views come last, since they are watched.
        crops = self.online(torch.cat(batch.crops)).chunk(self.crops)
        students = [*self.online(images).chunk(2), *crops]
        teachers = self.average(images).float().chunk(2)
        columns = self.average_prototypes.module.weight
        loss = self.criterion(
            students,
            teachers,
            self.prototypes.weight,
            columns,
            self.temperature,
            self.teacher_temperature,
            center=self.center,
        )
        self.center.update_([gathered(teacher) for teacher in teachers], columns)
        return loss

    def after_step(self):
        super().after_step()
        self.average_prototypes.update_(self.prototypes)
