"""FastAlign: align language models with preferences, demonstrations and written judgments.

Importing this package is cheap: it loads neither torch nor transformers.
"""

from fastalign import _compat

__version__ = "0.1.0"

# Before anything imports transformers, which fails as a whole if one of these packages does.
_compat.hide_broken_companions()
_compat.keep_bitsandbytes_local()
