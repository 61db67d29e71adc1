"""Many small files of one folder in one call of C; see `Tree.read_many`.

Apart from `library`, so that reading a host does not load what drives devices.
"""

from vfiotool.native._types import read_folder

__all__ = ["read_folder"]
