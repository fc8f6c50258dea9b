"""``python -m divqat`` is ``divqat``."""

from divqat.cli import main

raise SystemExit(main())
