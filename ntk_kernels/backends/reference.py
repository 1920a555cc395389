"""The `reference` backend: the formula itself, `ntk_kernels.reference`.

The public functions call it directly, so that PyTorch differentiates it as often as asked. It serves every call.
"""


def lacks(query, value, attn_mask=None, softcap=None) -> None:
    return None


def prefers(query, key, value, is_square: bool) -> bool:
    return False


def load():
    raise NotImplementedError("the 'reference' backend has no ops; call ntk_kernels.reference, or ntk_attention")
