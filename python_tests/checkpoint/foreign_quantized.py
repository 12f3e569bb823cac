"""Folders that compressed-tensors 0.14.0 wrote (ModelCompressor.compress_model and update_config),
with the levels and scales of `levels` and `scales`: config.json, model.safetensors through zlib.

A Sequential of Linear layers a (quantised, bfloat16) and b (dense), without biases.
"""

import base64
import json
import zlib

import torch
from safetensors.torch import save_file
from torch import nn

from sparsekern.formats.packed import pack_words

# {name: (storage, shape, scales of a row, config.json, model.safetensors)}
FOLDERS = {
    "float-quantized": (
        "float8_e4m3fn",
        (8, 32),
        1,
        "eNqdkltu4zAMRffCbyfIFBmg8Bq6g2Ig0DbjCNbDFam0bpG9D+XETooOBmh/BD3vPbrkB7xkDGLfUWwMpo3hYHuo"
        "P+AyM32KeeSyMc/MrkwPMXkUqOHgIsrmqkAdVGDDmMVgK/Y0K85PdRlTRwnqkJ2roHGxHQxLyq3kRMt2NwX0toVa"
        "D6i6GrIKLxdC9qaxopqPFcSGKZ1uosvaDK+Y+uJ7roBbdGQ6mcZVRG1RqJ8UX+JAQaF58p4k3awv9y/f0/P38V5C"
        "ZWOWL9+8qIt6UyF8hicbCBP8qeCVbH+UH0VxQMffyQI8+ZgmR8zG2+DxDX4UTXvEEMh9P5yzSv+nP3oXG3TaZ35M"
        "ylh6LpUEFwTbh1hieIamJDecTIvtkQzr4FfQWdEo1jF2BfaqRt1GKHBMDNXnvmZByfzpavnaiImtTHdtv6LPZ7R5"
        "2G80ZY883OCXZ1Dvtr+/ICfqrQY5mUQv2aqX4dy0DpnXaq6+d3WHh3oP/+wfDVTrErig3Uh1VytaAtS3u+2v/XYH"
        "5/NfIuNgQA==",
        "eNqlkE1qwzAQhdVdjxG0FqX+qVG6SERxg2pc7wqBEowSO01oQ0JlKCUEchBfIDfQ0gsvjBA+U63aELsu3fRpMY/h"
        "zTeDphfgW3vIrviK7WJ4u4dR8qkNfHBsiGDTfjaRMUMwYgkLt8sljxNeNa+R4cwOqJr+iNcvqyTkC/bWgdxNDKdF"
        "wb9RDAdZpsbMG8wfABvhPsAy0bC5Y7Hd7N5jzuOoDZng8N5+tLqHOH3Q0EGmadek+TrZMP7axjzhDsHuA6ppZN5U"
        "txwGWpf194JBU49jMD6OwOhc//fKkgrgFUVA3FII6XkA+3leulQBUPhBToIsU9STGOdBmVGqM35BSFYq4Xm40BnX"
        "FUoC3yd55uoMkAUOAjcTVEqdycl5C/ihUypP8qRkVdLapzJVtVeVvgCPztPo",
    ),
    "int-quantized": (
        "int8",
        (8, 32),
        1,
        "eNqdUttOwzAM/Rc/d9NAQ0L9Bv4AoShNvS5qLiV2Ngrav+N0azcEPMBLlNjxOcfH/oDXrAPbd802BmVi2NkO6g84"
        "31SXYh6oBKab2pTrLiavGWqwgVeXemyhkveQWWnD9jDhTYXyjKnFBHXIzlXQuGh6RZyy4ZxwDrdj0N4aqCWB1YWO"
        "BHj+ELJXjWXBfKwgNoTpcAWd36o/6tQV3lMFZLRD1fI4LCBCqxm7UcRz7DGIaBq9R05X6vP/0pxk34dbAAGNmb81"
        "ecZmYcai7xmebECd4KWCI9puz/8yYqcd/cUJ8OhjGh0SKW+D12/wL2PMXoeA7q/WnAT4183oXGy0k/3yQxJ9ZddS"
        "cW+mt12IxYJnaIpr/UEZbfaoSA6/iJwQlUjax7YIvaBhu2IMFBNB9XWfiTVn+vK1tDXoRJbHm3VfhE85XN1vV+Kw"
        "19Rfxc9lUG/WD98kJ+ysmDiqhK/ZCpei3BiniZZJLrw3M4f7egs/7o7YKTMJVKRdlUpUplkMlNrN+m673sDp9Al9"
        "BF0U",
        "eNqlkNFqgzAUhhNNdI8huQ5jWid2Fy3sYrC73exqlJJWu5attCzCGKXQB/EFfBXpC6mJqU6hdY7d7M/Ffzj858tJ"
        "niD41o6wa75k25Dc7UgQfdUFefRcQknbfnGoPaEkYBGbbhYLHka8at5Q25vsaTX9Ga5el9GUz9l7B3L/YHsXFP83"
        "iu3RgVNjZi3mD4BL/T5g4NBhu8d8s95+hJyHQecpfncHr88YetRx3AYyW0Vrxt8uCc9dgtsHVNPUua3W2FvWVfOt"
        "wGr9MAbjwwiMzv6/k2VIASyEqemZUgXGABpSZjrKARCGKTWzLHOECwilmZUI1RlDaFqZ5QpjKOqMrqu8AIahyVKv"
        "M6AQ0DT1UqGiqDNSO98CfiiJ0yRNjmllcVPHaXxs6mOlE84Y0BE=",
    ),
    "pack-quantized": (
        "int4",
        (8, 64),
        2,
        "eNp1kkFu4zAMRe/CtROkaWbjM8wNikKgZcYRbEmuSKXjFr77UG7tpGi7MWRR/P/pU+/wkjGIe0NxMRgbw9l1UL/D"
        "x8p0KeaRy8ayMoeyPMfkUaCGEW2/+xSgFipwYcxi0Iq7LoLaGfIwVBCz/FIRTB2J/j7BXxcIEzxX8Equu8jiqy0x"
        "tZTW880QbW9YUraSE63b7RTQOwv1GQem6hOXlQvqx2MFIXvTuCJ5UpqGKV2LJnjyMU0DMRvvgsd/cCub/lXhCsVc"
        "AVscyLQyjZunQqBQN6nMYqetPHlPkgqIEirHx3kNRrT6Nt4LzLPK/p5lN8QGBx2JH5PilfGkEt3q7roQy/2foCmR"
        "9Vdj0V7IsH78xrgoGmW6xFZdVjVqd0KBY2Kovj4BFpTMX46We42Y2Ml090I28qVGu+NppwF75P4Gv7ZBfdj/+Yac"
        "qHOa4WQSvWSnXoZzYwdk3sa4+d4NHI71CX58OJqnjiRwQbuR6q4OswSovYf9w2l/gHn+D2KCEp8=",
        "eNqTYGQAg2qlRL3y1Mz0jJL44ozEglQlq2qllJJKEEPJ08xESUcJKhxtFKujlJJYkhifn5ZWnFpSDBQy0DE0i63V"
        "QRhRkJicnZqCYoaxEZIZFjoWmKYYmukYmRuhmFOcnJiD4hQnN0MzFHOwuAZoiI6xgQnIoCSoQXiMMMHmFKB2HWMz"
        "i9jaWg5I8DA4QOlGiRMVHTdaPH6s6JBur7C40eHXtSJDoqOo98YMj46ljRI3OjpetkZI7OjQ6ejweNER372jQqOj"
        "ue/FioiObU0aQNlfbRkaJzpsO2dE/OhI7DnRYdExpf/HjoyO480WL2Z0/MJmJrKNWM1EthGLmcg2YjMT2cYOAqDB"
        "ngEIG+wa7BiAsMEek08ZBACwfQAZ",
    ),
    "marlin-24": (
        "int4",
        (64, 64),
        1,
        "eNp1kttuwjAMht/F1wWxiSueYW+ApshNQxuRQ2c7sIL67nM4Dmm7iRwf/ny2c4avgkn8CcXnZGxOO9/D5gxXy/SU"
        "y8jVcbHMqpq7TBEFNhCRgk+L9zU04NNYxKAVf7hoaVEqITSQi/wTEaTeiV638OGTQ4LPBo7O94NcntSSTJ2je34b"
        "st0bFipWCrm7u5sSRm9hs8PArrmRsj89MlKJpvVVdK08LTs6VFWILmaagmM20aeI3/AMm/1R8SrH3ABbDM50Mo0P"
        "TcVAcf2kMnbAlFzQYp5idEIVRimV5VqhwxGNnsbfEvOswn+Osg+5xaDLiCMpW10M1cndn/Z9yrX9LbR1YvuDsWgH"
        "Z1iP+AC8LNYozpC7CnlTc91CXOJMDM3r8llQCr+k1pZGJPYyPf+GYmvviSv7i1enVmFVYbV8Wy9XMM8/u9jbzA==",
        "eNrtk7GLm2AYxtN/wcW1mMVBjjPnpedRKBQs1D/ARY7DXrxcqaUHCdRyCB118Q8IB+KcLbObc5wcxc0hEJUszv3e"
        "5OK9n3ehlBs6tBGS+Mj3/J738/lev+ptP3eccfTd/Dy+mV7eGldfzBF3fseNpj9uTe6c+3gy4ARucmPAnT4QxMHZ"
        "hcCNjKlx+e36emJOJ0Q+FsTjgXThCNynByds8f6DOEQekjCUnlqAgSCengzBxTiaXBmW+Uwc2kp83oq4COJwKO2s"
        "vppTg5qIsjgwESwXBuIbEsfZSKG/3PDNbBk44xlbRDVbeJFvaV6T9jVHt+eOrthFzCiWmjPpQhqni42ky8tNHM6W"
        "Kj+eWSrW+loc1n2Vj+pF4EUymzMyO89D357zjWIHzp4jjX1rIzUpZoOG2XW/iDF7nusyzV4E3TyYrXmhj9mMwhY0"
        "29G7eTA7qi0Vs+15HNJsme3mwey+xjeYnTO+RbOLuJsHs70oXWC2Yqs8zYZ3h/K4sovZtRu4mD13G5diu5b7O//W"
        "qx840I3WK2/SXTeQP9Ho2Sx1P4fm6TJ0Y89hlEWw68YjGzR6Nr7BbOgGzYZu0HkwG7qB2dANmg3doPNgNnQDs6Eb"
        "NBu6QefBbOgGZkM3aDZ0g87zp+eRykPeJ3Ue3dilziPpB8Um/fj57v/1L1+9t72zntQ7/lu/WVJmJflaZUlVkT/k"
        "NgHtQV8d0ss8KRNavwcfrK+xnnX1FfGpypeub/Vq74P0FdbLvPUBvawqGI3Yw/N8O9c9eb5uOVU7L9Gr7Km+3ZtW"
        "zxOslx2dWKxhNjwHzPbS9Yf0jCTr7hvszaNOZq+q6heYjP1u",
    ),
    "marlin-24 of groups": (
        "int4",
        (64, 512),
        4,
        "eNp1kktuwkAMhu/idUCAWFScoTdA1chJhjBiHqntgQaUu9cTGihSu4kcP35/tucGnxmjuCuKS9E0KR5cB7sb3C3T"
        "Uco9F8dkmVUxD4kCCuwgIHkXF5stVOBin8VgI+48aWlRzN5XkLL8ExGkzor+7uHdRYsEHxVcrOuOMrXUkkStpTm/"
        "9qk5GRbKjWSys7sdIgbXwO6Anm31Q8ruqhnrzVsFMQdTu6K5VZyaLZ2LKAQbEg3eMpvgYsAveIbN6aJ0BWOsgBv0"
        "1rQy9I+mSoFiu0Flpn5aykMIVqiQKKKC3PN1M6LRa/9bYBxV9s89dj7V6PUSoSclK1ehsra5setiKrPvoS7rOp1N"
        "g83RGtZPeOBNVzWKc0ytNpjVbLsQGzkRQ/V6eRaUzC+pZaQeiZ0Mz4eh2Dp55ML+4tWdFVhVWC3X2+UKxvEbEsra"
        "AA==",
        "eNrtmcFqIlkUhntewY3body4KJqYSDrVNAwMODA+gBtpGrtj201XMw0RxqERZllufIAQENfuXLtzHVcupXYuhKoS"
        "N677Hk1VnXMy9twTKwZMpSCk/lDnv7f8v3NvbvK/vNh8fTdqL/+uf258ar77VvvwpX5pvP5uXDb/+VY3Xht/np0a"
        "pnH1qQZ31cK5WTi9eGsal7Vm7d1fHz9e1ZtXSj8xLwrW6du2aby/K4Vr/P5H4RwVKZrnxfsloIB58eqkCFVqL68+"
        "1Oz6f4xHq5SqYlqnhfNtqa/1Zo1MiZTYNSV43iycnRXUtNq/wteq2O/ervLr69teu3GdnY+W2Xln1LUrnfU0V2lX"
        "W4N2tdSajzMlu+xmpsNiYzpcFavW7Wrcv74t5xvXdhlrucq4v8yV86PlsNcZWVk3Y2UHbr/bGuTXpVavHfoUG117"
        "VVxPsTdo2HuZm4+x98CtWtR72OPjwd6VTr+LvTOl7Jx6t6t8PNh7tLTL2Ls1GPept5Xl48HeuUp+jb3dTNem3vMx"
        "Hw/27oymQ+xdapXz1Bs+OzQex3Kw99LpOdh74Kwd4u3Yzv/Vj2rlem3IRlTLXU+32UD1lUbnZpfDeVQ6VQuyEfpk"
        "SsPeNhuxN2h0bvk19oZsUG/IBh0P9oZsYG/IBvWGbNDxYG/IBvaGbFBvyAYdD/aGbGBvyAb1hmzQ8Uh5JONRnyfh"
        "0Rk7hEeVD+Kt8iHlnfMl5Z3zJeWd8yXlnfMl5Z16QzZkvFNvyIaMd86jlHfirfIh5Z3zJeWd8yXlnfMl5Z3zJeWd"
        "r3dS3vl6l+j6q8E78Vb5kPLO+ZLyzvmS8s75kvLO+ZLyztc7Ke98vUt0/dXgnXirfEh553xJeed8SXnnfEl553xJ"
        "eefrnZR3vt4luv5q8E68VT7S/bOMd77eSXnn612i668G78Rb5SPdP8t45+udlHe+3iW6/mrwTrxVPtL9s4x3vt5J"
        "eefrXaLrrwbvxFvlI90/H9H5lQbv/Lwo3T8f0fmVBu/8vCjdPx/R+ZUG7/y8KN0/H9H5lQbv/Lwo3T8f0fmVBu/8"
        "vCjdPx/R+ZUG7/y8KN0/P+////77W3o95+vFG3VdqKuorhN1Hfr+Kb3h/im94f4pvdX9bOLPfPVtMZsEgfpB3U5A"
        "u9MXu3TfnfgTqt9AHax7WJ9xfaHqBP6+z0d6ENZB+gLrvhvVAd0PApiaKg+/dzfzulG/9yKfIJqv0oPZfX3zbiLd"
        "nWDdZ7oq4cHc8Dxgbvs+v0ufqZHx9wbvJtbV3IMA+XgTN/587567oboX6wHOw1ZfwLvBejCL9cl93Q/nts/zoe6R"
        "cW91eDexHkTvAfRtrOHj080L02/Ax+Nc7NR3cbTv8w/nMwi8Tf5186L0INZd/L43+pajSI84+jlf+z7/cD5h7mH+"
        "dfLCdFUE3g3l5Sf6Dr72ff7hfCr4N/lPtp9L+3Fy/VzKZ9j/k+3n0n6cXD+X8onzn1w/l/bj5Pq5lM+w/yfbz6X9"
        "+ND7rZivKP+J9nNpPz70fivWw/wn28+l/fjQ+62Yryj/j7S/1uvHh95vxXqY/8faX+v140Pvt2K+ov7/SPtrvX58"
        "6P1WrKu5e9H+59n+/fsDIjcirQ==",
    ),
}


