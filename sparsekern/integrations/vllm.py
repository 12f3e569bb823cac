"""The vLLM plugin: `vllm serve DIR` runs a folder that save_pretrained wrote.

vLLM finds `register` through the entry point group "vllm.general_plugins", in every process that it
starts; there is nothing to import by hand. It adds one quantization method, which also answers for
older folders in compressed-tensors' sparse-24-bitmask format (vLLM itself no longer reads them):

    P.compressed, P.bitmask ──► rows of this rank, on the GPU ──► layout "tile64" ──► one launch
    (a shard at a time)         split as vLLM splits weights      no dense weight     q/k/v, gate/up

A layer that the folder keeps dense stays vLLM's own. Tensor parallelism splits rows anywhere and
columns at multiples of 8, where a byte of the bitmask ends.

Tested with vLLM 0.24. Source: vLLM, vllm/model_executor/layers/quantization (base_config.py) and
vllm/model_executor/parameter.py.
"""

from __future__ import annotations

from sparsekern.integrations.vllm_rules import OP, TESTED


def register() -> None:
    """Make vLLM know the quantization method "sparsekern". Called by vLLM, once in each process.

    Raises:
        ImportError: this vLLM lacks what the plugin builds on; the message names the tested
            versions.
    """
    try:
        from sparsekern.integrations import _vllm_method
    except ImportError as error:
        import vllm

        text = f"the plugin builds on classes of vLLM {TESTED}, this is {vllm.__version__}: {error}"
        remedy = f"Install vllm=={TESTED}.*, or a sparsekern that is newer."
        raise ImportError(f"{OP}: {text}. {remedy}") from error
    _vllm_method.register()
