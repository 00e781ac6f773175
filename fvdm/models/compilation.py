"""`torch.compile` of the network's blocks: one setting, for training and for sampling."""

from fvdm.models.attention import choose
from fvdm.models.backbone import Backbone

LIMIT = 64  # graphs: space or time, with or without gradients, one clip, one batch or any, and as many of frames


def compile_blocks(model: Backbone, backend: str = "inductor") -> Backbone:
    """Compile every block in place, when it is first called; weights and their names stay as they are.

    Space and time blocks become one graph each, without breaks, that all blocks of the kind share. A graph is compiled
    for a first shape of the clip, once more for all other batch sizes, for all other numbers of frames, for a single
    clip, and with and without gradients; what an engine or a checkpoint does to the model
    continues as before.

    Args:
        model: on the device where it will run.
        backend: of `torch.compile`.

    Returns:
        The same model.

    Raises:
        ValueError: if this machine cannot compile, which a single addition tests.
    """
    import torch._dynamo  # 1.4 s, for those who compile.

    device = model.device
    try:
        torch.compile(lambda x: x + 1, fullgraph=True, backend=backend)(torch.zeros(8, device=device))
    except Exception as error:  # Whatever the compiler's own tools raise: their kinds differ with the version.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"torch.compile does not work here for {device.type} ({reason[0]}); install a C++ compiler, such as the "
            f"package g++, or leave the setting compile off"
        ) from None
    torch.compiler.assume_constant_result(choose)  # No break in the graph. Here, not at its definition: 1.4 s.
    # Blocks of both kinds share one code, of which PyTorch keeps 8 graphs: too few for training with its previews.
    torch._dynamo.config.recompile_limit = max(LIMIT, torch._dynamo.config.recompile_limit)
    for block in model.blocks:
        block.compile(fullgraph=True, backend=backend)
    return model