def levels(out_features, in_features):
    """int64 [out, in], 2:4, of -7..7; the last row is 0."""
    row, column = torch.arange(out_features)[:, None], torch.arange(in_features)[None]
    level = (row * 7 + column * 5 + column // 4) % 15 - 7
    kept = (column % 4 == (row + column // 4) % 3) | (column % 4 == 3)
    level = level * kept
    level[-1] = 0
    return level


def scales(out_features, groups):
    """Powers of two, float32 [out, groups]."""
    places = torch.arange(out_features)[:, None] + torch.arange(groups)[None]
    return 2.0 ** -(places % 4).float()


def write(name, folder):
    """The folder; returns (storage, dense bfloat16 weight of a, scales)."""
    storage, shape, groups, config, model = FOLDERS[name]
    folder.mkdir(exist_ok=True)
    for file, text in (("config.json", config), ("model.safetensors", model)):
        (folder / file).write_bytes(zlib.decompress(base64.b64decode(text)))
    scale = scales(shape[0], groups)
    wide = scale.repeat_interleave(shape[1] // groups, dim=1)
    return storage, (levels(*shape) * wide).bfloat16(), scale


def module(name):
    """The model that the folder is of."""
    out_features, in_features = FOLDERS[name][1]
    model = nn.Sequential()
    model.add_module("a", nn.Linear(in_features, out_features, bias=False))
    model.add_module("b", nn.Linear(out_features, 4, bias=False))
    return model.bfloat16()


def write_packed(folder, size, in_features, group_size, *, stated="group_size", **more):
    """A pack-quantized folder of one Linear "a" [8, in_features] with scales of `size` columns
    each, of which config.json says what `stated` and `more` do; its dense bfloat16 weight."""
    folder.mkdir(exist_ok=True)
    level, scale = levels(8, in_features), scales(8, -(-in_features // size)).bfloat16()
    tensors = {
        "a.weight_packed": pack_words(level),
        "a.weight_scale": scale,
        "a.weight_shape": torch.tensor([8, in_features]),
    }
    save_file(tensors, folder / "model.safetensors")
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights | {stated: group_size} | more}
    entry = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    config = {"quantization_config": {**entry, "config_groups": {"group_0": group}}}
    (folder / "config.json").write_text(json.dumps(config))
    return (level * scale.float().repeat_interleave(size, 1)[:, :in_features]).bfloat16()
