"""Reading what a Plan says: the tensors of a folder, one at a time, onto the device and in the
dtype that was asked for."""

from __future__ import annotations

import functools
import re

import torch
from torch import Tensor, nn

from sparsekern.checkpoint.experts import ExpertReader
from sparsekern.checkpoint.names import Conversion
from sparsekern.checkpoint.plan import Plan
from sparsekern.errors import FormatError, message
from sparsekern.formats import dtypes
from sparsekern.formats.disk import read_sparse24
from sparsekern.formats.forms import FLOATING, values_name
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.utils.safetensors_io import OP, TensorFiles, listed, require


class Reader:
    """Reads tensors of a folder for a model, one at a time, in the dtype that was asked for."""

    def __init__(
        self,
        model: nn.Module,
        files: TensorFiles,
        dtype: torch.dtype | None,
        finite: bool,
        numbers: torch.dtype | None,
    ) -> None:
        self.model, self.files, self.dtype, self.finite = model, files, dtype, finite
        self.numbers = numbers  # dtype of quantised layers where none is asked for
        self.waiting: dict[str, Tensor] = {}  # converted with others, and not yet in the model
        self.precise = _precise(model, dtype)
        finite_check = functools.partial(require_finite, files) if finite else None
        self.experts = ExpertReader(files, dtype, numbers, finite_check)

    def read(self, name: str, device: torch.device) -> Tensor:
        tensor = self.files.read(name, device=device)[0]
        if self.finite:
            require_finite(self.files, name, tensor)
        return tensor

    def dense(self, name: str, source: str | Conversion, device: torch.device) -> Tensor:
        """The tensor `name` of the model."""
        if isinstance(source, str):
            tensor = self.read(source, device)
        else:
            if name not in self.waiting:
                self.waiting.update(self._converted(source, device))
            tensor = self.waiting.pop(name).to(device)
            if tensor.untyped_storage().nbytes() != tensor.nbytes:
                tensor = tensor.clone()  # a part of what was converted would keep all of it
        return self.as_asked(name, tensor)

    def as_asked(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the model in the dtype that was asked for."""
        if self.dtype is None or tensor.dtype not in FLOATING:
            return tensor
        keep = self.precise is not None and self.precise.search(name)
        return tensor.to(torch.float32 if keep else self.dtype)

    def _converted(self, source: Conversion, device: torch.device) -> dict[str, Tensor]:
        try:
            return source.run(self.model, lambda name: self.read(name, device))
        except FormatError:
            raise
        except Exception as error:
            raise FormatError(
                message(
                    f"{OP}: tensors {listed(name for _, name in source.sources)}",
                    f"what Transformers makes {source.first} of",
                    f"{type(error).__name__}: {error}",
                )
            ) from error

    def layer(self, name: str, found: Plan, module: nn.Module, device: torch.device) -> nn.Module:
        """SparseLinear for one compressed layer, or the linear layer of an expert; `module` is what
        stands in its place on the tree."""
        parts = found.names.experts.matrices.get(name)
        if parts is not None:
            trained = all(p.requires_grad for p in module.parameters())
            return self.experts.module(parts, device, trained)
        stored = found.names.layers[name]
        weight = read_sparse24(self.files, stored, device, self.dtype, self.numbers)
        if self.finite:
            require_finite(self.files, values_name(self.files, stored), weight.numbers())
        bias = getattr(module, "bias", None)
        if bias is not None:
            source = found.sources[id(bias)]
            bias = filled(bias, self.dense(*source, device).to(weight.dtype))
        return SparseLinear.from_sparse24(weight, bias)


def filled(parameter: Tensor, data: Tensor) -> Tensor:
    """The Parameter itself, which optimizers and DistributedDataParallel know, with other data; for
    one on meta, or made in inference mode, another."""
    if parameter.is_meta or parameter.is_inference():
        return nn.Parameter(data, requires_grad=parameter.requires_grad)
    parameter.data, parameter.grad = data, None
    return parameter


def _precise(model: nn.Module, dtype: torch.dtype | None) -> re.Pattern[str] | None:
    """Names of tensors that Transformers keeps in float32 when it casts a model to `dtype`."""
    names: set[str] = set()
    if dtype in dtypes.NATIVE:
        names.update(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        names.update(getattr(model, "_keep_in_fp32_modules", None) or ())
    parts = (re.escape(name).replace(r"\*", r"\d+") for name in sorted(names))
    return re.compile("|".join(rf"(^|\.){part}($|\.)" for part in parts)) if names else None


def require_finite(files: TensorFiles, name: str, tensor: Tensor) -> None:
    """FormatError for NaN or Inf in a tensor that was read as `name`."""
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        return
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        first = [] if tensor.dim() == 0 else (~finite).nonzero()[0].tolist()
        require(
            False,
            files.where(name),
            "finite values",
            f"{int((~finite).sum())} NaN or Inf, first at {first}",
            "The file is damaged, or so was the model that was saved.",
        )
