"""Which arguments of prune_model and calibrate are read, and when: the tables by which
utils/arguments.py refuses one that nothing reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparsekern.oneshot.presets import find_preset
from sparsekern.prune.methods import Method, find_method, methods
from sparsekern.utils.arguments import Given, Uses

OP = "sparsekern.prune_model"


def _method(given: Given) -> Method:
    named = given["method"]
    return find_method(OP, find_preset(OP, given["preset"]).method if named is None else named)


def _own(name: str) -> Callable[[Given], bool]:
    """Whether the method has this option, or the value is the default of those that have."""

    def reads(given: Given) -> bool:
        known = [o for method in methods().values() for o in method.options if o.name == name]
        usual = any(option.default == given[name] for option in known)
        return usual or any(option.name == name for option in _method(given).options)

    return reads


def _damps(given: Given) -> bool:
    refine, share = given["refine"], given["match_dense"]
    method = _method(given)
    if (method.refine if refine is None else refine) or (
        method.match_dense if share is None else share
    ):
        return True
    observed = given["calibration"] is not None or given["hessians"] is not None
    gptq = given["quantize"] is not None and given["quantize_method"] != "rtn"
    return (gptq and observed) or _own("damp")(given)


def _rotates(given: Given) -> Any:
    asked = given["rotate"]
    return find_preset(OP, given["preset"]).rotate if asked is None else asked is not False


def _data(name: str) -> Uses:
    """Rows of the arguments that say how calibration data are read. name: that of the data."""

    def reads(given: Given) -> bool:
        return given[name] is not None and given["hessians"] is None

    names = ("batch_size", "tokenizer", "true_sequential", "offload_activations")
    rows = dict.fromkeys(names, (f"{name} and no hessians", reads))
    return {name: ("hessians=None", lambda given: given["hessians"] is None), **rows}


CALIBRATE: Uses = {**_data("data"), "beside_dense": _data("data")["tokenizer"]}
PRUNE_MODEL: Uses = {
    **_data("calibration"),
    "damp": ("a method with damp= (sparsegpt, admm), refine=, match_dense= or gptq", _damps),
    "blocksize": ("a method that has blocks (sparsegpt)", _own("blocksize")),
    "keep_hessians": (
        "calibration or hessians",
        lambda given: given["calibration"] is not None or given["hessians"] is not None,
    ),
    "keep_dense_tokens": ('keep_dense="if-slower"', lambda given: given["keep_dense"] is not None),
    "undo": (
        "resume=None",
        lambda given: given["resume"] is None or given["undo"] is not True,
    ),
    "quantize_method": ("quantize=", lambda given: given["quantize"] is not None),
    "quantize_group": ("quantize=", lambda given: given["quantize"] is not None),
    "untie": ("a rotation (rotate=True or preset 'best')", _rotates),
}
