"""Pruned models on disk: save_pretrained, from_pretrained, load_into, verify, export."""

from sparsekern.checkpoint.decompress import decompress_model
from sparsekern.checkpoint.export import export_dense
from sparsekern.checkpoint.load import from_pretrained, load_into
from sparsekern.checkpoint.save import save_pretrained
from sparsekern.checkpoint.verify import CheckpointReport, verify_checkpoint
from sparsekern.utils.staging import check_writable

__all__ = [
    "CheckpointReport",
    "check_writable",
    "decompress_model",
    "export_dense",
    "from_pretrained",
    "load_into",
    "save_pretrained",
    "verify_checkpoint",
]
