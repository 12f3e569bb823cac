"""SparseLinear: torch.nn.Linear with 2:4-compressed weights, and no dense copy of them.

The module owns a Sparse24 (as two buffers, so that .to(), deepcopy and pickle work as for any
module) and a bias; shapes, dtypes and backends are the business of ops/linear_op.py. What it writes to a
state_dict is the published sparse-24-bitmask form, whatever layout the buffers have on the device
("tile64" where a GPU has the CUDA kernels, see formats/tile64.py, "cusparselt" on request, "rowmajor"
elsewhere):

    compressed   [out_features, in_features / 2]          float32 | float16 | bfloat16
    bitmask      [out_features, ceil(in_features / 8)]    uint8, bit b of byte j = column 8j + b
    shape        [2, 1]                                   int64: out_features, in_features
    bias         [out_features]                           only with a bias
"""

import torch
from torch import Tensor, nn

from sparsekern.backends.cuda import linear as cuda_backend
from sparsekern.backends.cusparselt import linear as cusparselt_backend
from sparsekern.errors import FormatError, message
from sparsekern.formats.sparse24 import Sparse24, compress, verify
from sparsekern.formats.tile64 import LAYOUT as PACKED
from sparsekern.formats.tile64 import pack, wait_for_weight
from sparsekern.ops import linear_op as ops

_OP = "sparsekern.SparseLinear"
_WEIGHT_KEYS = ("compressed", "bitmask", "shape")
# What compress stores for all-zero groups: nibble 0xE (columns 2 and 3), 0x4 in the padding nibble.
_ZERO_GROUPS, _ZERO_GROUP_AND_PADDING = 0xEE, 0x4E


