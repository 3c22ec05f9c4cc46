"""`python -m ovisnb`: the command `ovisnb`, for launchers that start modules (torchrun -m ovisnb train sft.json)."""

from __future__ import annotations

import re
import sys

from ovisnb.cli import main

# DeepSpeed's launcher puts it before the command; torch reads LOCAL_RANK
words = [word for word in sys.argv[1:2] if not re.fullmatch(r"--local[_-]rank=\d+", word)] + sys.argv[2:]
raise SystemExit(main(words))
