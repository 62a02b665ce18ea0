"""Manifold mixup: the hidden features of one layer mixed inside a model."""

import torch

from ssl_kernels.nn.draws import DrawingModule
from ssl_kernels.nn.mixing import Mixup

_OPTIONS = {"prob", "mode", "pairing", "label_smoothing", "num_classes", "dense_target", "backend"}


class ManifoldMixup(DrawingModule):
    """A model with the hidden features of one layer mixed, the layer drawn anew each call.

        model = ManifoldMixup(resnet, ["layer1", "layer2"], alpha=2.0, num_classes=10)
        logits, target = model(images, target)
        loss = F.cross_entropy(logits, target)

    In evaluation mode the model runs as it is. The layer is drawn on the host, everything else as `Mixup` draws it.

    Args:
        module: The model, called with one batch.
        layers: Names of submodules, as in `module.named_modules()`, whose outputs (B, ...) may be mixed.
        alpha: λ is drawn from Beta(alpha, alpha), > 0.
        mix_input: The input counts as one more layer.
        generator: As in `Mixup`; the layer is drawn from one of its own on the CPU with the same seed.
        **options: Of `Mixup`: prob, mode, pairing, label_smoothing, num_classes, dense_target, backend.

    Raises:
        TypeError: An option that is none of these.
        ValueError: No layers, a name that the module does not have, an option outside its range.

    Source: Verma et al., Manifold Mixup, arXiv:1806.05236.
    """

    def __init__(self, module, layers, alpha=2.0, *, mix_input=True, generator=None, **options):
        names = {name for name, _ in module.named_modules() if name}
        unknown = [name for name in layers if name not in names]
        if unknown:
            raise ValueError(f"ManifoldMixup: layers must be submodules of module, got {unknown}")
        other = options.keys() - _OPTIONS
        if other:
            raise TypeError(f"ManifoldMixup: options must be of {sorted(_OPTIONS)}, got {sorted(other)}")
        if not layers and not mix_input:
            raise ValueError("ManifoldMixup: layers must not be empty without mix_input, got []")
        mixup = Mixup(alpha, generator=generator, inplace=False, **options)
        super().__init__(generator.initial_seed() if isinstance(generator, torch.Generator) else generator)
        self.module, self.layers, self.mix_input = module, tuple(layers), mix_input
        self.mixup = mixup

    def forward(self, x, target=None):
        """Run the model with one layer mixed.

        Args:
            x: The batch, (B, ...).
            target: None, (B,) int64 or (B, C) floating.

        Returns:
            The output alone, or (output, mixed target) as `Mixup` returns it.

        Raises:
            TypeError: The chosen layer's output is no floating tensor.
            ValueError: Its first dimension is not B.
        """
        draw = self.mixup.draw(x)
        output = self._run(x, draw) if self.training else self.module(x)
        return output if target is None else (output, self.mixup.mix_target(target, draw))

    def _run(self, x, draw):
        choices = [*[None] * self.mix_input, *self.layers]
        chosen = choices[self._choice()]
        if chosen is None:
            return self.module(self.mixup.mix(x, draw))

        def mix_first_output(_module, _inputs, output):
            hook.remove()  # a layer that runs several times is mixed once
            return self.mixup.mix(output, draw)

        hook = self.module.get_submodule(chosen).register_forward_hook(mix_first_output)
        try:
            return self.module(x)
        finally:
            hook.remove()

    def _choice(self):
        """Which of the input, where it counts, and the layers."""
        place = self.draws.uniform((), torch.device("cpu"), torch.float64)
        return int((len(self.layers) + self.mix_input) * place)
