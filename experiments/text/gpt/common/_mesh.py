"""The mesh axes that recipes for language models share, and shapes over them."""

# Outermost first: an axis further right holds devices that are closer together.
MESH_AXIS_NAMES = ("pipeline", "data", "expert", "fsdp", "seq", "model")
# The axes that divide a batch between devices, and those that divide each weight.
BATCH_AXIS_NAMES = ("data", "expert", "fsdp")
WEIGHT_AXIS_NAMES = ("expert", "fsdp", "seq")


def mesh_shape_from_axes(
    *, pipeline: int = 1, data: int = 1, expert: int = 1, fsdp: int = 1, seq: int = 1, model: int = 1
) -> tuple[int, ...]:
    """Returns a mesh shape in the order of `MESH_AXIS_NAMES`; at most one size may be -1, to be inferred."""
    return (pipeline, data, expert, fsdp, seq, model)
