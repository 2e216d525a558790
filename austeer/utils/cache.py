"""Where files are kept that can be made anew."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$AUSTEER_CACHE``, else ``$XDG_CACHE_HOME/austeer`` or ``~/.cache/austeer``; it need not be there yet."""
    cache = os.environ.get("AUSTEER_CACHE")
    return Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "austeer"
