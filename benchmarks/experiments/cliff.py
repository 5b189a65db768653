"""The cliff in the error surface of a recurrent unit, and descent on it: the picture of Pascanu et al., computed.

python benchmarks/experiments/cliff.py [--out DIR] [--quick]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from common import parse, write

from fastclip.demo import charts, cliff


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(__doc__, argv)
    wall = cliff.run(3 if arguments.quick else None, None, 1, lambda *progress: None)
    write(arguments, "cliff", cliff.COLUMNS, cliff.rows(wall), charts.cliff(wall))
    return 0


if __name__ == "__main__":
    sys.exit(main())
