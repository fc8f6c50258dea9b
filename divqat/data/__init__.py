"""Image data sets and query sets from local files; nothing is ever downloaded.

Example:
    >>> splits = load("digits")
    >>> splits.num_classes, splits.channels, splits.image_size
    (10, 1, (8, 8))
    >>> images, labels = next(batches(splits.train, 32))
    >>> images.shape, images.dtype
    (torch.Size([32, 1, 8, 8]), torch.float32)
"""

from divqat.data.batches import augment, batches, shard_rows, to_float
from divqat.data.catalog import load, names
from divqat.data.sets import DataNotFound, ImageSet, LabeledImages, Splits, hold_out
from divqat.data.streaming import Decoder, StreamedSet
from divqat.data.transfer import transfer_names, transfer_set

__all__ = [
    "DataNotFound",
    "Decoder",
    "ImageSet",
    "LabeledImages",
    "Splits",
    "StreamedSet",
    "augment",
    "batches",
    "hold_out",
    "load",
    "names",
    "shard_rows",
    "to_float",
    "transfer_names",
    "transfer_set",
]
