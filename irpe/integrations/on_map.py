"""Models whose attentions are told the map of each call.

Height and width of the map travel from the image to every attention as an argument of each call, never as state: the
model runs timm's own forward on a view of itself whose blocks are bound to the map of this very image. Whatever repeats
a block later (gradient checkpointing of any kind, in any thread, compiled or not) repeats it on the same map.
"""

from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from .blocks import EncodedAttention


class OnMap(NamedTuple):
    """What an equipped attention gets in place of its mask, which timm's blocks hand through as it is."""

    height: int
    width: int
    mask: Tensor | None = None


class BlockOnMap:
    """A block bound to a map. Each adapter has its own, which is called as its blocks are."""

    def __init__(self, block: nn.Module, height: int, width: int) -> None:
        self.block, self.height, self.width = block, height, width

    def on_map(self, mask: Tensor | None) -> OnMap:
        """What the attention gets in place of its mask."""
        return OnMap(self.height, self.width, mask)


class AttentionOnMap(EncodedAttention):
    """The part of the class of an equipped attention that has to be told its map in every call."""

    block_on_map: ClassVar[type[BlockOnMap]]

    @staticmethod
    def map_of(argument: Any) -> OnMap:
        """The argument, checked."""
        if not isinstance(argument, OnMap):
            raise RuntimeError(
                "this attention does not know the height and width of its map: call the model, its forward_features "
                "or its forward_intermediates; to run the blocks yourself, take them from "
                "irpe.integrations.on_map.blocks_on_map(model, height, width)"
            )
        return argument


class BlocksOnMap(tuple[Any, ...]):
    """The blocks of a model, those with iRPE bound to a map: a tuple that can be called as `model.blocks` can."""

    def __call__(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


def blocks_on_map(model: Any, height: int, width: int) -> BlocksOnMap:
    """The blocks of an equipped model for tokens of a map of height x width, for those who run them by hand.

    >>> tokens = model.norm_pre(model._pos_embed(model.patch_embed(image)))
    >>> for block in blocks_on_map(model, *model.patch_embed.dynamic_feat_size(image.shape[-2:])):
    ...     tokens = block(tokens)

    Each is called as the block itself, with whatever else it takes. The blocks of Swin know their windows: call those.
    """
    return BlocksOnMap(
        block.attn.block_on_map(block, height, width) if isinstance(block.attn, AttentionOnMap) else block
        for block in model.blocks
    )


class _View:
    """A model whose `blocks` are bound to the map of one image, and which is the model itself in all else."""

    def __init__(self, model: Any, image: Tensor) -> None:
        self._model, self._image = model, image

    @property
    def blocks(self) -> BlocksOnMap:
        # read here and not in __init__: the checks of the patch embedding, which runs in between, make torch.compile
        # take the image's height and width for constants
        return blocks_on_map(self._model, *self._model.patch_embed.dynamic_feat_size(self._image.shape[-2:]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class ModelOnMap:
    """The part of an equipped model's class that tells the map to the blocks."""

    original: ClassVar[Any]  # timm's class, whose forward runs on the view

    # the two ways through the blocks that timm's models have; everything else calls one of them
    def forward_features(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.original.forward_features(_View(self, x), x, *args, **kwargs)

    def forward_intermediates(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.original.forward_intermediates(_View(self, x), x, *args, **kwargs)