class SparseLinear(nn.Module):
    """y = x · Wᵀ + bias with a frozen 2:4-sparse W [out_features, in_features].

    Specification: reference.linear (float64). A new module computes zero: fill it with
    `load_state_dict` or by assigning `weight`, or build it with `from_linear` or `from_sparse24`.

    Args:
        in_features: a multiple of 4. out_features: any.
        bias: whether to add a bias; it is the only parameter, and the only one that can be trained.
        dtype: float32 | float16 | bfloat16; None means torch's default.
        device: as for nn.Linear; "meta" holds no memory and waits for load_state_dict(assign=True)
            or for a weight to be assigned.
        packed: None keeps the weight in layout "tile64" on a GPU that has CUDA kernels for it and
            in "rowmajor" elsewhere, and changes it as the module moves. False always means
            "rowmajor"; True always "tile64", on the CPU too, where it is only slower. "cusparselt"
            keeps the vendor library's blob on a GPU (backends/cusparselt/linear.py) and "rowmajor"
            elsewhere. The attribute `packed` can be assigned.
    Raises:
        ValueError: in_features is not a multiple of 4, a size is negative, or packed is none of
            these; packed="cusparselt" with a shape that the library does not take.
        TypeError: another dtype; packed=True or "cusparselt" with float32.
        NotImplementedError: packed="cusparselt" where there is no usable library; it says why.
    """

    def __init__(
        self, in_features, out_features, bias=True, *, dtype=None, device=None, packed=None
    ):
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        if in_features < 0 or out_features < 0 or in_features % 4 != 0:
            expected = "out_features >= 0 and in_features >= 0, a multiple of 4"
            got = f"in_features {in_features}, out_features {out_features}"
            raise ValueError(message(_OP, expected, got, "Keep this layer dense."))
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            expected = "dtype float32, float16 or bfloat16"
            raise TypeError(message(_OP, expected, dtype, "Pass dtype=torch.bfloat16."))
        self.in_features, self.out_features = in_features, out_features
        values = torch.zeros(out_features, in_features // 2, dtype=dtype, device=device)
        size = (out_features, (in_features + 7) // 8)
        metadata = torch.full(size, _ZERO_GROUPS, dtype=torch.uint8, device=device)
        if in_features % 8 != 0:
            metadata[:, -1] = _ZERO_GROUP_AND_PADDING
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("metadata", metadata, persistent=False)
        self._layout, self._packed = "rowmajor", _checked_packed(packed)
        self._arrange()
        zeros = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if zeros is None else nn.Parameter(zeros)

    # ------------------------------------------------------------------ construction from weights

    @classmethod
    def from_sparse24(cls, w24, bias=None, *, packed=None):
        """A module around w24, sharing its tensors when it is in the layout that `packed` asks for.

        Args:
            w24: Sparse24 [out_features, in_features], any layout.
            bias: Tensor or Parameter [out_features], or None. A Parameter keeps its requires_grad,
                a Tensor becomes a trainable Parameter. dtype and device of w24.
            packed: see SparseLinear.
        Raises:
            TypeError: w24 is no Sparse24, the bias has another dtype, or packed=True with float32.
            ValueError: the bias has another shape or device.   And what `packed` raises.
        """
        _check_weight(w24)
        out_features, in_features = w24.shape
        module = cls(in_features, out_features, bias=False, dtype=w24.dtype, device="meta")
        module._packed = _checked_packed(packed)
        module.weight = w24
        if bias is not None:
            module.bias = _bias_parameter(bias, w24)
        return module

    @classmethod
    def from_linear(cls, linear, mask=None):
        """Compresses a dense layer.

        Args:
            linear: nn.Linear, or transformers' Conv1D, whose weight is [in_features, out_features].
            mask: bool [out_features, in_features], True = kept; None for a weight that is 2:4.
        Returns:
            SparseLinear with copies of weight and bias, the bias' requires_grad, and
            linear.training.
        Raises:
            TypeError: another kind of module. ValueError: the weight is not 2:4 (see compress).
        """
        weight = getattr(linear, "weight", None)
        known = isinstance(linear, nn.Linear) or _is_conv1d(linear)
        if not known or not isinstance(weight, Tensor):
            got = type(linear).__name__
            remedy = "Compress the weight and call from_sparse24."
            raise TypeError(message(f"{_OP}.from_linear", "nn.Linear or Conv1D", got, remedy))
        weight = weight.detach()
        w24 = compress(weight.t().contiguous() if _is_conv1d(linear) else weight, mask)
        module = cls.from_sparse24(w24)
        if linear.bias is not None:
            bias = linear.bias.detach().clone()
            module.bias = nn.Parameter(bias, requires_grad=linear.bias.requires_grad)
        return module.train(linear.training)

    # ------------------------------------------------------------------ the weight

    @property
    def weight(self):
        """The Sparse24 made of this module's buffers, in its present layout. It can be assigned."""
        view, buffers = self._view, self._buffers
        if view.values is buffers["values"] and view.metadata is buffers["metadata"]:
            return view
        return self._make_view()  # somebody replaced a buffer by hand

    @weight.setter
    def weight(self, w24):
        _check_weight(w24)
        if tuple(w24.shape) != (self.out_features, self.in_features):
            expected = f"a weight of shape [{self.out_features}, {self.in_features}]"
            remedy = "Build a new module with from_sparse24."
            raise ValueError(message(_OP, expected, list(w24.shape), remedy))
        self._arrange(w24)

    @property
    def packed(self):
        """None | True | False | "cusparselt": decides the weight's layout. It can be assigned."""
        return self._packed

    @packed.setter
    def packed(self, packed):
        previous, self._packed = self._packed, _checked_packed(packed)
        try:
            self._arrange()
        except Exception:
            self._packed = previous
            raise

    def _arrange(self, w24=None):
        """Makes w24, or the present buffers, the weight, in the layout that `packed` asks for."""
        w24 = self._make_view() if w24 is None else w24
        wanted = self._packed
        if wanted is None:
            wanted = cuda_backend.packs(w24.device, w24.dtype) and 0 not in w24.shape
        if wanted == cusparselt_backend.LAYOUT:
            w24 = self._for_cusparselt(w24)
        else:
            w24 = pack(w24) if wanted else w24.rowmajor()
        self._hold(w24)
        if w24.layout == PACKED:
            wait_for_weight(w24.values)

    @staticmethod
    def _for_cusparselt(w24):
        if cusparselt_backend.packs(w24.device):
            return cusparselt_backend.pack(w24)
        return w24.rowmajor()

    def _hold(self, w24):
        """Makes w24 the weight, in the layout that it has."""
        self._buffers["values"], self._buffers["metadata"] = w24.values, w24.metadata
        self._layout = w24.layout
        self._view = self._make_view()

    def _make_view(self):
        # Without __init__, whose checks these tensors have passed, some of them on meta or in a
        # state between two calls of _apply.
        w24 = Sparse24.__new__(Sparse24)
        w24.values, w24.metadata = self._buffers["values"], self._buffers["metadata"]
        w24.shape, w24.layout = torch.Size((self.out_features, self.in_features)), self._layout
        return w24

    def forward(self, x):
        """x [..., in_features] -> [..., out_features]; see sparsekern.linear."""
        view, buffers, parameters = self._view, self._buffers, self._parameters
        if view.values is not buffers["values"] or view.metadata is not buffers["metadata"]:
            view = self.weight  # which says what this means; asking it always would be a call more
        # self.bias would first search the wrong places, in 0.5 µs.
        bias = parameters["bias"] if "bias" in parameters else self.bias
        return ops.linear(x, view, bias)

    def _apply(self, fn, recurse=True):
        """.to() and its kin; values that a narrower dtype rounds to -0.0 become +0.0."""
        if self._layout == cusparselt_backend.LAYOUT:
            self._hold(self.weight.rowmajor())  # a blob holds no numbers that fn could convert
        dtype = self.values.dtype
        super()._apply(fn, recurse)
        if self.values.dtype != dtype:
            self.values = self.values.masked_fill(self.values == 0, 0)
        self._arrange()
        return self

    def __getstate__(self):
        """For copies and pickles; a blob of cuSPARSELt is never part of them."""
        state = {key: value for key, value in self.__dict__.items() if key != "_view"}
        if self._layout == cusparselt_backend.LAYOUT:
            w24 = self.weight.rowmajor()
            state["_buffers"] = {**self._buffers, "values": w24.values, "metadata": w24.metadata}
            state["_layout"] = w24.layout
        return state

    def __setstate__(self, state):
        """For copies and pickles; torch.load(map_location=...) may have moved the buffers."""
        super().__setstate__(state)
        self._arrange()

    def extra_repr(self):
        text = f"in_features={self.in_features}, out_features={self.out_features}"
        text += f", bias={self.bias is not None}, dtype={self.values.dtype}"
        return text if self._layout == "rowmajor" else f"{text}, layout={self._layout}"

    # ------------------------------------------------------------------ state_dict

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        w24 = self.weight.rowmajor()
        shape = torch.tensor([[self.out_features], [self.in_features]], device=w24.device)
        tensors = (w24.values, w24.bitmask(), shape)
        for key, tensor in zip(_WEIGHT_KEYS, tensors):
            destination[prefix + key] = tensor

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """Loads the weight here and leaves the bias to nn.Module.

        Without assign=True values are cast to this module's dtype and device, as nn.Linear does.
        The loaded weight is then packed or not, as `packed` says. Raises FormatError for a weight
        that breaks a rule of the format.
        """
        present = [key for key in _WEIGHT_KEYS if prefix + key in state_dict]
        found = {key: state_dict[prefix + key] for key in present}
        if not found:
            missing_keys.extend(prefix + key for key in _WEIGHT_KEYS)
        else:
            assign = local_metadata.get("assign_to_params_buffers", False)
            self._load_weight(found, prefix, assign)
        rest = {k: v for k, v in state_dict.items() if k.startswith(prefix)}
        for key in found:
            del rest[prefix + key]
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _load_weight(self, found, prefix, assign):
        op = f"{_OP}.load_state_dict({prefix.rstrip('.')!r})"

        def require(condition, expected, got, remedy="The file is damaged or of another model."):
            if not condition:
                raise FormatError(message(op, expected, got, remedy))

        out_features, in_features = self.out_features, self.in_features
        for key in _WEIGHT_KEYS:
            require(key in found, f"the keys {', '.join(_WEIGHT_KEYS)}", f"no {key!r}")
            got = type(found[key]).__name__
            require(isinstance(found[key], Tensor), f"{key!r} to be a Tensor", got)
        values, bitmask, shape = (found[key].detach() for key in _WEIGHT_KEYS)
        require(shape.dtype == torch.int64, "'shape' of dtype int64", shape.dtype)
        require(shape.numel() == 2, "'shape' with 2 numbers", list(shape.shape))
        if not shape.is_meta:
            expected = f"'shape' == [{out_features}, {in_features}]"
            numbers = shape.flatten().tolist()
            require(numbers == [out_features, in_features], expected, numbers)
        for key, tensor, columns in (
            ("compressed", values, in_features // 2),
            ("bitmask", bitmask, (in_features + 7) // 8),
        ):
            expected = f"{key!r} of shape [{out_features}, {columns}]"
            got = list(tensor.shape)
            require(got == [out_features, columns], expected, got)
        dtypes = (torch.float32, torch.float16, torch.bfloat16)
        require(values.dtype in dtypes, "'compressed' in float32, float16, bfloat16", values.dtype)
        require(bitmask.dtype == torch.uint8, "'bitmask' of dtype uint8", bitmask.dtype)
        if values.is_meta or bitmask.is_meta or (self.values.is_meta and not assign):
            got = "a meta tensor on one side"
            remedy = "Call load_state_dict(..., assign=True) on a meta module."
            raise ValueError(message(op, "weights with data, and memory for them", got, remedy))
        shape = (out_features, in_features)
        try:
            loaded = Sparse24.from_bitmask(values, bitmask.to(values.device), shape)
            if not assign:
                w24 = loaded.to(self.values.device, self.values.dtype)
                loaded = w24.clone() if w24 is loaded else w24
            verify(loaded)
        except FormatError as error:
            raise FormatError(f"{op}: {error}") from error
        self.weight = loaded


def _is_conv1d(module):
    """transformers.pytorch_utils.Conv1D, told by name: transformers is an optional dependency."""
    return any(base.__name__ == "Conv1D" for base in type(module).__mro__)


def _checked_packed(packed):
    if packed is None or packed is True or packed is False or packed == cusparselt_backend.LAYOUT:
        return packed
    expected = "packed in None, True, False, 'cusparselt'"
    raise ValueError(message(_OP, expected, repr(packed), "Leave it None."))


def _check_weight(w24):
    if not isinstance(w24, Sparse24):
        got = type(w24).__name__
        remedy = "Call sparsekern.compress(w)."
        raise TypeError(message(_OP, "weight of type Sparse24", got, remedy))


def _bias_parameter(bias, w24):
    if tuple(bias.shape) != (w24.shape[0],):
        expected = f"bias of shape [{w24.shape[0]}]"
        raise ValueError(message(_OP, expected, list(bias.shape), "Reshape the bias."))
    if bias.dtype != w24.dtype:
        expected = f"bias.dtype == weight.dtype ({w24.dtype})"
        raise TypeError(message(_OP, expected, bias.dtype, "Call bias.to(weight.dtype)."))
    if bias.device != w24.device:
        expected = f"bias on the weight's device ({w24.device})"
        raise ValueError(message(_OP, expected, bias.device, "Call bias.to(weight.device)."))
    return bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach())
