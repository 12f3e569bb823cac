"""torch's own 2:4 tensors: bits equal to torch's conversion, both ways, without a dense weight."""

import pytest
import torch
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse import _semi_structured_conversions as conversions

import sparsekern as sk
from python_tests.linear_cases import random_weight
from sparsekern.formats import tile64
from sparsekern.integrations.semi_structured import from_semi_structured, to_semi_structured

SHAPES = [(32, 64), (64, 128), (96, 192), (160, 64), (32, 448)]

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructured")


def weight(shape, dtype=torch.bfloat16):
    return sk.compress(random_weight(*shape, dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_bits_are_torchs(shape, dtype):
    w24 = weight(shape, dtype)
    values, meta = conversions.sparse_semi_structured_from_dense_cutlass(w24.to_dense())
    for given in (w24, tile64.pack(w24)):
        tensor = to_semi_structured(given)
        assert isinstance(tensor, SparseSemiStructuredTensorCUTLASS) and tensor.shape == shape
        assert torch.equal(tensor.packed, values) and torch.equal(tensor.meta, meta)
        assert torch.equal(tensor.to_dense(), w24.to_dense())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_there_and_back(shape):
    w24 = weight(shape)
    back = from_semi_structured(to_semi_structured(w24))
    assert torch.equal(back.values, w24.values) and torch.equal(back.metadata, w24.metadata)
    x = torch.randn(3, shape[1], dtype=torch.bfloat16)
    assert torch.equal(sk.linear(x, back), sk.linear(x, w24))


def test_what_torch_made_of_fewer_than_two_values():
    """Zeros are kept in places of torch's choice; the numbers are the same."""
    dense = random_weight(64, 128, torch.float16) * (torch.arange(128) % 3 > 0)
    values, meta = conversions.sparse_semi_structured_from_dense_cutlass(dense)
    theirs = SparseSemiStructuredTensorCUTLASS(dense.shape, values, meta, None, None, None)
    back = from_semi_structured(theirs)
    sk.verify(back)
    assert torch.equal(back.to_dense(), dense)
    values.zero_()
    assert torch.equal(back.to_dense(), dense), "its own memory"


def test_metadata_that_is_none():
    theirs = to_semi_structured(weight((32, 64)))
    theirs.meta.zero_()  # both values in the first column of each group
    with pytest.raises(sk.FormatError, match="metadata"):
        from_semi_structured(theirs)


def test_nothing_is_dense_on_the_way(monkeypatch):
    for cls in (sk.Sparse24, SparseSemiStructuredTensorCUTLASS):
        monkeypatch.setattr(cls, "to_dense", None)
    from_semi_structured(to_semi_structured(weight((64, 128))))


def test_what_cannot_be_converted():
    for shape in ((16, 64), (32, 32), (40, 64)):
        with pytest.raises(ValueError, match=r"multiples of 32 and 64, got .*to_dense"):
            to_semi_structured(weight(shape))
    with pytest.raises(ValueError, match="float16 or bfloat16, got float32"):
        to_semi_structured(weight((32, 64), torch.float32))
    with pytest.raises(ValueError, match=r"float16 or bfloat16, got .*dequantize"):
        to_semi_structured(sk.quantize(weight((32, 64)), "int8"))
    dense = torch.ones(32, 64, dtype=torch.float16)
    for given in (dense, None, weight((32, 64))):
        with pytest.raises(TypeError, match=r"expected tensor: .*sparsekern.compress"):
            from_semi_structured(given)
    with pytest.raises(TypeError, match="expected w24: a Sparse24"):
        to_semi_structured(dense)
    opaque = SparseSemiStructuredTensorCUSPARSELT(dense.shape, dense.flatten(), *[None] * 4)
    with pytest.raises(TypeError, match="got SparseSemiStructuredTensorCUSPARSELT"):
        from_semi_structured(opaque)
    other = SparseSemiStructuredTensorCUTLASS(dense.shape, dense, dense.flatten(), *[None] * 3)
    with pytest.raises(ValueError, match="another form"):
        from_semi_structured(other)


def test_where_a_tensor_with_its_own_memory_is_wanted(tmp_path):
    linear = torch.nn.Linear(128, 64, bias=False, dtype=torch.float16)
    theirs = to_semi_structured(weight((64, 128), torch.float16))
    linear.weight = torch.nn.Parameter(theirs, requires_grad=False)
    for call in (sk.compress, sk.prune_compress):
        with pytest.raises(TypeError, match=r"own memory, got SparseSemi.*Call its .*to_dense"):
            call(theirs)
    with pytest.raises(TypeError, match=r"own memory, got SparseSemi"):
        sk.SparseLinear.from_linear(linear)
    with pytest.raises(ValueError, match=r"0.weight: expected a strided .*got .*SparseSemi"):
        sk.save_pretrained(torch.nn.Sequential(linear), tmp_path)
    assert not list(tmp_path.iterdir())
