"""Layout "tile64" by its formulas, for the tests of those who make it and of those who read it."""

import torch


def tiles(w, weight, group=0, scale=None):
    """(values, metadata) of layout "tile64", by its formulas.

    w: the stored numbers, dense; scale [out, groups]: those of groups of columns, of int4.
    """
    bits_each = 4 if weight == "int4" else 8 * weight.itemsize
    dense_k, chunk = 1024 // bits_each, 128 // bits_each  # columns of a tile, values of 16 bytes
    rows, columns = -(-w.shape[0] // 64) * 64, -(-w.shape[1] // dense_k) * dense_k
    if weight == "int4":
        stored, padding = w.to(torch.int16) + 8, 8
    else:
        stored, padding = w.to(weight).view({1: torch.uint8, 2: torch.int16}[weight.itemsize]), 0
    bits = torch.full((rows, columns), padding, dtype=stored.dtype)
    bits[: w.shape[0], : w.shape[1]] = stored
    groups = bits.view(rows, -1, 4)
    full = torch.zeros(*groups.shape)
    full[: w.shape[0], : w.shape[1] // 4] = (w != 0).float().view(w.shape[0], -1, 4)
    # Two columns of each group: those that are not zero, else the first that are; rising.
    order = torch.sort(full, dim=2, descending=True, stable=True).indices[:, :, :2].sort(2).values
    kept = torch.gather(groups, 2, order).view(rows, -1)
    nibbles = order[:, :, 0] + 4 * order[:, :, 1]

    panels, k_tiles = rows // 64, columns // dense_k
    values = torch.zeros(panels * k_tiles, 4 * 64 * chunk, dtype=bits.dtype)
    words = torch.zeros(panels * k_tiles, dense_k * 2, dtype=torch.int64)
    row, c = torch.meshgrid(torch.arange(64), torch.arange(dense_k // 2), indexing="ij")
    in_chunk = c % chunk
    if weight == "int4":  # nibbles of a row's 16 bytes
        pair = in_chunk // 2
        in_chunk = pair % 4 * 8 + in_chunk % 2 * 4 + pair // 4
    place = c // chunk * 64 * chunk + row // 8 * 8 * chunk + row % 8 * chunk + in_chunk
    tile_of = {}
    for first in range(0, panels, 4):
        for k in range(k_tiles):
            for panel in range(first, min(first + 4, panels)):
                tile_of[panel, k] = len(tile_of)
    word = torch.arange(words.shape[1])
    step, warp, g, t = word // 128, word // 32 % 4, word // 4 % 8, word % 4
    for (panel, k), tile in tile_of.items():
        of_tile = slice(panel * 64, panel * 64 + 64)
        values[tile, place] = kept[of_tile, k * dense_k // 2 : (k + 1) * dense_k // 2]
        of_groups = nibbles[of_tile, k * dense_k // 4 : (k + 1) * dense_k // 4]
        for bit in range(8):
            if bits_each == 8:
                nibble = of_groups[16 * warp + g + 8 * (t % 2), 16 * step + 8 * (t // 2) + bit]
            else:
                at = 16 * step + 4 * t + bit % 4
                nibble = of_groups[16 * warp + g + 8 * (bit // 4), at]
            words[tile] += nibble << 4 * bit
    metadata = words.to(torch.uint32).view(torch.uint8)
    if weight == "int4":
        values = (values[:, 0::2] + 16 * values[:, 1::2]).to(torch.uint8)
    if group:
        per_tile = 256 // group
        padded = torch.zeros(rows, k_tiles * per_tile)
        padded[: w.shape[0], : scale.shape[1]] = scale
        of_tile = torch.zeros(len(tile_of), per_tile, 64)
        for (panel, k), tile in tile_of.items():
            part = padded[panel * 64 : panel * 64 + 64, k * per_tile : (k + 1) * per_tile]
            of_tile[tile] = part.t()
        metadata = torch.cat((metadata, of_tile.flatten(1).view(torch.uint8)), 1)
    return values, metadata
