"""What to keep of flash attention for the backward pass."""

from typing import Any

# What the backward pass of a flash kernel needs of its forward pass is named `<layer>.flash_residuals`: the context
# and one number per query and head. It is small beside what is not kept, the logits.
FLASH_RESIDUALS = "flash_residuals"


def policy(prim: Any, *_: Any, **params: Any) -> bool:
    """A remat policy that saves what flash attention names, and recomputes everything else.

    With it the backward pass does not run the forward kernel again. Combine it with another policy by
    `utils.combine_remat_policies`, or name ".*flash_residuals" in
    `utils.save_and_offload_only_these_names_regex`, which means the same.

    Args:
        prim: A primitive.
        params: Its parameters.

    Returns:
        Whether its outputs are saved.
    """
    # Other primitives have a parameter `name` too (a jitted function).
    return prim.name == "name" and params["name"].rpartition(".")[2] == FLASH_RESIDUALS
