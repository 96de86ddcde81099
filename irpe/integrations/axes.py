"""How many axes the maps of a model have, and whether an encoding has as many."""

from ..irpe import RPEConfig


def why_not_axes(config: RPEConfig, ndim: int) -> str | None:
    """The reason that encodings do not fit maps of `ndim` axes, or None."""
    maps = {1: "sequences", 2: "images, (height, width)", 3: "videos, (frames, height, width)"}.get(ndim, "other maps")
    for name, single in vars(config).items():
        if single is not None and single.ndim != ndim:
            return (
                f"{name} has ndim={single.ndim}, but the maps of the model are {maps}; expected ndim={ndim} in the "
                f"configuration{'' if ndim == 2 else f', in string form -{ndim}d'}"
            )
    return None
