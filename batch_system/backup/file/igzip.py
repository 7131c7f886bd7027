"""The library that packs and unpacks gzip members. Both the writer and the reader of a backup use
it, and `batch-system-core` alone does not install it.
"""

from batch_system.versions import missing

try:
    from isal import igzip_lib as igzip_lib
except ModuleNotFoundError as error:
    raise missing("a backup", error) from None
