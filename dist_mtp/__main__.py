"""``python -m dist_mtp VERB ...``, the same as ``dist-mtp VERB ...``."""

import sys

from dist_mtp.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
