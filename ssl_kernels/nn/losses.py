"""Losses as modules: each holds the arguments of the function it names."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ssl_kernels import losses

if TYPE_CHECKING:
    from ssl_kernels.nn.queue import MoCoQueue


class Loss(nn.Module):
    """Holds a loss function's options as attributes of their names.

    An `nn.Parameter` among them is learned; one without dimensions gets the shape (1,), as `fully_shard` demands, and
    checkpoints in which it has none load. Any other tensor is a buffer: it moves with the module and is in its
    `state_dict`. Where a `state_dict` does not have it, the module's own stays. A subclass names the options and their
    defaults in `__init__` and passes `self.options` on in `forward`.
    """

    _names = ()

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._names = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)

    def __setattr__(self, name, value):
        if isinstance(value, nn.Parameter) and value.dim() == 0:
            value.data = value.data.reshape(1)  # the caller's own, which an optimizer may hold
        if name in self._names and name not in self._parameters:
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                self.__dict__.pop(name, None)
                self.register_buffer(name, value)
                return
            self._buffers.pop(name, None)
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name, buffer in self._buffers.items():
            state_dict.setdefault(prefix + name, buffer)  # in the copy that load_state_dict made
        for name, own in (*self._parameters.items(), *self._buffers.items()):
            value = state_dict.get(prefix + name)
            if value is not None and value.numel() == own.numel() == 1:
                state_dict[prefix + name] = value.reshape(own.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def options_with(self, **given: Any) -> dict[str, Any]:
        """The options, those of `given` that are not None in the place of the module's own."""
        return self.options | {name: value for name, value in given.items() if value is not None}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items() if name != "backend")


