"""The losses over a process group as modules."""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch

from ssl_kernels import nn
from ssl_kernels.distributed import labelled, losses
from ssl_kernels.distributed.moco import moco_loss


class _OverRanks:
    """Hands what `forward` of the plain module takes to the loss over the ranks, with the module's options.

    Args:
        group, strategy, check, rows_per_rank: As in the functions of `ssl_kernels.distributed`.
    """

    def __init__(
        self,
        *args: Any,
        group: Any = None,
        strategy: str | None = None,
        check: bool = True,
        rows_per_rank: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.over = {
            "group": group,
            "strategy": strategy,
            "check": check,
            "rows_per_rank": rows_per_rank,
        }

    def __init_subclass__(cls):
        plain = cls.__mro__[2]
        parameters = tuple(inspect.signature(plain.forward).parameters.values())[1:]
        cls._arguments = tuple(each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD)
        cls.__doc__ = f"""`ssl_kernels.distributed.{cls.function.__name__}` as a module.

    Takes what `nn.{plain.__name__}` takes, and group, strategy, check and rows_per_rank as the function does.
    """

    def forward(self, *args: Any, **keywords: Any) -> torch.Tensor:
        if len(args) > len(self._arguments):
            raise TypeError(
                f"{type(self).__name__}: at most {len(self._arguments)} tensors may be given without a name,"
                f" got {len(args)}"
            )
        given = dict(zip(self._arguments, args, strict=False)) | keywords
        named = {name: value for name, value in given.items() if name not in self._names}
        own = self.options_with(**{name: given[name] for name in given.keys() & set(self._names)})
        return type(self).function(**named, **own, **self.over)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy over the same process group, which is the process's own and refuses to be copied."""
        group = self.over["group"]
        if group is not None:
            memo[id(group)] = group
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        return copied

    def extra_repr(self):
        strategy = self.over["strategy"]
        return super().extra_repr() + (f", strategy={strategy!r}" if strategy else "")


class NTXentLoss(_OverRanks, nn.NTXentLoss):
    function = staticmethod(losses.nt_xent_loss)


class InfoNCELoss(_OverRanks, nn.InfoNCELoss):
    function = staticmethod(losses.info_nce_loss)


class MoCoLoss(_OverRanks, nn.MoCoLoss):
    function = staticmethod(moco_loss)


class CLIPLoss(_OverRanks, nn.CLIPLoss):
    function = staticmethod(losses.clip_loss)


class SigLIPLoss(_OverRanks, nn.SigLIPLoss):
    function = staticmethod(losses.siglip_loss)


class SupConLoss(_OverRanks, nn.SupConLoss):
    function = staticmethod(labelled.sup_con_loss)


class DCLLoss(_OverRanks, nn.DCLLoss):
    function = staticmethod(losses.dcl_loss)


class DebiasedNTXentLoss(_OverRanks, nn.DebiasedNTXentLoss):
    function = staticmethod(losses.debiased_nt_xent_loss)


class BYOLLoss(_OverRanks, nn.BYOLLoss):
    function = staticmethod(losses.byol_loss)


class TripletLoss(_OverRanks, nn.TripletLoss):
    function = staticmethod(labelled.triplet_loss)
