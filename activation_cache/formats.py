"""How a row is stored: dtypes, their names in safetensors, and the bytes they take."""

import torch

STORAGE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
SAFETENSORS_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.int64: "I64",
    torch.int32: "I32",
}
TORCH_DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
TOKEN_BYTES = 16
"""Token id, document and position of one row."""
_EXACT_SHARE = 1 / 64
"""Room for rows that int8 keeps in float32: one block in four with a massive first row."""


def row_bytes(width: int, storage_dtype: str) -> int:
    """Bytes of one row at a hookpoint, with its norm and what decodes it."""
    stored = width * STORAGE_DTYPES[storage_dtype].itemsize + 4
    return stored + 4 if storage_dtype == "int8" else stored


def reserved_bytes(width: int, storage_dtype: str, n_rows: int) -> int:
    """Bytes that `n_rows` rows may take in one file, its header left out."""
    n_bytes = n_rows * row_bytes(width, storage_dtype)
    if storage_dtype == "int8":
        n_bytes += int(n_rows * _EXACT_SHARE) * (4 * width + 8) + 8 * width
    return n_bytes