class MoCoLoss(Loss):
    """`ssl_kernels.moco_loss` as a module: `MoCoLoss(temperature=0.07)(query, key, queue)`.

    The queue is an argument and no part of the module: an `nn.MoCoQueue`, a tensor, or None for MoCo v3's loss.

    Args:
        temperature: > 0, a float, a tensor of one element, or an `nn.Parameter` to learn it.
        normalize, symmetric, reduction, backend: As in `moco_loss`.
    """

    def __init__(
        self,
        temperature: float | torch.Tensor = 0.07,
        *,
        normalize: bool = True,
        symmetric: bool = False,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature,
            normalize=normalize,
            symmetric=symmetric,
            reduction=reduction,
            backend=backend,
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        queue: "MoCoQueue | torch.Tensor | None" = None,
        *,
        ids: torch.Tensor | None = None,
        queue_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return losses.moco_loss(query, key, queue, ids=ids, queue_ids=queue_ids, **self.options)


class NTXentLoss(Loss):
    """`ssl_kernels.nt_xent_loss` as a module: `NTXentLoss(temperature=0.5)(z0, z1)`.

    Args:
        temperature: > 0, a float, a tensor of one element, or an `nn.Parameter` to learn it.
        normalize, reduction, backend: As in `nt_xent_loss`.
    """

    def __init__(
        self,
        temperature: float | torch.Tensor = 0.5,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(temperature=temperature, normalize=normalize, reduction=reduction, backend=backend)

    def forward(
        self,
        z0: torch.Tensor,
        z1: torch.Tensor,
        *,
        ids: torch.Tensor | None = None,
        row_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return losses.nt_xent_loss(z0, z1, ids=ids, row_weights=row_weights, **self.options)


class InfoNCELoss(Loss):
    """`ssl_kernels.info_nce_loss` as a module: `InfoNCELoss(temperature=0.1)(query, positive_key, negative_keys)`.

    Args:
        temperature: > 0, a float, a tensor of one element, or an `nn.Parameter` to learn it.
        reduction, negative_mode, symmetric, normalize, backend: As in `info_nce_loss`.
    """

    def __init__(
        self,
        temperature: float | torch.Tensor = 0.1,
        reduction: str = "mean",
        negative_mode: str = "unpaired",
        *,
        symmetric: bool = False,
        normalize: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature,
            reduction=reduction,
            negative_mode=negative_mode,
            symmetric=symmetric,
            normalize=normalize,
            backend=backend,
        )

    def forward(
        self,
        query: torch.Tensor,
        positive_key: torch.Tensor,
        negative_keys: torch.Tensor | None = None,
        *,
        query_ids: torch.Tensor | None = None,
        key_ids: torch.Tensor | None = None,
        row_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return losses.info_nce_loss(
            query,
            positive_key,
            negative_keys,
            query_ids=query_ids,
            key_ids=key_ids,
            row_weights=row_weights,
            **self.options,
        )


class CLIPLoss(Loss):
    """`ssl_kernels.clip_loss` as a module: `CLIPLoss(scale)(image_features, text_features)`.

    A scale given at the call, `CLIPLoss()(image_features, text_features, logit_scale)`, goes before the module's own.

    Args:
        logit_scale: A float, a tensor of one element, or an `nn.Parameter` to learn it. The paper learns the logarithm
            of the scale: give its exponential at the call for that.
        label_smoothing, normalize, reduction, backend: As in `clip_loss`.
    """

    def __init__(
        self,
        logit_scale: float | torch.Tensor = 1 / 0.07,
        *,
        label_smoothing: float = 0.0,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(
            logit_scale=logit_scale,
            label_smoothing=label_smoothing,
            normalize=normalize,
            reduction=reduction,
            backend=backend,
        )

    def forward(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: float | torch.Tensor | None = None,
        *,
        ids: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        row_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return losses.clip_loss(
            image_features,
            text_features,
            ids=ids,
            image_index=image_index,
            row_weights=row_weights,
            **self.options_with(logit_scale=logit_scale),
        )


class SupConLoss(Loss):
    """`ssl_kernels.sup_con_loss` as a module: `SupConLoss(temperature=0.07)(features, labels)`.

    Args:
        temperature: > 0, a float, a tensor of one element, or an `nn.Parameter` to learn it.
        unlabelled, normalize, reduction, backend: As in `sup_con_loss`.
    """

    def __init__(
        self,
        temperature: float | torch.Tensor = 0.07,
        *,
        unlabelled: int | None = None,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature,
            unlabelled=unlabelled,
            normalize=normalize,
            reduction=reduction,
            backend=backend,
        )

    def forward(
        self,
        features: torch.Tensor,
        labels: torch.Tensor | None,
        *,
        positives: torch.Tensor | None = None,
        row_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return losses.sup_con_loss(
            features, labels, positives=positives, row_weights=row_weights, **self.options
        )


class DCLLoss(Loss):
    """`ssl_kernels.dcl_loss` as a module: `DCLLoss(temperature=0.1)(z0, z1)`.

    Args:
        temperature: > 0, a float, a tensor of one element, or an `nn.Parameter` to learn it.
        normalize, reduction, backend: As in `dcl_loss`.
    """

    def __init__(
        self,
        temperature: float | torch.Tensor = 0.1,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(temperature=temperature, normalize=normalize, reduction=reduction, backend=backend)

    def forward(
        self, z0: torch.Tensor, z1: torch.Tensor, *, row_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        return losses.dcl_loss(z0, z1, row_weights=row_weights, **self.options)


class DebiasedNTXentLoss(Loss):
    """`ssl_kernels.debiased_nt_xent_loss` as a module: `DebiasedNTXentLoss(positive_prior=0.1)(z0, z1)`.

    Args:
        temperature: > 0, a float, a tensor of one element, or an `nn.Parameter` to learn it.
        positive_prior, normalize, reduction, backend: As in `debiased_nt_xent_loss`.
    """

    def __init__(
        self,
        temperature: float | torch.Tensor = 0.5,
        *,
        positive_prior: float = 0.1,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature,
            positive_prior=positive_prior,
            normalize=normalize,
            reduction=reduction,
            backend=backend,
        )

    def forward(
        self, z0: torch.Tensor, z1: torch.Tensor, *, row_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        return losses.debiased_nt_xent_loss(z0, z1, row_weights=row_weights, **self.options)


class IMixLoss(Loss):
    """`ssl_kernels.imix_loss` as a module: `IMixLoss(temperature=0.2)(query, key, permutation, lam)`.

    Args:
        temperature: > 0, a float, a tensor of one element, or an `nn.Parameter` to learn it.
        normalize, reduction, backend: As in `imix_loss`.
    """

    def __init__(
        self,
        temperature: float | torch.Tensor = 0.2,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(temperature=temperature, normalize=normalize, reduction=reduction, backend=backend)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        permutation: torch.Tensor,
        lam: float | torch.Tensor,
        *,
        negative_keys: torch.Tensor | None = None,
        row_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return losses.imix_loss(
            query, key, permutation, lam, negative_keys=negative_keys, row_weights=row_weights, **self.options
        )


class TripletMarginLoss(Loss):
    """`ssl_kernels.triplet_margin_loss` as a module: `TripletMarginLoss(margin=0.2)(anchor, positive, negative)`.

    Args:
        margin, distance, normalize, reduction, backend: As in `triplet_margin_loss`.
    """

    def __init__(
        self,
        margin: float | torch.Tensor = 0.2,
        *,
        distance: str = "euclidean",
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(
            margin=margin, distance=distance, normalize=normalize, reduction=reduction, backend=backend
        )

    def forward(self, anchor: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        return losses.triplet_margin_loss(anchor, positive, negative, **self.options)


class BYOLLoss(Loss):
    """`ssl_kernels.byol_loss` as a module: `BYOLLoss()(prediction, target)`.

    Args:
        normalize, reduction, backend: As in `byol_loss`.
    """

    def __init__(
        self, *, normalize: bool = True, reduction: str = "mean", backend: str | None = None
    ) -> None:
        super().__init__(normalize=normalize, reduction=reduction, backend=backend)

    def forward(
        self, prediction: torch.Tensor, target: torch.Tensor, *, row_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        return losses.byol_loss(prediction, target, row_weights=row_weights, **self.options)


class SigLIPLoss(Loss):
    """`ssl_kernels.siglip_loss` as a module: `SigLIPLoss(scale, bias)(image_features, text_features)`.

    What is given at the call, `SigLIPLoss()(image_features, text_features, scale, bias)`, goes before the module's own.

    Args:
        logit_scale, logit_bias: A float, a tensor of one element, or an `nn.Parameter` to learn it. The paper learns
            the logarithm of the scale: give its exponential at the call for that.
        normalize, reduction, backend: As in `siglip_loss`.
    """

    def __init__(
        self,
        logit_scale: float | torch.Tensor = 10.0,
        logit_bias: float | torch.Tensor = -10.0,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(
            logit_scale=logit_scale,
            logit_bias=logit_bias,
            normalize=normalize,
            reduction=reduction,
            backend=backend,
        )

    def forward(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: float | torch.Tensor | None = None,
        logit_bias: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        options = self.options_with(logit_scale=logit_scale, logit_bias=logit_bias)
        return losses.siglip_loss(image_features, text_features, **options)


class TripletLoss(Loss):
    """`ssl_kernels.triplet_loss` as a module: `TripletLoss(margin=0.2)(embeddings, labels)`.

    Args:
        margin: >= 0, a float, a tensor of one element, an `nn.Parameter` to learn it, or "soft".
        mining, distance, normalize, reduction, backend: As in `triplet_loss`.
    """

    def __init__(
        self,
        margin: float | torch.Tensor | str = 0.2,
        *,
        mining: str = "batch_hard",
        distance: str = "euclidean",
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(
            margin=margin,
            mining=mining,
            distance=distance,
            normalize=normalize,
            reduction=reduction,
            backend=backend,
        )

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return losses.triplet_loss(embeddings, labels, **self.options)
